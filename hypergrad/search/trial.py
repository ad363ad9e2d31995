"""A trial as `train` sees it, in the process that runs it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hypergrad.errors import ConfigurationError
from hypergrad.search.checkpoint import Checkpoint
from hypergrad.search.messages import Job, Report, Verdict
from hypergrad.search.seeding import derived_seed

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger("hypergrad.search")


class Channel(Protocol):
    """The way to the driver."""

    def begin(self) -> None:
        """Say that `train` is called next."""

    def ask(self, report: Report) -> Verdict:
        """Report, and wait for the answer."""


class Trial:
    """The point to try, where to keep things, and whom to report to. Made by `Study`, handed to `train`."""

    def __init__(self, job: Job, channel: Channel | None) -> None:
        self._job, self._channel = job, channel
        self._stopped: str | None = None
        self._continued_later = False
        self._under_way = False
        self._reason: str | None = None
        self._metrics: dict[str, float] = {}
        self._logged: set[str] = set()

    @property
    def number(self) -> int:
        """0, 1, … within the study."""
        return self._job.number

    @property
    def params(self) -> Mapping[str, Any]:
        """The values of all active parameters, constants included."""
        return self._job.params

    @property
    def seed(self) -> int:
        """Derived from the study's seed and the number; `random`, numpy and torch were seeded with it."""
        return self._job.seed

    @property
    def attempt(self) -> int:
        """1, and more when the trial is continued after it was killed, failed or interrupted."""
        return self._job.attempt

    @property
    def folder(self) -> Path:
        """A folder of the trial's own, kept between attempts."""
        return Path(self._job.folder)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to continue from, for `trainer.fit(..., ckpt_path=trial.checkpoint)`; None to begin anew.

        The last one that `trial.trainer` has written. One that is damaged, or that an earlier attempt could not be
        continued from, is not used again: the trial begins anew, and says so in its record and its `log.txt`.
        """
        checkpoint = Checkpoint(self.folder)
        path = checkpoint.usable(marked=not self._under_way)
        if checkpoint.unusable is not None:
            self._reason = self._reason or f"began anew in attempt {self.attempt}: {checkpoint.unusable}"
            log.warning("Trial %d begins anew: %s.", self.number, checkpoint.unusable)
        return path

    def restored(self) -> None:
        """Say that the training has been continued from `checkpoint`, or begun; `trial.trainer` does."""
        if not self._under_way:
            Checkpoint(self.folder).restored()
        self._under_way = True

    @property
    def monitor(self) -> str:
        """The metric that is pruned on, and, with one objective, the objective's name."""
        return self._job.prune_on

    @property
    def prunes(self) -> bool:
        """Whether somebody may stop this trial because of what it reports."""
        return self._job.prunes

    @property
    def folds_apart(self) -> bool:
        """Whether the pruner compares values of the same fold, rather than running means over folds."""
        return self._job.folds_apart

    @property
    def inherited(self) -> bool:
        """Whether the checkpoint was another trial's, whose hyperparameters are not this one's."""
        return self._job.inherited

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last value of everything recorded so far."""
        return dict(self._metrics)

    @property
    def stopped(self) -> str | None:
        """Why the trial should stop, once it should; else None."""
        return self._stopped

    @property
    def continued_later(self) -> bool:
        """Whether it was stopped only to be continued another time."""
        return self._continued_later

    def report(self, value: float | torch.Tensor, step: int) -> bool:
        """Tell the driver the metric that is pruned on; whether to go on.

        Args:
            value: a number, of the metric `monitor`. Not-a-number and infinity end the trial.
            step: how far it has come, such as epochs trained: 1, 2, … A repeated step replaces the value.

        Returns:
            False if the trial should end: pruned, or interrupted and to be continued later. What `train` returns then
            does not count.

        Raises:
            ConfigurationError: for a value that is no number, or a step that is no non-negative integer.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 1 << 63:
            raise ConfigurationError(f"`step` must be an integer of at least 0 and below 2**63, but got {step!r}.")
        number = as_number(value)
        if number is None:
            raise ConfigurationError(f"`value` must be a number or a tensor with one element, but got {value!r}.")
        if self._channel is not None and self._stopped is None:
            self.restored()
            verdict = self._channel.ask(Report(step, number))
            self._stopped, self._continued_later = verdict.stop, verdict.later
        return self._stopped is None

    def record(self, **metrics: float | torch.Tensor) -> None:
        """Keep metrics in the trial's record; a name that is given again replaces what was there."""
        self.keep(metrics, logged=False)

    def keep(self, metrics: Mapping[str, Any], *, logged: bool) -> None:
        """As `record`, from a mapping; `logged` where the values are in the trial's event files already."""
        numbers = {name: number for name, value in metrics.items() if (number := as_number(value)) is not None}
        self._metrics.update(numbers)
        if logged:
            self._logged.update(numbers)

    @property
    def logged(self) -> tuple[str, ...]:
        """The names of metrics that the trial's event files hold already."""
        return tuple(sorted(self._logged))

    @property
    def reason(self) -> str | None:
        """What will be said of the trial in its record."""
        return self._reason

    @reason.setter
    def reason(self, reason: str) -> None:
        self._reason = reason

    def fold(self, number: int) -> Trial:
        """The trial's part `number`, from 0: its own folder and seed, the same parameters, nobody to report to."""
        folder, seed = str(self.folder / f"fold-{number}"), derived_seed(self.seed, number)
        return Trial(replace(self._job, folder=folder, seed=seed, prunes=False, inherited=False), None)

    def trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Lightning `Trainer` for this trial.

        It logs to TensorBoard in the trial's folder and into the trial's record, checkpoints every epoch, so that the
        trial can be continued, is pruned by the study's pruner (once an epoch, on `monitor`; list a `TrialPruning`
        among the callbacks for another rhythm), and uses the devices that the trial has been given. No progress bar.

        Args:
            kwargs: as of `lightning.pytorch.Trainer`, and they win. `logger=False` and `enable_checkpointing=False`
                are respected; loggers and callbacks are added to.
        """
        from hypergrad.search.trainer import build_trainer  # Lightning is needed here and nowhere else

        return build_trainer(self, kwargs)

    def __repr__(self) -> str:
        return f"Trial(number={self.number}, params={dict(self.params)}, attempt={self.attempt})"


_current: Trial | None = None


def current_trial() -> Trial | None:
    """The trial that this process runs; None outside a study."""
    return _current


def set_current_trial(trial: Trial | None) -> None:
    """For workers."""
    global _current
    _current = trial


def as_number(value: object) -> float | None:
    """A real number, or a tensor or array with one element, as a float; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool):
        return None
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) is not None:
        count = value.numel() if isinstance(value, torch.Tensor) else math.prod(getattr(value, "shape", (2,)))
        return as_number(item()) if count == 1 else None
    return None
