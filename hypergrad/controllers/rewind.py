"""When a run that has blown up goes back to where it was still well."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypergrad.errors import ConfigurationError


@dataclass(frozen=True)
class Rewind:
    """Lowering a learning rate that is too high does not mend the weights: they are put back as well.

    A run is taken

    - to have blown up if its validation loss is no number, or above `limit` times the size of the first one plus 3;
    - to have relapsed if the validation loss has lost more than a share of what it had gained, and the training loss is
      above its best as well (where it is not, the run overfits, and going back would not help); or if it has lost all
      of it, or never gained anything, and the training loss has lost such a share;
    - to stand still if after a while from the start the validation loss is not below its first value, and the training
      loss has gained nothing notable.

    It then goes back to its last good state, weights, buffers and optimizer state, and on with learning rates that are
    `shrink` times smaller; batches, schedules and step counts go on. What a rate that is too high has done to weights
    need not show in the loss: a run that has relapsed goes back to its start while there is time, and one that stands
    still only then.

    Args:
        limit: at least 1.
        lost: the share, positive; `math.inf` for never. Less than a fiftieth of the first loss does not count.
        patience: share of the run's steps that it may stand still, positive; `math.inf` for ever.
        anew: share of the run's steps up to which it may go back to its start, at least 0.
        shrink: above 1.
        times: rewinds at most; after that nothing more is tried.

    Raises:
        ConfigurationError: for a value outside its range.

    >>> [Rewind().has_blown_up(loss, first=1.0) for loss in (2.0, 7.1, math.nan)]
    [False, True, True]
    """

    limit: float = 4.0
    lost: float = 0.25
    patience: float = 0.2
    anew: float = 0.4
    shrink: float = 3.0
    times: int = 5

    def __post_init__(self) -> None:
        for name, value, least in (("limit", self.limit, 1.0), ("shrink", self.shrink, 1.0 + 1e-6)):
            if not (math.isfinite(value) and value >= least):
                raise ConfigurationError(f"`{name}` must be at least {least:g}, but got {value!r}.")
        for name, value in (("lost", self.lost), ("patience", self.patience)):
            if not value > 0.0:
                raise ConfigurationError(f"`{name}` must be a positive share, but got {value!r}.")
        if not self.anew >= 0.0:
            raise ConfigurationError(f"`anew` must be a share of at least 0, but got {self.anew!r}.")
        if isinstance(self.times, bool) or not isinstance(self.times, int) or self.times < 1:
            raise ConfigurationError(f"`times` must be an integer of at least 1, but got {self.times!r}.")

    def has_blown_up(self, loss: float, first: float) -> bool:
        """Whether a validation loss, the lower the better, is beyond what training does by itself."""
        return not loss <= self.limit * abs(first) + 3.0

    def has_relapsed(self, loss: float, first: float, best: float) -> bool:
        """Whether a loss has lost most of what it had gained, and a notable amount; False while that is not known.

        >>> [Rewind().has_relapsed(loss, first=2.0, best=1.0) for loss in (1.2, 1.3, math.nan)]
        [False, True, True]
        """
        if not (math.isfinite(first) and math.isfinite(best)):
            return False
        return not loss - best <= max(self.lost * (first - best), notable(first))


def notable(first: float) -> float:
    """What a loss must change by to be no noise: a fiftieth of the first one."""
    return 0.02 * abs(first)
