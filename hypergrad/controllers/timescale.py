"""Where weight decay starts, once learning rate and length of a run are known."""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad.errors import ConfigurationError


@dataclass(frozen=True)
class Timescale:
    """The weight decay at which weights forget their past within a share of the run.

    Where a step multiplies weights by `1 - lr * weight_decay`, they are an exponential mean of the updates of the last
    `1 / (lr * weight_decay)` steps: Wang & Aitchison 2024, "How to set AdamW's weight decay as you scale model and
    dataset size", section 2. They find that the best such timescale, counted in passes through the data, hardly depends
    on model and data, where the best weight decay itself goes over orders of magnitude. So a run that has found its
    learning rate knows weight decay roughly, and hypergradients move it from there.

    Args:
        share: of the run's steps, in (0, 1].

    Raises:
        ConfigurationError: for a share outside its range.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigurationError(f"`share` must lie in (0, 1], but got {self.share!r}.")

    def weight_decay(self, lr: float, steps: int) -> float:
        """The weight decay for a learning rate, such that a step multiplies by `1 - lr * weight_decay`.

        Args:
            lr: at the peak of its schedule, positive.
            steps: of the whole run.

        >>> Timescale().weight_decay(lr=0.25, steps=160)
        0.25
        """
        return 1.0 / (lr * self.share * steps)
