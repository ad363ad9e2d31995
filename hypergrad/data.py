"""Splits that keep apart what trains, what tunes, what selects and what judges."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence, Sized
from typing import TypeVar

import numpy as np
from torch.utils.data import Dataset, Subset

from hypergrad.errors import ConfigurationError

ItemT = TypeVar("ItemT")


def split(
    dataset: Dataset[ItemT],
    fractions: Sequence[float],
    *,
    stratify: Iterable[object] | None = None,
    seed: int = 0,
) -> list[Subset[ItemT]]:
    """Disjoint random subsets that together are the whole dataset.

    Args:
        dataset: a map-style dataset of n items.
        fractions: one share per subset, each positive, summing to 1: for instance `(0.6, 0.1, 0.1, 0.2)` for
            train, hyper-validation, validation and test.
        stratify: n labels (any hashable, or a tensor or array of shape `(n,)`); every subset gets its share of
            every class, to within one item. None splits at random.
        seed: the same seed gives the same subsets, whatever the global RNG streams do.

    Raises:
        ConfigurationError: for a dataset without a length, fractions that are not positive or do not sum to 1, a
            seed that is no integer of at least 0, labels of another length or that are none, or a subset that would be
            empty.

    >>> train, hyper, test = split(range(10), (0.6, 0.2, 0.2), stratify="aaaaabbbbb")
    >>> [len(part) for part in (train, hyper, test)]
    [6, 2, 2]
    """
    if not isinstance(dataset, Sized):
        raise ConfigurationError(
            f"`split` needs a dataset of known length, but got {dataset!r}: a stream must be split where it is made."
        )
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigurationError(f"`seed` must be an integer of at least 0, but got {seed!r}.")
    size = len(dataset)
    try:
        shares = [float(f) for f in fractions]
    except (TypeError, ValueError):
        raise ConfigurationError(f"`fractions` must be numbers such as (0.8, 0.2), but got {fractions!r}.") from None
    if not shares or any(not f > 0.0 for f in shares) or abs(sum(shares) - 1.0) > 1e-6:
        raise ConfigurationError(f"`fractions` must be positive and sum to 1, but got {tuple(fractions)}.")
    labels = _codes(stratify, size)
    generator = np.random.default_rng(seed)
    order = generator.permutation(size)
    # Within its class, every item has a position in (0, 1), evenly spread; the subset follows from the position.
    order = order[np.argsort(labels[order], kind="stable")]
    edges = np.cumsum(shares)[:-1]
    position = _even_positions(labels[order], generator)
    part = np.searchsorted(edges, position, side="right")
    subsets = [Subset(dataset, sorted(order[part == i].tolist())) for i in range(len(shares))]
    for share, subset in zip(shares, subsets, strict=True):
        if len(subset) == 0:
            raise ConfigurationError(f"A subset with share {share} of {size} items is empty: take a larger share.")
    return subsets


def _codes(stratify: Iterable[object] | None, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    if stratify is None:
        return np.zeros(size, dtype=np.int64)
    try:
        labels = [getattr(label, "item", lambda label=label: label)() for label in stratify]
        codes = {label: code for code, label in enumerate(dict.fromkeys(labels))}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"`stratify` must be a sequence of labels, one hashable value per item, but got "
            f"{reprlib.repr(stratify)}: {error}."
        ) from None
    if len(labels) != size:
        raise ConfigurationError(f"`stratify` needs one label per item: {size}, but got {len(labels)}.")
    return np.array([codes[label] for label in labels], dtype=np.int64)


def _even_positions(
    sorted_labels: np.ndarray[tuple[int], np.dtype[np.int64]], generator: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    classes, start, count = np.unique(sorted_labels, return_index=True, return_counts=True)
    within = np.arange(len(sorted_labels)) - np.repeat(start, count)
    # Classes start at evenly spread places (golden ratio), so that small ones do not all favour the same subset.
    start_at = (generator.random() + generator.permutation(len(classes)) * 0.6180339887498949) % 1.0
    offset = np.repeat(start_at, count)
    return np.asarray((within + offset) / np.repeat(count, count), dtype=np.float64)
