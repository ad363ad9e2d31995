"""When a run that has blown up goes back to where it was still well."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypergrad.errors import ConfigurationError


@dataclass(frozen=True)
class Rewind:
    """Lowering a learning rate that is too high does not mend the weights: they are put back as well.

    A loss is taken to have blown up if it is no number, or above `limit` times the size of the first one plus 3. The
    run then goes back to its last good state, weights, buffers and optimizer state, and on with learning rates that are
    `shrink` times smaller; batches, schedules and step counts go on.

    Args:
        limit: at least 1.
        shrink: above 1.
        times: rewinds at most; after that nothing more is tried.

    Raises:
        ConfigurationError: for a value outside its range.

    >>> [Rewind().has_blown_up(loss, first=1.0) for loss in (2.0, 7.1, math.nan)]
    [False, True, True]
    """

    limit: float = 4.0
    shrink: float = 3.0
    times: int = 5

    def __post_init__(self) -> None:
        for name, value, least in (("limit", self.limit, 1.0), ("shrink", self.shrink, 1.0 + 1e-6)):
            if not (math.isfinite(value) and value >= least):
                raise ConfigurationError(f"`{name}` must be at least {least:g}, but got {value!r}.")
        if isinstance(self.times, bool) or not isinstance(self.times, int) or self.times < 1:
            raise ConfigurationError(f"`times` must be an integer of at least 1, but got {self.times!r}.")

    def has_blown_up(self, loss: float, first: float) -> bool:
        """Whether a validation loss, the lower the better, is beyond what training does by itself."""
        return not loss <= self.limit * abs(first) + 3.0
