"""Early stopping that says why, by several criteria, and can go back to the best weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from hypergrad import ConfigurationError
from hypergrad.callbacks.stopping_criteria import Patience, StoppingCriterion
from hypergrad.search import current_trial


class EarlyStopping(pl.Callback):
    """Ends the fit once a criterion says so, at the end of an epoch with validation.

    Args:
        monitor: the key of a logged metric.
        criterion: a rule, or several, of which the first to stop stops. Default: `Patience(3)`. A second fit starts
            with fresh ones.
        mode: `"min"` if a smaller value is better, `"max"` if a larger one is. Criteria by ratios need `"min"`.
        train_monitor: the key of the training error, for `ProgressQuotient`: logged with `on_epoch=True`.
        restore_best_weights: at the end of training load the module's weights and buffers of the best epoch. They are
            kept in memory and in checkpoints. `trainer.callback_metrics` still are the last epoch's: see `best_score`.
        check_finite: stop when the monitored value is not a number or infinite.
        stopping_threshold: stop when the value is better than this.
        divergence_threshold: stop when the value is worse than this.

    Under DDP all ranks decide by the value that rank 0 sees; log with `sync_dist=True` for the mean over ranks.
    In a trial, `reason` becomes the reason in the trial's record.

    Raises:
        ConfigurationError: for arguments that do not fit; during fit, if the metric is absent, or the strategy shards
            the weights that are to be restored.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        criterion: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
        *,
        mode: Literal["min", "max"] = "min",
        train_monitor: str = "train_loss",
        restore_best_weights: bool = False,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        chosen = Patience(3) if criterion is None else criterion
        criteria = (chosen,) if isinstance(chosen, StoppingCriterion) else tuple(chosen)
        if not criteria or not all(isinstance(c, StoppingCriterion) for c in criteria):
            raise ConfigurationError(
                f"`criterion` must be a StoppingCriterion or several of them, but got {criterion!r}."
            )
        if mode not in ("min", "max"):
            raise ConfigurationError(f"`mode` must be 'min' or 'max', but got {mode!r}.")
        for name, key in (("monitor", monitor), ("train_monitor", train_monitor)):
            if not isinstance(key, str):
                raise ConfigurationError(f"`{name}` must be the key of a logged metric, but got {key!r}.")
        ratios = [type(c).__name__ for c in criteria if c.needs_positive]
        if mode == "max" and ratios:
            raise ConfigurationError(f"{ratios} compare errors by their ratio and need mode='min': monitor an error.")
        self.monitor, self.mode, self.train_monitor = monitor, mode, train_monitor
        self.restore_best_weights, self.check_finite = restore_best_weights, check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self._fresh = criteria
        self._criteria: tuple[StoppingCriterion, ...] = copy.deepcopy(criteria)
        self._validated = self._restored = False
        self._start()

    def _start(self) -> None:
        self._criteria = copy.deepcopy(self._fresh)
        self._reason: str | None = None
        self._best: float | None = None
        self._best_epoch: int | None = None
        self._weights: dict[str, torch.Tensor] | None = None

    @property
    def reason(self) -> str | None:
        """Why training was stopped; None if it was not."""
        return self._reason

    @property
    def best_score(self) -> float | None:
        """The best value so far, None before the first."""
        return self._best

    @property
    def best_epoch(self) -> int | None:
        """The epoch, from 0, of `best_score`."""
        return self._best_epoch

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Start afresh, unless a checkpoint has been loaded."""
        if not self._restored:
            self._start()
        self._restored = False
        # By exact class: strategies that shard derive from these.
        if self.restore_best_weights and type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
            raise ConfigurationError(
                f"restore_best_weights=True keeps whole weights, which {type(trainer.strategy).__name__} may shard: "
                "use ModelCheckpoint(monitor=...) and load its best_model_path."
            )

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """There is something new to decide by."""
        self._validated = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide; by then the training metrics of the epoch are known as well."""
        if not self._validated:
            return
        self._validated = False
        value = self._value(trainer, self.monitor)
        if value is None:
            raise ConfigurationError(
                f"{self.monitor!r} is not among the logged metrics {sorted(trainer.callback_metrics)}: log it in "
                "validation_step, or name another one by EarlyStopping(monitor=...)."
            )
        self._remember_best(value, trainer.current_epoch, pl_module)
        reason = self._decide(value, self._value(trainer, self.train_monitor))
        if reason is not None:
            self._reason = f"early stopping after epoch {trainer.current_epoch}: {self.monitor}: {reason}"
            rank_zero_info(self._reason)
            trainer.should_stop = True
            trial = current_trial()
            if trial is not None:
                trial.reason = self._reason

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Go back to the best weights, if asked for."""
        if self._weights is not None:
            pl_module.load_state_dict(self._weights)
            rank_zero_info(f"The weights are those of epoch {self._best_epoch}, {self.monitor} = {self._best:g}.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """What a checkpoint brought is for the fit, the validation or the test that loaded it."""
        self._restored = False

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to decide on after a checkpoint as if nothing had happened."""
        return {
            "criteria": [criterion.state_dict() for criterion in self._criteria],
            "best": self._best,
            "best_epoch": self._best_epoch,
            "weights": self._weights,
            "reason": self._reason,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._start()
        for criterion, state in zip(self._criteria, state_dict["criteria"], strict=True):
            criterion.load_state_dict(state)
        self._best, self._best_epoch = state_dict["best"], state_dict["best_epoch"]
        self._weights, self._reason = state_dict["weights"], state_dict["reason"]
        self._restored = True

    def _value(self, trainer: pl.Trainer, key: str) -> float | None:
        value = trainer.callback_metrics.get(key)
        number = None if value is None else torch.as_tensor(value).float().mean().item()
        found: float | None = trainer.strategy.broadcast(number, src=0)
        return found

    def _remember_best(self, value: float, epoch: int, module: pl.LightningModule) -> None:
        sign = 1.0 if self.mode == "min" else -1.0
        if math.isfinite(value) and (self._best is None or sign * value < sign * self._best):
            self._best, self._best_epoch = value, epoch
            if self.restore_best_weights:
                self._weights = {key: tensor.detach().cpu().clone() for key, tensor in module.state_dict().items()}

    def _decide(self, value: float, training: float | None) -> str | None:
        if not math.isfinite(value):
            return f"the value is {value}" if self.check_finite else None
        sign = 1.0 if self.mode == "min" else -1.0
        if self.stopping_threshold is not None and sign * value < sign * self.stopping_threshold:
            return f"{value:g} is better than stopping_threshold={self.stopping_threshold:g}"
        if self.divergence_threshold is not None and sign * value > sign * self.divergence_threshold:
            return f"{value:g} is worse than divergence_threshold={self.divergence_threshold:g}"
        # All of them see every value, also once one has decided.
        reasons = [c.update(sign * value, training if c.needs_training else None) for c in self._criteria]
        return next((reason for reason in reasons if reason is not None), None)
