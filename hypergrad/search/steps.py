"""Equal steps as a sequence that takes no memory, however many they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload


class Steps(Sequence[float]):
    """The numbers low, low + step, …, `count` of them.

    >>> list(Steps(0.0, 0.5, 3))
    [0.0, 0.5, 1.0]
    """

    def __init__(self, low: float, step: float, count: int) -> None:
        self._low, self._step, self._indices = low, step, range(count)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> list[float]: ...
    def __getitem__(self, index: int | slice) -> float | list[float]:
        """One number, or a list of them."""
        if isinstance(index, slice):
            return [self._low + i * self._step for i in self._indices[index]]
        return self._low + self._indices[index] * self._step
