"""Splits are disjoint, complete, stratified and reproducible."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import TensorDataset

from hypergrad import ConfigurationError, split


def _labels(n: int) -> torch.Tensor:
    return torch.randint(0, 7, (n,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("n", [97, 1000])
def test_disjoint_and_complete_with_the_asked_shares(n: int, stratified: bool) -> None:
    labels = _labels(n)
    dataset = TensorDataset(torch.arange(n), labels)
    fractions = (0.6, 0.1, 0.1, 0.2)
    parts = split(dataset, fractions, stratify=labels if stratified else None)
    indices = [i for part in parts for i in part.indices]
    assert sorted(indices) == list(range(n))
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * n) <= (7 if stratified else 1)
        if stratified:
            total, mine = Counter(labels.tolist()), Counter(int(part[i][1]) for i in range(len(part)))
            assert all(abs(mine[c] - fraction * total[c]) <= 1 for c in total)


def test_the_seed_alone_decides() -> None:
    dataset = TensorDataset(torch.arange(50))
    torch.manual_seed(1)
    a = split(dataset, (0.5, 0.5), seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b = split(dataset, (0.5, 0.5), seed=3)
    assert [p.indices for p in a] == [p.indices for p in b]
    assert [p.indices for p in a] != [p.indices for p in split(dataset, (0.5, 0.5), seed=4)]
    assert torch.equal(state, torch.get_rng_state())


def test_many_tiny_classes_do_not_all_go_to_one_subset() -> None:
    train, test = split(range(200), (0.5, 0.5), stratify=range(200))
    assert 90 <= len(train) <= 110
    assert len(test) == 200 - len(train)


def test_the_seed_decides_for_tiny_classes_too() -> None:
    a, b = (split(range(40), (0.5, 0.5), stratify=range(40), seed=seed)[0].indices for seed in (0, 1))
    assert a != b


@pytest.mark.parametrize("fractions", [(), (0.5,), (0.5, 0.6), (1.2, -0.2), (0.5, 0.5, 0.0), (float("nan"), 1.0)])
def test_bad_fractions_are_named(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sum to 1, but got"):
        split(range(10), fractions)


def test_other_arguments_that_cannot_be_meant() -> None:
    with pytest.raises(ConfigurationError, match=r"must be numbers such as .*but got 0\.5"):
        split(range(10), 0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"must be numbers such as .*but got 'ab'"):
        split(range(10), "ab")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="known length, but got"):
        split(iter(range(10)), (0.5, 0.5))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="at least 0, but got -1"):
        split(range(10), (0.5, 0.5), seed=-1)
    with pytest.raises(ConfigurationError, match="an integer of at least 0, but got 'a'"):
        split(range(10), (0.5, 0.5), seed="a")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="a sequence of labels, one hashable value per item, but got 5"):
        split(range(10), (0.5, 0.5), stratify=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="one hashable value per item"):
        split(range(10), (0.5, 0.5), stratify=[[0], [1]] * 5)
    with pytest.raises(ConfigurationError, match="one hashable value per item"):
        split(range(10), (0.5, 0.5), stratify=torch.zeros(10, 3))


def test_a_subset_without_items_and_labels_of_another_length_are_errors() -> None:
    with pytest.raises(ValueError, match="is empty"):
        split(range(3), (0.9, 0.1))
    with pytest.raises(ValueError, match="one label per item: 10, but got 9"):
        split(range(10), (0.5, 0.5), stratify=range(9))
