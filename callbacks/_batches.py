"""An endless, resumable stream of hyper-validation batches that disturbs nobody else's data order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from hypergrad import ConfigurationError, generators_of, preserved, preserved_rng

# Attributes that make a DataLoader deliver the same batches; what decides their order is replaced.
_KEPT = ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
# Samplers may be endless; an epoch of the stream is not.
_LONGEST_EPOCH = 100_000
# A small dataset is read several times over before its loader is set up anew, which may mean to start workers.
_SHORTEST_EPOCH = 64


class BatchStream:
    """Draws one batch after another, without end, each from random streams of its own.

    A map-style DataLoader is never iterated itself, which would advance its sampler, its generator or its
    persistent workers: another one on the same dataset is. Where the original is in order or shuffled, the stream
    reshuffles in every pass through the data; the order of any other sampler is kept. Other iterables, and DataLoader
    classes with an iteration of their own, are iterated as they are. What one loader delivers until it is set up anew
    is an epoch of the stream: one pass, or as many as make 64 batches.

    Random generators that the dataset itself keeps are swapped along with the global ones.

    Args:
        source: a DataLoader or any re-iterable of batches.
        seed: fixes the order.

    Raises:
        ConfigurationError: if the source has no batch.
    """

    def __init__(self, source: Iterable[Any], seed: int) -> None:
        self._source = source
        self._seed = seed
        self._epoch = -1
        self._consumed = 0
        self._drawn = 0
        dataset = source.dataset if isinstance(source, DataLoader) else source
        self._generators = generators_of(dataset)
        self._batches: Iterator[Any] = iter(())

    @contextmanager
    def next(self) -> Iterator[Any]:
        """The next batch, as the loader delivers it (on the host).

        Inside the block all global random streams are this batch's own, the same whenever it is drawn: what the
        batch is used for can draw from them too.
        """
        # One swap for reading and using a batch: NumPy's state alone costs as much as a small network's forward pass.
        with preserved_rng(self._seed + self._drawn, self._generators):
            try:
                batch = next(self._batches)
            except StopIteration:
                batch = self._first_of_next_epoch()
            self._consumed += 1
            self._drawn += 1
            yield batch

    @property
    def position(self) -> int:
        """Index of the last batch within its epoch."""
        return max(self._consumed - 1, 0)

    def state_dict(self) -> dict[str, int]:
        """The place in the stream."""
        return {"epoch": self._epoch, "consumed": self._consumed, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a place in the stream, by drawing the batches before it, random augmentations included."""
        if state["epoch"] < 0:
            return
        self._epoch = state["epoch"] - 1
        self._drawn = state["drawn"] - state["consumed"]
        self._batches = iter(())
        for _ in range(state["consumed"]):
            with self.next():
                pass

    def _first_of_next_epoch(self) -> Any:
        self._epoch += 1
        self._consumed = 0
        self._batches = iter(_reordered(self._source, self._seed + self._epoch))
        try:
            return next(self._batches)
        except StopIteration:
            raise ConfigurationError(
                "The hyper-validation data has no batch: an empty dataset, drop_last=True on less than one batch, or "
                "an iterator that can be read only once. Pass `val_dataloaders=` a loader with at least one batch."
            ) from None


def _reordered(source: Iterable[Any], seed: int) -> Iterable[Any]:
    """The same batches in the stream's own order, read by a loader of its own."""
    if not isinstance(source, DataLoader) or type(source).__iter__ is not DataLoader.__iter__:
        return source
    kept = {name: getattr(source, name) for name in _KEPT}
    if source.num_workers:
        kept["prefetch_factor"] = source.prefetch_factor
    kept["generator"] = torch.Generator().manual_seed(seed)
    if isinstance(source.dataset, IterableDataset):
        return DataLoader(source.dataset, batch_size=source.batch_size, drop_last=source.drop_last, **kept)
    if _is_plain(source):
        size = source.batch_size
        indices = _shuffled(len(source.dataset), size or 1, kept["generator"])  # type: ignore[arg-type]
        rows = _rows(source)
        if rows is not None:
            return map(rows, indices)
        batches: list[list[int]] = [at.tolist() for at in indices]
        if size is None:
            order = list(itertools.chain.from_iterable(batches))
            return DataLoader(source.dataset, batch_size=None, sampler=order, **kept)
        return DataLoader(source.dataset, batch_sampler=batches, **kept)
    if source.batch_sampler is not None:
        with preserved(source.batch_sampler):
            batches = list(itertools.islice(source.batch_sampler, _LONGEST_EPOCH))
        return DataLoader(source.dataset, batch_sampler=batches, **kept)
    with preserved(source.sampler):
        order = list(itertools.islice(source.sampler, _LONGEST_EPOCH))
    return DataLoader(source.dataset, batch_size=None, sampler=order, **kept)


def _shuffled(items: int, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Batches of indices: whole passes through the data, each in a new order."""
    # A short last batch would be a noisier measurement than the others.
    per_pass = max(items // size, min(items, 1))
    batches: list[torch.Tensor] = []
    while per_pass and len(batches) < max(_SHORTEST_EPOCH, per_pass):
        order = torch.randperm(items, generator=generator)
        batches += [order[i * size : (i + 1) * size] for i in range(per_pass)]
    return batches


def _rows(loader: DataLoader[Any]) -> Callable[[torch.Tensor], list[torch.Tensor]] | None:
    """What gives the loader's batch for a vector of indices, if its data are tensors in memory.

    A loader that goes item by item, and even one that does not, costs more than a small network's gradient.
    """
    dataset: Any = loader.dataset
    within = None
    if type(dataset) is Subset:
        dataset, within = dataset.dataset, torch.as_tensor(dataset.indices)
    in_memory = type(dataset) is TensorDataset and loader.collate_fn is default_collate
    if not in_memory or loader.batch_size is None:
        return None
    pin = loader.pin_memory and torch.cuda.is_available()

    def rows(at: torch.Tensor) -> list[torch.Tensor]:
        at = at if within is None else within[at]
        batch = [tensor[at] for tensor in dataset.tensors]
        return [tensor.pin_memory() for tensor in batch] if pin else batch

    return rows


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether batches are chunks of the data in order or shuffled, so that a new order keeps their kind."""
    if loader.batch_sampler is None:
        return isinstance(loader.sampler, (SequentialSampler, RandomSampler))
    given_by_user = loader.batch_size is None
    return not given_by_user and type(loader.sampler) in (SequentialSampler, RandomSampler)
