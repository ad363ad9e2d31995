"""A Lightning Trainer for a trial. Needs Lightning and the callbacks, and is imported only to build one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from hypergrad.callbacks import TrialPruning

if TYPE_CHECKING:
    from hypergrad.search.trial import Trial


class TrialLogger(TensorBoardLogger):
    """TensorBoard in the trial's folder; the last value of everything goes into the trial's record."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        super().__init__(save_dir=folder, name="", version="", default_hp_metric=False)
        self._trial = trial

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Keep them for `hparams.yaml`. The study writes TensorBoard's record, and only the first one counts there."""
        self.hparams.update(params if isinstance(params, Mapping) else vars(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, and remember the last values."""
        super().log_metrics(metrics, step)
        self._trial.keep({k: v for k, v in metrics.items() if k != "epoch"}, logged=True)


class TrialCheckpoint(ModelCheckpoint):
    """What the trial is continued from. A class of its own, so that a `ModelCheckpoint` of the user's can be beside it:
    Lightning tells their states apart by class and arguments.
    """


class TrialWiring(pl.Callback):
    """Callback metrics into the trial's record; the trial's own hyperparameters onto a checkpoint of another one."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._fresh: list[list[dict[str, Any]]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """The optimizers are as `configure_optimizers` made them; a checkpoint will overwrite that."""
        self._fresh = [[_settings(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """After the checkpoint of another trial: its weights, but our learning rate, weight decay and so on."""
        self._trial.restored()
        if not self._trial.inherited:
            return
        factors: dict[int, list[float]] = {}
        for optimizer, groups in zip(trainer.optimizers, self._fresh, strict=True):
            for group, fresh in zip(optimizer.param_groups, groups, strict=True):
                # Where a schedule is under way, what it multiplies changes and not how far it has come.
                base = group.get("initial_lr", group["lr"])
                factor = fresh["initial_lr" if "initial_lr" in fresh else "lr"] / base if base else 1.0
                factors.setdefault(id(optimizer), []).append(factor)
                rates = {"lr": group["lr"] * factor} | ({"initial_lr": base * factor} if "initial_lr" in group else {})
                group.update({**fresh, **rates})
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            scales = factors.get(id(scheduler.optimizer), [])
            if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) and len(scales) == len(scheduler.base_lrs):
                scheduler.base_lrs = [rate * scale for rate, scale in zip(scheduler.base_lrs, scales, strict=True)]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """What is not logged to a logger is kept all the same."""
        if not trainer.sanity_checking and trainer.is_global_zero:
            self._trial.keep(
                {k: v for k, v in trainer.callback_metrics.items() if k not in self._trial.logged}, logged=False
            )


def build_trainer(trial: Trial, kwargs: dict[str, Any]) -> pl.Trainer:
    """See `Trial.trainer`."""
    callbacks = kwargs.pop("callbacks", None) or []
    callbacks = [TrialWiring(trial), *(callbacks if isinstance(callbacks, (list, tuple)) else [callbacks])]
    if not any(isinstance(callback, TrialPruning) for callback in callbacks):
        callbacks.append(TrialPruning(trial, trial.monitor, required=trial.prunes))
    if kwargs.get("enable_checkpointing") is not False:
        callbacks.append(
            TrialCheckpoint(
                dirpath=trial.folder / "checkpoints",
                filename="last",
                save_on_train_epoch_end=True,  # after validation: what was reported is in it
                enable_version_counter=False,
            )
        )
    defaults: dict[str, Any] = {
        "default_root_dir": trial.folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": _loggers(trial, kwargs.pop("logger", True)),
    }
    if not torch.cuda.is_available() and kwargs.get("accelerator", "auto") == "auto" and "devices" not in kwargs:
        defaults["devices"] = 1  # Lightning's default is one process, and says so in many words
    return pl.Trainer(**{**defaults, **kwargs}, callbacks=callbacks)


def _loggers(trial: Trial, given: Any) -> Any:
    if given is False:
        return False
    ours = TrialLogger(trial, trial.folder)
    if given is True or given is None:
        return ours
    return [ours, *(given if isinstance(given, (list, tuple)) else [given])]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, (int, float, bool, tuple))}
