"""Race, shape and readout of one fit, wired to its optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hypergrad import (
    Best,
    HypergradError,
    Hyperparameter,
    Readout,
    Tuner,
    UnsupportedOptimizerError,
)
from hypergrad.callbacks._attachment import Attachment
from hypergrad.callbacks._guard import Guard
from hypergrad.callbacks._plan import Plan, without_race
from hypergrad.callbacks._race import ChangedOutsideError, Heat, NoScoreError
from hypergrad.callbacks._readout import Keeper
from hypergrad.callbacks._timescale import place_decay
from hypergrad.callbacks._training import StepLoss, TrainingLoss
from hypergrad.callbacks._validation import Score


class Pieces:
    """What happens beside hypergradients, decided by a plan.

    Args:
        plan: of this fit, with at least one piece.
        attachment: of the only optimizer.
        score: the objective, the lower the better, of the module as it stands.
        tuner: whose controller is replaced where a race turns out to be impossible.
        learned: hyperparameters in the loss.
    """

    def __init__(
        self,
        plan: Plan,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        attachment: Attachment,
        score: Score,
        tuner: Tuner,
        learned: Mapping[str, Hyperparameter],
    ) -> None:
        self.race_result: dict[str, Any] | None = None
        self.best: Best | None = None
        self._attachment, self._tuner = attachment, tuner
        self._score = score
        self._heat: Heat | None = None
        self._keeper: Keeper | None = None
        self._guard: Guard | None = None
        self._training_loss: TrainingLoss | None = None
        self._evaluations = 0
        self._told = 0, 0  # rungs and checkpoints that `news` has given
        self._steps = steps = plan.steps or 1
        self._timescale = plan.timescale
        if plan.shape is not None:
            shape = plan.shape
            attachment.shape = lambda step: shape.factor(step / steps)
        if plan.readout is not None:
            self._keeper = Keeper(plan.readout, steps, module, score)
        if plan.rewind is not None:
            self._guard = Guard(plan.rewind, steps, trainer, module, attachment, tuner, learned)
        if plan.race is not None:
            self._heat = Heat(plan.race, steps, trainer, module, attachment, score)
            if attachment.training_loss is None:
                self._training_loss = attachment.training_loss = TrainingLoss(trainer, module, for_steps=True)
                attachment.without_replay = self._cancel
            attachment.training_loss.about_to_run = self._about_to_run
            attachment.stepped = self._let_others_step
            attachment.measures = False
        else:
            self._place_decay()

    @property
    def is_racing(self) -> bool:
        """Whether several arms are in the run."""
        return self._heat is not None

    @property
    def spent(self) -> float:
        """Gradients for the race and for scores, of which a forward pass counts as a third."""
        replays = self._training_loss.evaluations if self._training_loss is not None else self._evaluations
        return replays + self._score.evaluations / 3

    def gradients_cleared(self) -> None:
        """The optimizer's gradients are set to zero."""
        if self._training_loss is not None:
            self._training_loss.gradients_cleared()

    def went_back(self) -> None:
        """The loss of a batch has been differentiated."""
        if self._training_loss is not None:
            self._training_loss.went_back()

    def lost(self, loss: torch.Tensor) -> None:
        """A training loss is about to be differentiated, as Lightning's hook has it."""
        if self._guard is not None:
            self._guard.lost(loss)

    def batch_ended(self, stepped: bool) -> bool:
        """A training batch has been trained on.

        Args:
            stepped: whether the optimizer has made a step.

        Returns:
            Whether the readout has judged the weights.
        """
        if self._heat is not None:
            if not self._heat.is_over:
                return False
            heat = self._heat
            self.race_result = {"lr": heat.winner, "scores": heat.scores, "weight_decay": []}
            if heat.has_learned:  # a network that stands still yet would only shrink
                self.race_result["weight_decay"] = self._place_decay()
            scores = "; ".join(", ".join(f"{lr:.3g}: {s:.4g}" for lr, s in rung.items()) for rung in heat.scores)
            if self._guard is not None:
                self._guard.begin_at(heat.untrained)
            self._end_race()
            rank_zero_info(f"HyperGradient: lr {heat.winner:.3g} won the race ({scores})")
            return False
        raw = self._at_checkpoint() if stepped else None
        if raw is not None and self._guard is not None and self._guard.at_checkpoint(raw):
            self._forget_average()
        return raw is not None and self._keeper is not None

    def _at_checkpoint(self) -> float | None:
        """The score of the weights as they stand; None between checkpoints."""
        step = self._attachment.steps
        if self._keeper is not None:
            return self._keeper.after_step(step)
        return self._score() if self._guard is not None and Readout().is_due(step, self._steps) else None

    def saw(self, loss: float) -> bool:
        """Take in a value of the objective; True if the run has been rewound because of it."""
        if self._guard is None or self.is_racing or not self._guard.saw(loss):
            return False
        self._forget_average()
        return True

    @property
    def rewound(self) -> list[tuple[int, int]]:
        """From which step back to which."""
        return [] if self._guard is None else list(self._guard.rewound)

    @property
    def readings(self) -> list[tuple[int, float, float]]:
        """Step, objective of the weights as they stood, and of their average, of each checkpoint."""
        return [] if self._keeper is None else list(self._keeper.scores)

    def news(self) -> list[tuple[int, dict[str, float]]]:
        """Step and scalars by tag, of what was found since the last call."""
        found: list[tuple[int, dict[str, float]]] = []
        rungs = self._heat.scores if self._heat is not None else (self.race_result or {}).get("scores", [])
        checkpoints = self._keeper.scores if self._keeper is not None else []
        if self._told == (len(rungs), len(checkpoints)):  # after nearly every batch
            return found
        for rung in rungs[self._told[0] :]:
            scores = {f"hypergradient/race/lr_{lr:.2g}": s for lr, s in rung.items() if math.isfinite(s)}
            found.append((self._attachment.steps, scores))
        for step, raw, averaged in checkpoints[self._told[1] :]:
            pair = {"hypergradient/readout/raw": raw, "hypergradient/readout/averaged": averaged}
            found.append((step, {tag: s for tag, s in pair.items() if math.isfinite(s)}))
        self._told = len(rungs), len(checkpoints)
        return found

    def finish(self) -> None:
        """The fit is over: put the best weights into the module."""
        if self._keeper is not None and not self.is_racing:
            self.best = self._keeper.finish(self._attachment.steps)

    def detach(self) -> None:
        """Leave module and optimizer as they were found."""
        if self._training_loss is not None:
            self._evaluations = self._training_loss.evaluations
            self._training_loss.detach()
            self._training_loss = None

    def state_dict(self) -> dict[str, Any]:
        """Where race and readout stand."""
        return {
            "heat": None if self._heat is None else self._heat.state_dict(),
            "keeper": None if self._keeper is None else self._keeper.state_dict(),
            "guard": None if self._guard is None else self._guard.state_dict(),
            "race_result": self.race_result,
            "told": list(self._told),
            "evaluations": [
                self._training_loss.evaluations if self._training_loss is not None else self._evaluations,
                self._score.evaluations,
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the one that returned `state`."""
        self.race_result = state["race_result"]
        self._told = state["told"][0], state["told"][1]
        if self._heat is not None:
            if state["heat"] is None and state["race_result"] is None:
                self._give_up()
            elif state["heat"] is None:
                self._end_race()
            else:
                self._heat.load_state_dict(state["heat"])
        if self._keeper is not None and state["keeper"] is not None:
            self._keeper.load_state_dict(state["keeper"])
        if self._guard is not None and state["guard"] is not None:
            self._guard.load_state_dict(state["guard"])
        self._evaluations, self._score.evaluations = state["evaluations"]
        if self._training_loss is not None:
            self._training_loss.evaluations = self._evaluations

    def _place_decay(self) -> list[float]:
        """Let weight decay start where the timescale says; the values, which the user is told."""
        if self._timescale is None:
            return []
        placed = place_decay(self._timescale, self._steps, self._attachment, self._tuner)
        if placed:
            values = ", ".join(f"{value:.3g}" for value in placed)
            rank_zero_info(f"HyperGradient: weight decay starts at {values}, by {self._timescale}")
        return placed

    def _forget_average(self) -> None:
        if self._keeper is not None:
            self._keeper.forget_average()

    def _let_others_step(self, loss: StepLoss | None) -> None:
        if self._heat is None:
            return
        try:
            self._heat.after_step(loss)
        except (UnsupportedOptimizerError, ChangedOutsideError) as error:
            self._cancel(error)
        except NoScoreError as error:
            rank_zero_warn(f"HyperGradient: no race of learning rates: {error}. Training goes on with the one it has.")
            self._give_up()

    def validated(self) -> None:
        """The Trainer has been through its validation data."""
        if self._heat is not None:
            self._heat.validated()

    def _about_to_run(self) -> None:
        if self._heat is None:
            return
        try:
            self._heat.before_step()
        except ChangedOutsideError as error:
            self._cancel(error)

    def _cancel(self, error: HypergradError) -> None:
        under_way = self._heat is not None and bool(self._heat.scores)
        what = f"the race of learning rates ends at {self._heat.winner:.3g}" if under_way and self._heat else ""
        rank_zero_info(
            f"HyperGradient: {what or 'no race of learning rates'}, for the training step cannot be run again "
            f"({error}); lr is learned by hypergradients instead."
        )
        self._give_up()

    def _give_up(self) -> None:
        self._tuner.controller = without_race()
        self._attachment.shape = None
        self._end_race()

    def _end_race(self) -> None:
        self._heat = None
        self._attachment.stepped, self._attachment.measures = None, True
        self._attachment.measured_at = self._attachment.steps
        if self._attachment.training_loss is not None:
            self._attachment.training_loss.about_to_run = None
        if self._training_loss is not None:
            self._attachment.training_loss = None
        self._attachment.without_replay = None
        self.detach()
