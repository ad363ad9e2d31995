"""Which weights a run ends with: the best of some checkpoints, raw or averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypergrad.errors import ConfigurationError

_SAMPLES = 32  # states that the average's window holds


@dataclass(frozen=True)
class Readout:
    """The best of evenly spaced checkpoints, each as it stands and averaged, by the validation loss.

    The average is exponential, of every few steps, with a window of a share of the run, and over the run so far while
    that is shorter: Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging". It is kept for
    buffers of floating point too, so that running statistics fit the weights.

    Args:
        checkpoints: how many, at least 1; the last is the end of the run.
        window: of the average, as a share of the run, in (0, 1].
        batches: validation batches that each is judged on, the same ones every time; None takes what the budget allows.

    Raises:
        ConfigurationError: for a value outside its range.
    """

    checkpoints: int = 20
    window: float = 0.1
    batches: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("checkpoints", self.checkpoints), ("batches", self.batches)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"`{name}` must be an integer of at least 1, but got {value!r}.")
        if not 0.0 < self.window <= 1.0:
            raise ConfigurationError(f"`window` must lie in (0, 1], but got {self.window!r}.")

    def is_due(self, step: int, steps: int) -> bool:
        """Whether there is a checkpoint after this step, of so many in all.

        >>> [step for step in range(1, 11) if Readout(checkpoints=3).is_due(step, 10)]
        [4, 7, 10]
        """
        return step * self.checkpoints // steps > (step - 1) * self.checkpoints // steps

    def stride(self, steps: int) -> int:
        """Steps between two states of the average: some thirty in a window smooth as well as all of them.

        >>> Readout(window=0.1).stride(400), Readout(window=0.1).stride(10_000)
        (1, 31)
        """
        return max(int(self.window * steps / _SAMPLES), 1)

    def weight(self, averaged: int, steps: int) -> float:
        """The weight of the newest of so many averaged states, in a run of so many steps."""
        return max(1.0 / averaged, min(self.stride(steps) / (self.window * steps), 1.0))


@dataclass
class Best:
    """The lowest score so far and what it was of. Scores that are no numbers do not count.

    >>> best = Best()
    >>> best.beaten_by(0.3, "raw", 10), best.beaten_by(math.nan, "raw", 20), best.beaten_by(0.4, "averaged", 20)
    (True, False, False)
    >>> best.kind, best.step
    ('raw', 10)
    """

    score: float = math.inf
    kind: str = ""
    step: int = 0

    def beaten_by(self, score: float, kind: str, step: int) -> bool:
        """Whether this score is the new best."""
        if not score < self.score:
            return False
        self.score, self.kind, self.step = score, kind, step
        return True
