"""Stops the trainings of a study that are not worth finishing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from hypergrad import ConfigurationError
from hypergrad.search import Trial, current_trial


class TrialPruning(pl.Callback):
    """Reports a metric to the study and ends the fit, gracefully, when the study says so.

    `trainer.should_stop` ends it: the epoch is finished, all hooks run, the last checkpoint is written. The trial is
    then recorded as pruned whatever `train` returns. Not-a-number and infinity are always pruned. Under DDP rank 0
    reports what it sees (log with `sync_dist=True` for the mean over ranks), and all ranks hear the same answer.

    `trial.trainer(...)` adds one with the study's metric, once an epoch; list your own for another metric or rhythm.

    Args:
        trial: None takes the trial that this process runs; outside a study nothing is reported.
        monitor: the key of a logged metric. None takes the study's.
        every_n_epochs: report after every n-th epoch's validation, as step 1, 2, …: the epochs trained. At least 1.
        every_n_steps: report after every n-th optimizer step instead, as that step, what was logged with
            `on_step=True`. At least 1.
        required: whether the metric's absence is an error; if not, nothing is reported as long as it is absent.

    Raises:
        ConfigurationError: for a rhythm that is out of range; during fit, if there is no such metric when it is due.
    """

    def __init__(
        self,
        trial: Trial | None = None,
        monitor: str | None = None,
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        required: bool = True,
    ) -> None:
        if every_n_epochs is not None and every_n_steps is not None:
            raise ConfigurationError(f"Give one of {every_n_epochs=} and {every_n_steps=}.")
        for name, every in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
                raise ConfigurationError(f"`{name}` must be an integer of at least 1, but got {every!r}.")
        if trial is not None and not isinstance(trial, Trial):
            raise ConfigurationError(f"`trial` must be the Trial that train was called with, but got {trial!r}.")
        if monitor is not None and not isinstance(monitor, str):
            raise ConfigurationError(f"`monitor` must be the key of a logged metric, but got {monitor!r}.")
        self._trial = trial
        self._monitor = monitor
        self._every_n_epochs = 1 if every_n_epochs is None and every_n_steps is None else every_n_epochs
        self._every_n_steps = every_n_steps
        self._required = required
        self._reported = -1

    def on_fit_start(self, *_: Any) -> None:
        """Find the trial."""
        self._trial = self._trial or current_trial()
        self._reported = -1

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Report the epoch's value."""
        every, done = self._every_n_epochs, trainer.current_epoch + 1
        if trainer.state.fn == "fit" and not trainer.sanity_checking and every is not None and done % every == 0:
            self._report(trainer, done)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Report the step's value."""
        every, done = self._every_n_steps, trainer.global_step
        if every is not None and done % every == 0 and done != self._reported:
            self._report(trainer, done)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """A metric that never came is a mistake, whatever the rhythm."""
        if self._trial is not None and self._required and self._reported < 0 and trainer.global_step > 0:
            key = self._monitor or self._trial.monitor
            raise ConfigurationError(
                f"The fit is over and {key!r} was never reported: there was no validation, or it is too short for "
                f"every_n_epochs={self._every_n_epochs}, every_n_steps={self._every_n_steps}."
            )

    def _report(self, trainer: pl.Trainer, step: int) -> None:
        if self._trial is None:
            return
        key = self._monitor or self._trial.monitor
        value = trainer.callback_metrics.get(key)
        if value is None:
            if self._required:
                raise ConfigurationError(
                    f"{key!r} is not among the logged metrics {sorted(trainer.callback_metrics)}: log it in "
                    "validation_step, or name another one by Study(..., monitor=...) or TrialPruning(monitor=...)."
                )
            return
        self._reported = step
        stop = False
        if trainer.is_global_zero:
            stop = not self._trial.report(torch.as_tensor(value).float().mean().item(), step)
        if trainer.strategy.broadcast(stop, src=0):
            trainer.should_stop = True
