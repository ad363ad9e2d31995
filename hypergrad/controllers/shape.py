"""The shape of the learning rate over a run, as a factor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from hypergrad.errors import ConfigurationError


class Shape(ABC):
    """A factor on the learning rate, by the share of the run that has passed."""

    @abstractmethod
    def factor(self, progress: float) -> float:
        """The factor, in [0, 1], at a progress in [0, 1]."""


@dataclass(frozen=True)
class Cosine(Shape):
    """(1 + cos(pi * progress)) / 2: Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts.

    Args:
        floor: the factor at the end, in [0, 1].

    Raises:
        ConfigurationError: for a floor outside [0, 1].

    >>> [round(Cosine().factor(p), 2) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor <= 1.0:
            raise ConfigurationError(f"`floor` must lie in [0, 1], but got {self.floor!r}.")

    def factor(self, progress: float) -> float:
        """See `Shape.factor`."""
        half = 0.5 + 0.5 * math.cos(math.pi * min(max(progress, 0.0), 1.0))
        return self.floor + (1.0 - self.floor) * half


@dataclass(frozen=True)
class Linear(Shape):
    """1 - progress, from 1 to 0: Defazio et al. 2023, "Optimal linear decay learning rate schedules", section 2.

    >>> [Linear().factor(p) for p in (0.0, 0.25, 1.0)]
    [1.0, 0.75, 0.0]
    """

    def factor(self, progress: float) -> float:
        """See `Shape.factor`."""
        return 1.0 - min(max(progress, 0.0), 1.0)
