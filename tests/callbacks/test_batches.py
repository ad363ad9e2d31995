"""The stream of hyper-validation batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Subset, TensorDataset

from hypergrad import ConfigurationError
from hypergrad.callbacks._batches import BatchStream

ITEMS = TensorDataset(torch.arange(10.0))


def _values(stream: BatchStream, n: int) -> list[list[float]]:
    return [_next(stream)[0].tolist() for _ in range(n)]


def _next(stream: BatchStream) -> Any:
    with stream.next() as batch:
        return batch


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.tensor(float(i)),) for i in range(6)])


def _loaders() -> dict[str, Any]:
    return {
        "in order": DataLoader(ITEMS, batch_size=3),
        "shuffled": DataLoader(ITEMS, batch_size=3, shuffle=True),
        "own generator": DataLoader(ITEMS, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(4)),
        "weighted": DataLoader(ITEMS, batch_size=3, sampler=torch.utils.data.WeightedRandomSampler([1.0] * 10, 10)),
        "batch sampler": DataLoader(
            ITEMS, batch_sampler=BatchSampler(RandomSampler(ITEMS, generator=torch.Generator()), 3, drop_last=False)
        ),
        "no batching": DataLoader(ITEMS, batch_size=None),
        "iterable": DataLoader(Stream(), batch_size=2),
        "list": [(torch.tensor([float(i)]),) for i in range(4)],
        "workers": DataLoader(ITEMS, batch_size=3, num_workers=1, persistent_workers=True),
    }


@pytest.mark.parametrize("name", _loaders())
def test_is_endless_reproducible_resumable_and_disturbs_nobody(name: str) -> None:
    state = torch.get_rng_state()
    n = 5 if name == "workers" else 13
    whole = _values(BatchStream(_loaders()[name], seed=3), n)
    again = BatchStream(_loaders()[name], seed=3)
    assert _values(again, 4) == whole[:4]
    resumed = BatchStream(_loaders()[name], seed=3)
    resumed.load_state_dict(again.state_dict())
    assert resumed.position == again.position
    assert _values(resumed, n - 4) == whole[4:]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["own generator", "batch sampler"])
def test_the_loaders_own_order_is_not_advanced(name: str) -> None:
    used, untouched = (_loaders()[name] for _ in range(2))
    _values(BatchStream(used, seed=0), 7)
    if name == "batch sampler":  # a generator without a seed is still one stream
        untouched.batch_sampler.sampler.generator.set_state(used.batch_sampler.sampler.generator.get_state())
        torch.testing.assert_close(used.batch_sampler.sampler.generator.get_state(), torch.Generator().get_state())
    assert [b[0].tolist() for b in used] == [b[0].tolist() for b in untouched]


def test_a_sampler_with_a_generator_of_its_own_is_not_advanced() -> None:
    def loader() -> DataLoader[Any]:
        sampler = torch.utils.data.WeightedRandomSampler([1.0] * 10, 10, generator=torch.Generator().manual_seed(1))
        return DataLoader(ITEMS, batch_size=3, sampler=sampler)

    used, untouched = loader(), loader()
    _values(BatchStream(used, seed=0), 9)
    assert [b[0].tolist() for b in used] == [b[0].tolist() for b in untouched]


def test_a_batch_sampler_over_data_in_order_gives_whole_batches() -> None:
    pairs = TensorDataset(torch.arange(10.0), torch.arange(10))
    loader = DataLoader(
        pairs, batch_sampler=BatchSampler(torch.utils.data.SequentialSampler(pairs), 4, drop_last=False)
    )
    stream = BatchStream(loader, seed=0)
    assert [[t.tolist() for t in _next(stream)] for _ in range(3)] == [[t.tolist() for t in b] for b in loader]


def test_a_loader_with_an_iteration_of_its_own_keeps_it() -> None:
    class Reversed(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter(list(super().__iter__())[::-1])

    loader = Reversed(ITEMS, batch_size=5)
    assert _values(BatchStream(loader, seed=0), 2) == [b[0].tolist() for b in loader]


def test_data_in_order_is_shuffled_anew_in_every_epoch_without_short_batches() -> None:
    values = _values(BatchStream(DataLoader(ITEMS, batch_size=3), seed=0), 6)
    assert all(len(batch) == 3 for batch in values)
    assert sorted(values[0] + values[1] + values[2]) != values[0] + values[1] + values[2]
    assert values[:3] != values[3:]
    assert len({v for batch in values[:3] for v in batch}) == 9


@pytest.mark.parametrize("workers", [0, 1])
def test_tensors_in_memory_give_the_batches_that_their_loader_gives(workers: int) -> None:
    pairs = TensorDataset(torch.rand(7, 2, 3), torch.arange(7))
    for dataset in (pairs, Subset(pairs, [5, 2, 2, 0])):
        loader = DataLoader(dataset, batch_size=4 if dataset is pairs else 2, num_workers=workers)
        batch = _next(BatchStream(loader, seed=0))
        assert type(batch) is type(next(iter(loader)))
        for row in zip(*batch, strict=True):
            items = [item for item in dataset if torch.equal(item[1], row[1])]
            assert torch.equal(items[0][0], row[0])
        assert batch[1].dtype == torch.int64


def test_less_than_one_batch_is_used_as_it_is() -> None:
    (batch,) = _values(BatchStream(DataLoader(Subset(ITEMS, [1, 2]), batch_size=8, drop_last=True), seed=0), 1)
    assert sorted(batch) == [1.0, 2.0]


@pytest.mark.parametrize("source", [[], DataLoader(Subset(ITEMS, [])), DataLoader(Subset(ITEMS, []), batch_size=None)])
def test_no_batch_is_an_error(source: Any) -> None:
    with pytest.raises(ConfigurationError, match="has no batch"):
        _next(BatchStream(source, seed=0))


def test_an_iterator_that_can_be_read_once_says_so_when_it_runs_out() -> None:
    stream = BatchStream(iter([(torch.zeros(1),)]), seed=0)
    _next(stream)
    with pytest.raises(ConfigurationError, match="read only once"):
        _next(stream)
