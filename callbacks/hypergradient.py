"""The callback: learns hyperparameters from the validation gradient while the module trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from hypergrad import (
    Best,
    ConfigurationError,
    Controller,
    Estimator,
    Hyperparameter,
    HyperparameterError,
    Online,
    OptimizerHyperparameter,
    Race,
    Readout,
    Rewind,
    Schedule,
    Shape,
    Timescale,
    Unrolled,
)
from hypergrad.callbacks._history import Update
from hypergrad.callbacks._log import Log
from hypergrad.callbacks._plan import Auto, Wishes
from hypergrad.callbacks._run import Run
from hypergrad.callbacks._settings import Name, Settings, as_tuple, check_loader
from hypergrad.callbacks._validation import USUAL_MONITOR


class HyperGradient(pl.Callback):
    """Tunes learning rate and weight decay by the gradient of the validation loss, within one training run.

    Attach it to a Trainer and train as usual; the module, its `configure_optimizers` and its data stay as they are.
    Every `every_n_steps` optimizer steps one batch of hyper-validation data goes through `validation_step`, and its
    gradient says which way each hyperparameter of the last step should have gone.

    By default, where the run is long enough (about 400 steps) and has one optimizer, the learning rate is found by a
    short race from the initial weights and follows a cosine, unless the user has a scheduler; weight decay starts where
    weights forget within a tenth of the run (SGD and decoupled weight decay); it and whatever else is learned follow
    hypergradients; a run that blows up, relapses or stands still is rewound; and the module ends with the best weights
    that were seen, raw or averaged; see `report`. Elsewhere lr follows hypergradients too, and nothing else happens.

    What is learned multiplies what an LR scheduler sets; between steps `optimizer.param_groups` hold the scheduled
    values. A weight decay that is 0 in every param group starts from 1e-5 when it first moves, where it is not placed;
    one that is 0 in some groups only is left at 0 there.

    Held constant by a hypergradient: what user code does to the weights after the step (clamping, projections), and,
    with several optimizers, the steps of the others.

    Under `strategy="ddp"` every rank draws its own hyper-validation batches and all learn the same values; with
    `"ddp_spawn"` and `"ddp_fork"`, `history` and `hyperparameters` stay in the processes that trained.

    Args:
        hyperparameters: names in the optimizer's param groups, `"lr"`, `"weight_decay"`, `"momentum"`,
            `"betas[0]"`, …, or `OptimizerHyperparameter` for a domain of your own; each param group learns its own.
            `Hyperparameter` modules of the LightningModule, for what is in its loss. None: learning rate and weight
            decay, and every `Hyperparameter` that the module has.
        estimator: how the hypergradient is computed. Default: `Online()`, one step ahead. `Forward()`, `Unrolled()`,
            `Implicit()`, and `Online()` with hyperparameters in the loss, evaluate training losses again; that is
            possible with one optimizer and automatic optimization.
        monitor: the key under which `validation_step` logs the loss. Where it logs none, what it returns is taken.
        mode: `"min"` if a smaller monitored value is better, `"max"` if a larger one is.
        val_dataloaders: the hyper-validation data, one loader. None takes the Trainer's validation data, and says
            once that the monitored number is then no longer held out.
        every_n_steps: optimizer steps between two hypergradients, at least 1. None: as many as the budget allows in a
            planned run, and 5 elsewhere. Where one batch makes several steps (manual optimization), the last of them is
            measured.
        controller: turns hypergradients into moves; `Hold()` only measures. None: `Descent`, with lr `Frozen` after a
            race and `Cautious` where there is none. Who brings one composes the run: of the pieces below only those are
            there that are named.
        budget: gradients that the run may spend, over those of plain training; at least 1. A validation loss without
            its gradient counts as a third of one.
        race: finds the learning rate; "auto", None or a `Race`.
        shape: of the learning rate over the run, on top of any schedule; "auto", None or a `Shape`.
        readout: which weights the module ends with; "auto", None or a `Readout`. Checkpoints hold the weights as they
            stand, and what the readout keeps in the callback's state.
        rewind: what happens when the run blows up, relapses or stands still; "auto", None or a `Rewind`. Costs a copy
            of weights and optimizer state, and one more while there is time to begin anew.
        timescale: where weight decay starts, whatever the optimizer says: after the race, or else at once; "auto", None
            or a `Timescale`. With SGD, and with torch's optimizers whose weight decay is decoupled.
        seed: fixes the order of hyper-validation batches and the randomness of their evaluation.

    Raises:
        ConfigurationError: at construction or at the start of `fit`, for settings that cannot work.
        HyperparameterError, UnsupportedOptimizerError, NotDifferentiableError: at the start of `fit`, for a
            hyperparameter, an optimizer or a validation loss that cannot be differentiated.
    """

    def __init__(
        self,
        hyperparameters: Name | Sequence[Name] | None = None,
        *,
        estimator: Estimator | None = None,
        monitor: str = USUAL_MONITOR,
        mode: Literal["min", "max"] = "min",
        val_dataloaders: Iterable[Any] | None = None,
        every_n_steps: int | None = None,
        controller: Controller | None = None,
        budget: float = 1.25,
        race: Race | Auto | None = "auto",
        shape: Shape | Auto | None = "auto",
        readout: Readout | Auto | None = "auto",
        rewind: Rewind | Auto | None = "auto",
        timescale: Timescale | Auto | None = "auto",
        seed: int = 0,
    ) -> None:
        whole = isinstance(every_n_steps, int) and not isinstance(every_n_steps, bool)
        if every_n_steps is not None and not (whole and every_n_steps >= 1):
            raise ConfigurationError(f"`every_n_steps` must be an integer of at least 1, but got {every_n_steps!r}.")
        if mode not in ("min", "max"):
            raise ConfigurationError(f"`mode` must be 'min' or 'max', but got {mode!r}.")
        if not isinstance(monitor, str):
            raise ConfigurationError(f"`monitor` must be the key of a logged value, but got {monitor!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigurationError(f"`seed` must be an integer, but got {seed!r}.")
        for name, value, kind in (("estimator", estimator, Estimator), ("controller", controller, Controller)):
            if value is not None and not isinstance(value, kind):
                raise ConfigurationError(f"`{name}` must be an instance of {kind.__name__}, but got {value!r}.")
        single = isinstance(hyperparameters, (str, OptimizerHyperparameter, Hyperparameter))
        if not (hyperparameters is None or single or isinstance(hyperparameters, Sequence)):
            raise ConfigurationError(f"`hyperparameters` must be a sequence of names, but got {hyperparameters!r}.")
        if isinstance(estimator, Unrolled) and estimator.steps is None:
            raise ConfigurationError(
                "Unrolled() would record every step of the run: say how many of the latest it is to go back through, "
                f"such as Unrolled(steps={every_n_steps or 5}), or use Forward(), whose memory does not grow."
            )
        for h in as_tuple(hyperparameters) or ():
            if isinstance(h, Schedule):
                raise ConfigurationError(
                    f"{h!r} is learned over repeated whole runs, with the function hypergrad.hypergradient and without "
                    "a Trainer: see examples/learn_schedule.py. Within one run name 'lr', which multiplies a schedule."
                )
            if not isinstance(h, (str, OptimizerHyperparameter, Hyperparameter)):
                raise HyperparameterError(
                    "A hyperparameter is a name such as 'lr', an OptimizerHyperparameter, or a Hyperparameter of the "
                    f"module, but got {h!r}."
                )
        if val_dataloaders is not None:
            check_loader(val_dataloaders)
        self._settings = Settings(
            hyperparameters=as_tuple(hyperparameters),
            estimator=estimator if estimator is not None else Online(),
            monitor=monitor,
            mode=mode,
            val_dataloaders=val_dataloaders,
            every_n_steps=every_n_steps,
            controller=controller,
            seed=seed,
            wishes=_wishes(budget, race, shape, readout, rewind, timescale, controller),
        )
        self._run: Run | None = None
        self._restored: dict[str, Any] | None = None
        self._log = Log()
        self._moved = False  # since the progress bar was told

    @property
    def hyperparameters(self) -> dict[str, float]:
        """The value that the next step uses, by name and param group; after the fit, the last values.

        Keys are `"lr"` with one param group, `"lr/<the group's name, or group_i>"` with several, and
        `"lr/optimizer_i/…"` with several optimizers. A hyperparameter in the loss with several elements is described
        by `"name/mean"`, `"name/min"` and `"name/max"`; see `tensors`. Empty before the first fit.
        """
        return self._run.values if self._run is not None else {}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The value of each hyperparameter in the loss, by its path in the module. Empty before the first fit."""
        return self._run.tensors if self._run is not None else {}

    @property
    def history(self) -> list[Update]:
        """One record per hypergradient: step, validation loss, values, hypergradients and how sure they are."""
        return self._run.history if self._run is not None else []

    @property
    def gradients(self) -> int:
        """Validation gradients spent so far: the cost of the run beside its training gradients."""
        return self._run.ledger.gradients if self._run is not None else 0

    @property
    def race(self) -> dict[str, Any] | None:
        """What came of it, by name.

        `"lr"` that won; `"scores"`: the validation loss of each arm by learning rate, rung by rung; `"weight_decay"`:
        where that starts by the timescale, of each param group that has one (or tensor, or all, as it is scoped).
        None while it goes on, and where there was none.
        """
        return self._run.race if self._run is not None else None

    @property
    def ended_with(self) -> Best | None:
        """Which weights the readout has put into the module: `kind` ("raw" or "averaged"), `step` and `score`."""
        return self._run.ended_with if self._run is not None else None

    @property
    def rewound(self) -> list[tuple[int, int]]:
        """From which step back to which the run has gone after it had blown up."""
        return self._run.rewound if self._run is not None else []

    @property
    def cost(self) -> float:
        """Gradients spent so far over those of plain training.

        A loss without its gradient counts as a third of one, an exact Hessian-vector product as two.
        """
        return self._run.cost if self._run is not None else 1.0

    def report(self) -> str:
        """Several lines in plain language: what was learned, how sure that is, and what to make of it."""
        return self._run.report() if self._run is not None else "HyperGradient: not fitted yet"

    def summary(self) -> str:
        """One line: learned values, gradients spent, time against the training steps' own time."""
        return self._run.summary() if self._run is not None else "HyperGradient: not fitted yet"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check everything that can be wrong, once, and attach to the optimizers."""
        _check_trainer(trainer, pl_module)
        saved = None if self._restored is None else self._restored["run"]
        self._run = Run(trainer, pl_module, self._settings, continues=saved is not None and saved["pieces"] is not None)
        self._log = Log()
        if self._restored is not None and saved is not None:
            self._run.load_state_dict(saved)
            self._log = Log(self._restored["logged_at"])
            self._restored = None

    def on_train_batch_start(self, *_: Any) -> None:
        """Time the training steps themselves."""
        if self._run is not None:
            self._run.batch_started()

    def on_before_zero_grad(self, *_: Any) -> None:
        """Gradients start anew: losses before the present one do not belong to the coming step."""
        if self._run is not None:
            self._run.gradients_cleared()

    def on_before_backward(self, *args: Any) -> None:
        """What a training batch loses is looked back at when the run relapses."""
        if self._run is not None:
            self._run.lost(args[-1])

    def on_after_backward(self, *_: Any) -> None:
        """The loss of the batch belongs to the coming step."""
        if self._run is not None:
            self._run.went_back()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Take the hypergradient of a step that was tracked in this batch."""
        if self._run is None:
            return
        self._settle(trainer)
        if self._moved:
            self._moved = False
            self._show(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Compare what is tuned on with what is not."""
        if self._run is not None and not trainer.sanity_checking:
            self._run.validated()

    def on_train_end(self, *_: Any) -> None:
        """Say what was learned and what it cost."""
        if self._run is not None:
            self._run.finish()
            self._log.ended(self._run.trainer, self._run.history)
        rank_zero_info(self.summary())
        self._detach()

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        """Leave the optimizers as they were found."""
        if self._run is not None:
            self._log.ended(trainer, self._run.history)
        self._detach()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Leave the optimizers as they were found."""
        self._detach()
        self._restored = None  # a checkpoint that was loaded to validate or test says nothing about the next fit

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a Trainer (hooks, loaders, the module) stays with it when the callback is copied or pickled.
        return {**self.__dict__, "_run": None}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically: tensors, numbers and strings in plain containers.

        Where a callback that stands before this one asks for it at the end of a batch, what the batch calls for is done
        first.
        """
        if self._run is None:
            return {}
        if self._run.is_behind:
            self._settle(self._run.trainer)
        return {"run": self._run.state_dict(), "logged_at": self._log.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where to continue; applied when the fit starts and the optimizers exist."""
        self._restored = state_dict or None

    def _detach(self) -> None:
        if self._run is not None:
            self._run.detach()

    def _settle(self, trainer: pl.Trainer) -> None:
        """Do what the batch calls for, once."""
        if self._run is None or not self._run.batch_ended():
            return
        self._log.found(trainer, self._run.news())
        if self._run.is_due:
            update = self._run.update()
            self._moved = True
            self._log.updated(trainer, update)

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The learning rate of the next step, on the progress bar."""
        if self._run is None or trainer.progress_bar_callback is None:
            return
        rates = self._run.rates
        if rates:
            module.log("hypergradient/lr", rates[0], prog_bar=True, logger=False)


def _wishes(
    budget: float,
    race: Race | Auto | None,
    shape: Shape | Auto | None,
    readout: Readout | Auto | None,
    rewind: Rewind | Auto | None,
    timescale: Timescale | Auto | None,
    controller: Controller | None,
) -> Wishes:
    if not (isinstance(budget, (int, float)) and math.isfinite(budget) and budget >= 1.0):
        raise ConfigurationError(f"`budget` must be at least 1 (the cost of a plain run), but got {budget!r}.")
    pieces = (
        ("race", race, Race),
        ("shape", shape, Shape),
        ("readout", readout, Readout),
        ("rewind", rewind, Rewind),
        ("timescale", timescale, Timescale),
    )
    for name, value, kind in pieces:
        if not (value is None or value == "auto" or isinstance(value, kind)):
            raise ConfigurationError(f"`{name}` must be a {kind.__name__}, None or 'auto', but got {value!r}.")
    if controller is None:
        return Wishes(budget, race, shape, readout, rewind, timescale)
    # Who brings a controller composes: what is not named is not there.
    return Wishes(
        budget,
        None if race == "auto" else race,
        None if shape == "auto" else shape,
        None if readout == "auto" else readout,
        None if rewind == "auto" else rewind,
        None if timescale == "auto" else timescale,
    )


def _check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    if not is_overridden("validation_step", module):
        raise ConfigurationError(
            f"{type(module).__name__} has no validation_step, so there is no validation loss to differentiate: define "
            "one that returns or logs it."
        )
    # By exact class: DeepSpeedStrategy, which shards, is a DDPStrategy too.
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise ConfigurationError(
            f"{type(trainer.strategy).__name__} shards or replaces the parameters, where hypergradients are not "
            "available yet: use one device or strategy='ddp'."
        )
    if not any(group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups):
        raise ConfigurationError(f"{type(module).__name__}.configure_optimizers returned no optimizer to tune.")
