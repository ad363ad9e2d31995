"""How sure a sequence of noisy measurements is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass
class SignalToNoise:
    """|mean| / standard deviation of a sequence, over an exponential window of about 20 values.

    Around 0: noise only. Above 1: the sign can be trusted from one value to the next.

    Args:
        mean, square: exponential sums of the values and of their squares.
        weight: the sum of the window's weights so far, in [0, 1).

    >>> signal = SignalToNoise()
    >>> for value in (1.0, 2.0, 3.0):
    ...     signal.add(value)
    >>> round(signal.value, 2)
    2.49
    """

    mean: float = 0.0
    square: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        """Take in the next value."""
        self.mean += 0.05 * (value - self.mean)
        self.square += 0.05 * (value * value - self.square)
        self.weight += 0.05 * (1.0 - self.weight)

    @property
    def value(self) -> float:
        """The ratio; 0 before the second value and where nothing was ever different from 0."""
        if self.weight < 0.06:
            return 0.0
        mean, square = self.mean / self.weight, self.square / self.weight
        deviation = math.sqrt(max(square - mean * mean, 0.0))
        return abs(mean) / deviation if deviation > 0.0 else (math.inf if mean else 0.0)

    def state_dict(self) -> dict[str, float]:
        """The three sums."""
        return asdict(self)
