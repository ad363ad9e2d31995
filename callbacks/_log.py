"""What reaches the Trainer's loggers, and when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import lightning.pytorch as pl

from hypergrad.callbacks._history import Update
from hypergrad.callbacks._lightning import log_scalars


class Log:
    """Writes updates as often as the Trainer logs, and the last one in any case: the end of a curve is what counts.

    Args:
        at: the step of what was written last; 0 for nothing yet.
    """

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def updated(self, trainer: pl.Trainer, update: Update) -> None:
        """There is an update: write it if it is time."""
        every = _every(trainer)
        if every > 0 and (update.step - self.at >= every or not self.at):
            self._write(trainer, update)

    def ended(self, trainer: pl.Trainer, history: Sequence[Update]) -> None:
        """There will be no more of them."""
        if _every(trainer) > 0 and history and history[-1].step > self.at:
            self._write(trainer, history[-1])

    def found(self, trainer: pl.Trainer, news: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Write scalars by tag, each at its step."""
        for step, scalars in news:
            for logger in trainer.loggers:
                log_scalars(logger, scalars, step)

    def _write(self, trainer: pl.Trainer, update: Update) -> None:
        self.at = update.step
        self.found(trainer, [(update.step, update.scalars())])


def _every(trainer: pl.Trainer) -> int:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every
