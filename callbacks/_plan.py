"""What one run does beside training, and how its budget is shared out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

from hypergrad import (
    Cautious,
    ConfigurationError,
    Controller,
    Cosine,
    Descent,
    Frozen,
    Race,
    Readout,
    Rewind,
    Shape,
    Timescale,
)
from hypergrad.callbacks._timescale import why_no_timescale
from hypergrad.callbacks.early_stopping import EarlyStopping

# Of the gradients that a run may spend beside its own. The race takes about 0.4, the rest is for hypergradients.
_ON_READOUT = 0.24
_FORWARD = 1 / 3  # the cost of a loss without its gradient, in gradients
_USUAL = 0.25  # the extra gradients for which the race's rungs are written
_CHECKS = 2  # gradients with which a fit begins
_RARELY = 10**9
_NO_LENGTH = "the length of the run is not known: give the Trainer max_steps or max_epochs"

Auto = Literal["auto"]


@dataclass(frozen=True)
class Wishes:
    """The pieces that the user named; `"auto"` is what suits the run, None is none."""

    budget: float
    race: Race | Auto | None
    shape: Shape | Auto | None
    readout: Readout | Auto | None
    rewind: Rewind | Auto | None
    timescale: Timescale | Auto | None


@dataclass(frozen=True)
class Plan:
    """Decided at the start of a fit.

    Args:
        every_n_steps: steps between two hypergradients, on average.
        why_no_race: for the user.
        batches: of validation data that a score is the mean of.
        steps: of the run; None where they are not known, and where nothing is planned.
    """

    every_n_steps: float
    why_no_race: str = ""
    batches: int = 1
    steps: int | None = None
    race: Race | None = None
    shape: Shape | None = None
    readout: Readout | None = None
    rewind: Rewind | None = None
    timescale: Timescale | None = None

    @property
    def updates(self) -> int | None:
        """How many hypergradients there will be."""
        if self.steps is None:
            return None
        return int((self.steps - _length(self.race, self.steps)) / self.every_n_steps)

    def controller(self) -> Controller:
        """How hypergradients move what they measure, where the user does not say."""
        if self.race is None:
            return without_race()
        # Where weight decay starts near its place, it has less far to go, and noise carries it less far away.
        pace = {} if self.timescale is None else {"weight_decay": 0.2}
        return Frozen(Descent(2.0, travel=100.0, pace=pace), ("lr",))


def without_race() -> Controller:
    """The controller of a run whose learning rate is found by nothing else."""
    return Cautious(Descent())


def make_plan(
    wishes: Wishes,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    names: Sequence[str],
    every_n_steps: int | None,
    *,
    update_cost: float,
    available: int | None,
    continues: bool,
) -> Plan:
    """The plan of this fit: what was asked for, and where that was left open, what the run is long enough for.

    Args:
        names: of the hyperparameters in the param groups.
        every_n_steps: what the user said.
        update_cost: gradients that an update takes.
        available: batches of hyper-validation data, where that is known.
        continues: whether a run with a plan goes on from a checkpoint.

    Raises:
        ConfigurationError: for a readout beside a callback that averages weights, and for a timescale that cannot be
            had.
    """
    steps = _steps(trainer)
    extra = wishes.budget - 1.0
    averaging = _averaging(trainer)
    deciding = averaging or _restoring(trainer)
    if deciding and wishes.readout not in ("auto", None):
        raise ConfigurationError(
            f"{deciding} and `readout` would both decide which weights the module ends with: use one of them."
        )
    obstacle = _obstacle(trainer, module, "lr" in names, steps)
    if averaging:
        obstacle = obstacle or f"{averaging} would average the weights of several arms"
    if trainer.global_step and not continues:
        obstacle = obstacle or f"the run is under way, at step {trainer.global_step}"
    race, why = _race(wishes, obstacle, steps, extra)
    usual = race is not None
    own_schedule = bool(trainer.lr_scheduler_configs)
    shape = (Cosine() if usual and not own_schedule else None) if wishes.shape == "auto" else wishes.shape
    readout = (Readout() if usual and not deciding else None) if wishes.readout == "auto" else wishes.readout
    rewind = (Rewind() if usual else None) if wishes.rewind == "auto" else wishes.rewind
    timescale = _timescale_of(wishes, trainer, usual, "weight_decay" in names, steps)
    if steps is None or not (race or shape or readout or rewind or timescale):
        return Plan(every_n_steps or _affordable_pace(extra), why)
    batches, every = 4, float(every_n_steps or _RARELY)
    if readout is not None:
        readout, batches = _affordable(readout, _ON_READOUT * extra * steps / _FORWARD, available)
    if every_n_steps is None:
        spent = float(_CHECKS)
        if race is not None:
            spent += race.cost(steps) + race.scores * batches * _FORWARD
        if readout is not None:
            spent += 2 * readout.checkpoints * batches * _FORWARD
        elif rewind is not None:
            spent += Readout().checkpoints * batches * _FORWARD
        left = extra * steps - spent
        every = max((steps - _length(race, steps)) / left * update_cost, 1.0) if left >= 1.0 else _RARELY
    return Plan(every, why, batches, steps, race, shape, readout, rewind, timescale)


def _affordable_pace(extra: float) -> float:
    """Steps between two validation gradients where nothing else is spent: five, or more for a smaller budget."""
    return max(5, 1.0 / extra) if extra > 0.0 else _RARELY


def _affordable(readout: Readout, forwards: float, available: int | None) -> tuple[Readout, int]:
    """Checkpoints and batches for so many evaluations: fewer checkpoints before less than two batches each.

    No batch is evaluated twice.
    """
    if readout.batches is not None:
        return readout, readout.batches
    checkpoints = max(min(readout.checkpoints, int(forwards / 4)), 1)
    batches = max(int(forwards / (2 * checkpoints)), 1)
    return replace(readout, checkpoints=checkpoints), min(batches, available or batches)


def _race(wishes: Wishes, why: str, steps: int | None, extra: float) -> tuple[Race | None, str]:
    if wishes.race is None:
        return None, ""
    if why or steps is None:
        return None, why
    if wishes.race != "auto":
        # Without a first rung nobody would ever drop out.
        short = "" if wishes.race.ends(steps) else f"the run has {steps} steps, too few for the rungs of {wishes.race}"
        return (None, short) if short else (wishes.race, "")
    race = Race()
    # Longer rungs for a larger budget, shorter ones for a smaller.
    share = min(extra / _USUAL, 2.0)
    if share > 0.0:
        race = replace(race, rungs=tuple((part * share, kept) for part, kept in race.rungs))
    if share <= 0.0 or not race.ends(steps):
        return None, f"the run has {steps} steps, of which a budget of {wishes.budget:g} leaves too few for a race"
    return race, ""


def _timescale_of(
    wishes: Wishes, trainer: pl.Trainer, usual: bool, learns_decay: bool, steps: int | None
) -> Timescale | None:
    asked = wishes.timescale
    if asked is None or (asked == "auto" and not usual):
        return None
    obstacle = why_no_timescale(trainer.optimizers, learns_decay) if steps is not None else _NO_LENGTH
    if asked == "auto":
        return None if obstacle else Timescale()
    if obstacle:
        raise ConfigurationError(f"{asked!r} cannot be translated into a weight decay: {obstacle}.")
    return asked


def _length(race: Race | None, steps: int) -> int:
    ends = race.ends(steps) if race is not None else []
    return ends[-1][0] if ends else 0


def _averaging(trainer: pl.Trainer) -> str:
    """The callback that averages weights, if there is one."""
    kinds = [StochasticWeightAveraging, *filter(None, [getattr(callbacks, "WeightAveraging", None)])]  # from 2.6 on
    found = [type(c).__name__ for c in trainer.callbacks if isinstance(c, tuple(kinds))]  # type: ignore[attr-defined]
    return found[0] if found else ""


def _obstacle(trainer: pl.Trainer, module: pl.LightningModule, learns_lr: bool, steps: int | None) -> str:
    if not learns_lr:
        return "lr is not among the hyperparameters"
    if steps is None:
        return _NO_LENGTH
    if not module.automatic_optimization:
        return "manual optimization"
    if len(trainer.optimizers) != 1:
        return f"{len(trainer.optimizers)} optimizers"
    if is_overridden("configure_gradient_clipping", module):
        return f"{type(module).__name__}.configure_gradient_clipping may remember what it has clipped"
    if not any(group.get("initial_lr", group["lr"]) > 0.0 for group in trainer.optimizers[0].param_groups):
        return "a learning rate of 0 has no multiples"
    return ""


def _steps(trainer: pl.Trainer) -> int | None:
    """How many steps the run will have; None where that is not known."""
    total = trainer.estimated_stepping_batches
    if not (math.isfinite(total) and total > 0):
        return None
    schedules = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if not schedules or epochs is None or epochs < 0 or not math.isfinite(batches):
        return int(total)
    counts = sorted(schedules[0].scheduling.items())
    ends = [*(epoch for epoch, _ in counts[1:]), math.inf]
    lengths = [max(min(end, epochs) - begin, 0) for (begin, _), end in zip(counts, ends, strict=True)]
    steps = int(sum(n * math.ceil(batches / count) for n, (_, count) in zip(lengths, counts, strict=True)))
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps


def _restoring(trainer: pl.Trainer) -> str:
    """The callback that goes back to the best weights at the end, if there is one."""
    found = [c for c in trainer.callbacks if isinstance(c, EarlyStopping) and c.restore_best_weights]  # type: ignore[attr-defined]
    return "EarlyStopping(restore_best_weights=True)" if found else ""
