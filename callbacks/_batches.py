"""An endless, resumable stream of hyper-validation batches that disturbs nobody else's data order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from hypergrad import ConfigurationError, RngStream, generators_of, preserved

# Attributes that make a DataLoader deliver the same batches; what decides their order is replaced.
_KEPT = ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
# Samplers may be endless; an epoch of the stream is not.
_LONGEST_EPOCH = 100_000


class BatchStream:
    """Draws one batch after another, epoch after epoch, from its own random streams.

    A map-style DataLoader is never iterated itself, which would advance its sampler, its generator or its
    persistent workers: another one on the same dataset is. Where the original is in order or shuffled, the stream
    reshuffles in every epoch; the order of any other sampler is kept. Other iterables, and DataLoader classes with
    an iteration of their own, are iterated as they are.

    Random generators that the dataset itself keeps are swapped for private ones while a batch is read.

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
        dataset = source.dataset if isinstance(source, DataLoader) else source
        self._rng = RngStream(seed, generators_of(dataset))
        self._batches: Iterator[Any] = iter(())

    def next(self) -> Any:
        """The next batch, as the loader delivers it (on the host)."""
        with self._rng.active():
            try:
                batch = next(self._batches)
            except StopIteration:
                batch = self._first_of_next_epoch()
        self._consumed += 1
        return batch

    @property
    def position(self) -> int:
        """Index of the last batch within its epoch."""
        return max(self._consumed - 1, 0)

    def state_dict(self) -> dict[str, int]:
        """The place in the stream."""
        return {"epoch": self._epoch, "consumed": self._consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a place in the stream, by drawing the batches before it, random augmentations included."""
        if state["epoch"] < 0:
            return
        self._epoch = state["epoch"] - 1
        self._batches = iter(())
        for _ in range(state["consumed"]):
            self.next()

    def _first_of_next_epoch(self) -> Any:
        self._epoch += 1
        self._consumed = 0
        # Reached inside `active()`: from here on the stream draws as this epoch does, whatever came before.
        self._rng.reseed(self._seed + self._epoch)
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
        items, size = len(source.dataset), source.batch_size  # type: ignore[arg-type]
        # A short last batch would be a noisier measurement than the others; torch refuses to shuffle nothing.
        drop_last = size is not None and items >= size
        return DataLoader(source.dataset, batch_size=size, shuffle=items > 0, drop_last=drop_last, **kept)
    if source.batch_sampler is not None:
        with preserved(source.batch_sampler):
            batches = list(itertools.islice(source.batch_sampler, _LONGEST_EPOCH))
        return DataLoader(source.dataset, batch_sampler=batches, **kept)
    with preserved(source.sampler):
        order = list(itertools.islice(source.sampler, _LONGEST_EPOCH))
    return DataLoader(source.dataset, batch_size=None, sampler=order, **kept)


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether batches are chunks of the data in order or shuffled, so that a new order keeps their kind."""
    if loader.batch_sampler is None:
        return isinstance(loader.sampler, (SequentialSampler, RandomSampler))
    given_by_user = loader.batch_size is None
    return not given_by_user and type(loader.sampler) in (SequentialSampler, RandomSampler)
