"""One fit of one Trainer: what `HyperGradient` holds from the first batch to the last."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hypergrad import (
    Best,
    Implicit,
    TensorMeasurement,
    Tuner,
    check_names,
    check_optimizer,
    resolve,
)
from hypergrad.callbacks._agreement import fewest, mean, mean_rows
from hypergrad.callbacks._attachment import Attachment
from hypergrad.callbacks._batches import BatchStream
from hypergrad.callbacks._diagnostics import Diagnostics
from hypergrad.callbacks._history import Update, pack, unpack
from hypergrad.callbacks._ledger import Ledger
from hypergrad.callbacks._measuring import OF_HYPERGRADIENTS, OF_VALUES, described, labels_of, measured
from hypergrad.callbacks._monitors import Monitors
from hypergrad.callbacks._notices import Notices
from hypergrad.callbacks._pieces import Pieces
from hypergrad.callbacks._plan import make_plan
from hypergrad.callbacks._report import Facts, report, summary
from hypergrad.callbacks._resuming import kind_of, load_trackers, load_tuner
from hypergrad.callbacks._settings import Settings, batches_of, check_disjoint, hyper_validation_data, names_of
from hypergrad.callbacks._training import TrainingLoss
from hypergrad.callbacks._validation import Score, ValidationLoss


class Run:
    """Attaches to the optimizers on creation; `detach` leaves them as they were found.

    Raises:
        HypergradError: whatever is wrong with optimizers, hyperparameters, data or the validation loss, before
            anything has been changed.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, settings: Settings, *, continues: bool = False
    ) -> None:
        self.history: list[Update] = []
        self.steps = 0
        self._in_batch = False
        self.ledger = Ledger(trainer.strategy.root_device, settings.estimator)
        self.first_values: dict[str, float] = {}
        self.trainer = trainer
        self._settings = settings
        loader, index, several = hyper_validation_data(trainer, settings)
        self._modules = settings.in_loss(module)
        # The validation gradient; where the loss has hyperparameters, also a training gradient and a product.
        update_cost = 1.0 + (1.0 + self.ledger.per_product if self._modules else 0.0)
        self.plan = make_plan(
            *(settings.wishes, trainer, module, names_of(settings.of_optimizers), settings.every_n_steps),
            update_cost=update_cost,
            available=fewest(trainer, batches_of(loader)),
            continues=continues,
        )
        # A fresh one for every run: the user's, or what suits the plan.
        own = settings.controller
        self._tuner = Tuner(self.plan.controller() if own is None else copy.deepcopy(own))
        self._pieces: Pieces | None = None
        self._diagnostics = Diagnostics()
        self._attachments: list[Attachment] = []
        self._monitors: Monitors | None = None
        self._final_values: dict[str, float] | None = None
        self._schedule: dict[str, tuple[float, float]] = {}  # by label: the last scheduled value and what was used
        self._names = names_of(settings.of_optimizers) + list(self._modules)
        self._training_loss: TrainingLoss | None = None
        self._notices = Notices()
        # Every rank draws its own batches; what they measure is averaged.
        self._stream = BatchStream(loader, settings.seed + 1_000_003 * trainer.global_rank)
        self._loss = ValidationLoss(trainer, module, settings.monitor, settings.mode, index, several)
        try:
            self._attach(trainer.optimizers)
            self._try_validation_loss(loader)
            self._add_pieces(loader)
        except BaseException:
            self.detach()
            raise
        self.steps = self._taken()
        self._monitors = Monitors(trainer, self._attachments)
        self.first_values = self.values

    def detach(self) -> None:
        """Take the hooks off the optimizers and put their scheduled values back. May be called twice."""
        for attachment in self._attachments:
            attachment.detach()
        if self._monitors is not None:
            self._monitors.detach()
        if self._training_loss is not None:
            self._training_loss.detach()
        if self._pieces is not None:
            self._pieces.detach()
        self._final_values = self.values

    @property
    def values(self) -> dict[str, float]:
        """The value that the next step uses, by label; the last ones once detached."""
        if self._final_values is not None:
            return dict(self._final_values)
        labels = labels_of(self._attachments, self.trainer.lightning_module)
        values = {labels[key]: value for a in self._attachments for key, value in a.values().items()}
        for name, module in self._modules.items():
            values.update(described(name, module.value, OF_VALUES))
        return values

    @property
    def rates(self) -> list[float]:
        """The learning rates of the next step, as far as they are learned."""
        return [rate for a in self._attachments for rate in a.rates()]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The value of each hyperparameter in the loss, by path in the module."""
        return {name: module.value.detach().clone() for name, module in self._modules.items()}

    @property
    def race(self) -> dict[str, Any] | None:
        """See `HyperGradient.race`."""
        return None if self._pieces is None else self._pieces.race_result

    @property
    def ended_with(self) -> Best | None:
        """See `HyperGradient.ended_with`."""
        return None if self._pieces is None else self._pieces.best

    @property
    def rewound(self) -> list[tuple[int, int]]:
        """See `HyperGradient.rewound`."""
        return [] if self._pieces is None else self._pieces.rewound

    @property
    def cost(self) -> float:
        """See `HyperGradient.cost`."""
        return self.ledger.cost(self._replays, self._pieces.spent if self._pieces is not None else 0.0)

    def report(self) -> str:
        """See `HyperGradient.report`."""
        return report(
            Facts(
                first=self.first_values,
                last=self.values,
                history=self.history,
                race=self.race,
                readings=self._pieces.readings if self._pieces is not None else [],
                predicted=self._diagnostics.predicted,
                monitored=self._diagnostics.monitored,
                ended_with=self.ended_with,
                rewound=self.rewound,
                cost=self.cost,
                steps=self.steps,
                sign=self._settings.sign,
            )
        )

    def news(self) -> list[tuple[int, dict[str, float]]]:
        """Step and scalars by tag of the readout's checkpoints and the race's rungs that were not asked for yet."""
        return [] if self._pieces is None else self._pieces.news()

    def validated(self) -> None:
        """The Trainer has been through its validation data."""
        if self._pieces is not None:
            self._pieces.validated()
        value = self.trainer.callback_metrics.get(self._settings.monitor)
        fits = self.trainer.state.fn == "fit"  # who validates afterwards may do so on anything
        if value is not None and self._settings.val_dataloaders is not None and self.steps and fits:
            self._diagnostics.monitored.append((self.steps, self._settings.sign * float(value)))

    @property
    def is_due(self) -> bool:
        """Whether a step was tracked whose hypergradient has not been taken yet."""
        return any(a.pending for a in self._attachments)

    def batch_started(self) -> None:
        """A training batch begins."""
        self._in_batch = True
        self.ledger.training.start()

    def lost(self, loss: torch.Tensor) -> None:
        """A training loss is about to be differentiated, as Lightning's hook has it."""
        if self._pieces is not None:
            self._pieces.lost(loss)

    def gradients_cleared(self) -> None:
        """The optimizer's gradients are set to zero."""
        if self._training_loss is not None:
            self._training_loss.gradients_cleared()
        if self._pieces is not None:
            self._pieces.gradients_cleared()

    def went_back(self) -> None:
        """The loss of a batch has been differentiated."""
        if self._training_loss is not None:
            self._training_loss.went_back()
        if self._pieces is not None:
            self._pieces.went_back()

    @property
    def is_behind(self) -> bool:
        """Whether a step has been taken in a batch that has not ended, and still can: it does not once detached."""
        return self._final_values is None and self._taken() > self.steps

    def batch_ended(self) -> bool:
        """A training batch has been trained on; False if that has been said before, and no step taken since."""
        if not (self._in_batch or self.is_behind):
            return False
        if self._in_batch:
            self.ledger.training.stop()
            self.ledger.training_batches += 1
        self._in_batch = False
        for attachment in self._attachments:
            attachment.batch_ended()
        before, self.steps = self.steps, self._taken()
        if self._pieces is not None:
            with self.ledger.updates.running():
                at_checkpoint = self._pieces.batch_ended(self.steps > before)
            if at_checkpoint:
                self._diagnostics.checkpoint()
        return True

    def finish(self) -> None:
        """The fit has come to its end: let the readout choose the weights."""
        if self._pieces is not None:
            self._pieces.finish()

    def update(self) -> Update:
        """Take the hypergradient of the tracked steps and let the controller move."""
        with self.ledger.updates.running():
            update = self._update()
        self.history.append(update)
        return update

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically: tensors, numbers and strings in plain containers."""
        return {
            "version": 1,
            "hyperparameters": self._names,
            "values": self.values,
            "settings": self._settings.described(self._tuner.controller),
            "controller": kind_of(self._tuner.controller),
            "tuner": self._tuner.state_dict(),
            "estimator": type(self._settings.estimator).__name__,
            "trackers": [a.tracker_state() for a in self._attachments],
            "optimizer_steps": [a.steps for a in self._attachments],
            "measured_at": [a.measured_at for a in self._attachments],
            "stream": self._stream.state_dict(),
            "history": pack(self.history),
            "first_values": dict(self.first_values),
            "ledger": self.ledger.state_dict(),
            "replays": self._replays,
            "diagnostics": self._diagnostics.state_dict(),
            "pieces": None if self._pieces is None else self._pieces.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the run that returned `state`."""
        if state["hyperparameters"] != self._names:
            rank_zero_warn(
                f"The checkpoint was written by HyperGradient(hyperparameters={tuple(state['hyperparameters'])}) and "
                f"is continued with {tuple(self._names)}: a hyperparameter that is no longer named goes back "
                "to what the optimizer says."
            )
        load_trackers(self._attachments, self._settings.estimator, state, self.trainer.strategy.root_device)
        if self._pieces is not None and state["pieces"] is not None:
            self._pieces.load_state_dict(state["pieces"])  # first, for it may choose the controller
        load_tuner(self._tuner, self._settings, state)
        progress = zip(self._attachments, state["optimizer_steps"], state["measured_at"], strict=False)
        for attachment, steps, measured_at in progress:
            attachment.steps, attachment.measured_at = steps, measured_at
        self.steps = self._taken()
        self._stream.load_state_dict(state["stream"])
        self._diagnostics.load_state_dict(state["diagnostics"])
        self.history = unpack(state["history"])
        self.first_values = dict(state["first_values"])
        self.ledger.load_state_dict(state["ledger"])
        if self._training_loss is not None:
            self._training_loss.evaluations = state["replays"]
        for attachment in self._attachments:
            attachment.watch = self.ledger.tracking

    def summary(self) -> str:
        """One line: learned values, gradients spent, time against the training steps' own time."""
        costs = self.ledger.words(self._replays)
        return summary(self.first_values, self.values, self._schedule, costs, self.history)

    # ------------------------------------------------------------------------------------------------------ inside

    @property
    def _replays(self) -> int:
        """Training gradients that an estimator has taken again."""
        return self._training_loss.evaluations if self._training_loss is not None else 0

    def _taken(self) -> int:
        """Optimizer steps that have been taken, also in a batch that has not ended."""
        return max((a.steps for a in self._attachments), default=0)

    def _add_pieces(self, loader: Iterable[Any]) -> None:
        plan = self.plan
        if plan.why_no_race:
            rank_zero_info(f"HyperGradient: no race of learning rates ({plan.why_no_race}).")
        self._tuner.controller.begin(plan.updates)
        if plan.steps is None:
            return
        score = Score(self._loss, BatchStream(loader, self._settings.seed + 1), plan.batches)
        module, attachment = self.trainer.lightning_module, self._attachments[0]
        self._pieces = Pieces(plan, self.trainer, module, attachment, score, self._tuner, self._modules)

    def _attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        check_disjoint(optimizers)
        settings = self._settings
        tensors = {name: m.value for name, m in self._modules.items()}
        steps = self.trainer.global_step // len(optimizers)  # more than 0 where a plain run is continued
        for i, optimizer in enumerate(optimizers):
            names = settings.of_optimizers
            if names:
                check_optimizer(optimizer)
            check_names(optimizer, self.trainer.lightning_module, names, self._modules)
            implicit = isinstance(settings.estimator, Implicit)
            hyperparameters = resolve(optimizer, names) if names or not (tensors or implicit) else ()
            attachment = Attachment(
                *(i, optimizer, hyperparameters, settings.estimator, tensors, self._tuner),
                *(self.plan.every_n_steps, steps),
            )
            self._attachments.append(attachment)
            attachment.watch = self.ledger.tracking
            if attachment.tracker.needs_loss:
                if self._training_loss is None:
                    # Where a minimum lies does not depend on how gradients are changed on their way to it.
                    self._training_loss = TrainingLoss(self.trainer, self.trainer.lightning_module, exact=not implicit)
                self._training_loss.trackers.append(attachment.tracker)
                attachment.training_loss = self._training_loss

    def _try_validation_loss(self, loader: Iterable[Any]) -> None:
        """Fail at the start of fit and not `every_n_steps` later."""
        params = [p for a in self._attachments for g in a.optimizer.param_groups for p in g["params"]]
        trained = [p for p in params if p.requires_grad]
        with BatchStream(loader, self._settings.seed).next() as batch:
            if trained:  # everything may be frozen until a later epoch
                self._loss.check(batch, trained)
                self.ledger.gradients += 1

    def _update(self) -> Update:
        due = [a for a in self._attachments if a.pending]
        params = list(dict.fromkeys(p for a in due for p in a.tracker.params))
        with self._stream.next() as batch:
            loss, gradients = self._loss.gradient(batch, self._stream.position, params)
        self.ledger.gradients += 1
        gradients = tuple(g for g in mean_rows(self.trainer, gradients, params) if g is not None)
        by_param = dict(zip(params, gradients, strict=True))
        contractions = [a.tracker.contract(by_param) for a in due]
        self.ledger.products += sum(c.products for c in contractions)
        for attachment in due:
            attachment.measured()
        value, measurements = measured(self.trainer, loss, due, contractions, self._modules)
        sign, labels = self._settings.sign, labels_of(self._attachments, self.trainer.lightning_module)
        if self._pieces is not None and self._pieces.saw(sign * value):
            return Update(self.steps, value, self.values, {}, skipped="rewound")
        # To first order a step changes the loss by lr * d(loss)/d(lr); each that is measured stands for several.
        of_lr = sum(sign * m.value * m.hypergradient for m in measurements if m.hyperparameter.name == "lr")
        self._diagnostics.foretell(self.plan.every_n_steps * of_lr)
        self._schedule.update({labels[m.key]: (m.scheduled, m.value) for m in measurements})
        values = {labels[m.key]: m.value for m in measurements}
        hypergradients = {labels[m.key]: m.hypergradient for m in measurements}
        tensors = []
        for name, module in self._modules.items():
            found = sum((c.hypergradients[name] for c in contractions), torch.zeros_like(module.value))
            found = mean(self.trainer, found)  # where kernels are not deterministic, ranks differ in their last digits
            tensors.append(TensorMeasurement(name, module, sign * found))
            values.update(described(name, module.value, OF_VALUES))
            hypergradients.update(described(name, found, OF_HYPERGRADIENTS))
        outcome = self._tuner.update(
            [replace(m, hypergradient=sign * m.hypergradient) for m in measurements], sign * value, tensors
        )
        if outcome.skipped is not None:
            self._notices.warn(self.steps, f"{outcome.skipped}, nothing is learned from it")
        return Update(
            step=self.steps,
            val_loss=value,
            values=values,
            hypergradients=hypergradients,
            cosines={labels[key]: cosine for key, cosine in outcome.cosines.items()},
            signal_to_noise={labels[key]: snr for key, snr in outcome.signal_to_noise.items()},
            skipped=outcome.skipped,
            status=self._notices.status(self.steps, contractions),
        )
