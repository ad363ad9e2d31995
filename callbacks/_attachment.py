"""Stands between an optimizer's gradients and its update, through the public step hooks of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from hypergrad import (
    Estimator,
    HypergradError,
    HyperparameterError,
    Measurement,
    OptimizerHyperparameter,
    Tracker,
    Tuner,
    raw_step,
    rejoin_groups,
    split_groups,
    step_hooks,
)
from hypergrad.callbacks._history import Stopwatch
from hypergrad.callbacks._recorded import read_back, write_down
from hypergrad.callbacks._training import StepLoss, TrainingLoss


@dataclass(frozen=True)
class Row:
    """A param group or, where something is learned per tensor, one tensor of it.

    Args:
        group: index of the param group.
        params: its parameters.
        learned: hyperparameters by key; under one key they move together.
    """

    group: int
    params: list[torch.Tensor]
    learned: dict[str, OptimizerHyperparameter] = field(default_factory=dict)

    def place(self, hyperparameter: OptimizerHyperparameter, index: int) -> tuple[int, ...]:
        """Which of a hyperparameter's numbers acts on the row of this index; nothing where there is only one."""
        return {"shared": (), "group": (self.group,), "tensor": (index,)}[hyperparameter.per]


class Attachment:
    """Learned values in, tracked steps out, for one optimizer of the Trainer.

    The learned values stand in `param_groups` only while an update runs: user code, LR schedulers and checkpoints
    read and write the scheduled ones.

    Args:
        index: position of the optimizer in `trainer.optimizers`.
        tensors: values of the hyperparameters in the loss, by name.
        every_n_steps: a step is measured when this many have passed since the last one was due, on average where it is
            no whole number; where several steps follow each other before `measured` is called, the last of them counts.
            Estimators that need it track the steps between as well.
        steps: optimizer steps taken before.
    """

    def __init__(
        self,
        index: int,
        optimizer: torch.optim.Optimizer,
        hyperparameters: tuple[OptimizerHyperparameter, ...],
        estimator: Estimator,
        tensors: Mapping[str, torch.Tensor],
        tuner: Tuner,
        every_n_steps: float,
        steps: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.hyperparameters = hyperparameters
        self.tracker: Tracker = estimator.track(optimizer, hyperparameters, tensors)
        self.training_loss: TrainingLoss | None = None  # set where the tracker needs one
        self.watch: Stopwatch | None = None  # set to measure what tracking costs within training steps
        self.shape: Callable[[int], float] | None = None  # a factor on the scheduled lr, by step
        self.stepped: Callable[[StepLoss | None], None] | None = None  # hears of each step, right after it
        self.measures = True
        # Hears that the step's loss cannot be evaluated again, where that is no error.
        self.without_replay: Callable[[HypergradError], None] | None = None
        self._every_step = estimator.needs_every_step
        self._loss: StepLoss | None = None
        self._tracked = False
        self.steps = steps
        self.measured_at: float = steps - steps % every_n_steps
        self.pending = False
        self._depth = 0
        self._index = index
        self._tuner = tuner
        self._every_n_steps = every_n_steps
        self._layout: list[Row] = []
        self._per_tensor = any(h.per == "tensor" for h in hyperparameters)
        self._standing: list[dict[str, Any]] | None = None  # the user's groups, while every tensor has its own
        self._used: dict[str, tuple[float, float]] = {}
        self._scheduled: list[tuple[dict[str, Any], str, Any]] = []
        for group in optimizer.param_groups:
            for hyperparameter in hyperparameters:
                _check_entry(group, hyperparameter)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Leave the optimizer as it was found, also in the middle of a step that raised."""
        self._restore_schedule()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def has_other_hooks(self) -> bool:
        """Whether somebody else, too, hears of the optimizer's steps."""
        return not step_hooks(self.optimizer) <= {handle.id for handle in self._handles}

    def layout(self) -> list[Row]:
        """What is learned in each param group, or in each tensor where something is learned per tensor.

        A group with weight decay 0 beside one with a positive one is taken to be excluded on purpose, as biases and
        norms are, and stays at 0. Decided when a group is first seen.
        """
        groups = self.optimizer.param_groups
        if self._standing is not None:  # in the middle of a step
            return self._layout
        parts = [[[p] for p in g["params"]] if self._per_tensor else [g["params"]] for g in groups]
        if len(self._layout) != sum(map(len, parts)):
            self._layout = [Row(i, params) for i, split in enumerate(parts) for params in split]
            for h in self.hyperparameters:
                excluded = [h.floor is not None and h.read(group) == 0.0 for group in groups]
                for i, row in enumerate(self._layout):
                    if not excluded[row.group] or all(excluded):
                        row.learned["/".join([f"{self._index}/{h.name}", *map(str, row.place(h, i))])] = h
        return self._layout

    def values(self) -> dict[str, float]:
        """The value that the next step would use, by key; of lr without its shape over the run."""
        values: dict[str, float] = {}
        layout, groups = self.layout(), self._standing or self.optimizer.param_groups
        for row in layout:
            for key, value in self._tuner.values(groups[row.group], row.learned).items():
                if _stands_for(row.learned[key], values.get(key), value):
                    values[key] = value
        return values

    def rates(self) -> list[float]:
        """The learning rate that the next step uses, of each group or tensor in which it is learned."""
        groups = self.optimizer.param_groups
        pairs = [(row, self._tuner.pairs(self._shaped(groups[row.group]), row.learned)) for row in self.layout()]
        return [
            value
            for row, found in pairs
            for h, (_, value) in zip(row.learned.values(), found, strict=True)
            if h.name == "lr"
        ]

    @contextmanager
    def values_shown(self) -> Iterator[None]:
        """The values that the next step would use stand in the param groups, inside the block."""
        if not self._handles:  # detached
            yield
            return
        groups = self.optimizer.param_groups
        # Of tensors that have values of their own the group shows none.
        rows = {row.group: row for row in reversed(self.layout())}
        found = [
            (groups[i], h, value)
            for i, row in rows.items()
            for h, (_, value) in zip(
                row.learned.values(), self._tuner.pairs(self._shaped(groups[i]), row.learned), strict=True
            )
            if h.per != "tensor" and value != h.read(groups[i])
        ]
        standing = [(group, h.key, group[h.key]) for group, h, _ in found]
        try:
            for group, h, value in found:
                h.write(group, value)
            yield
        finally:
            for group, key, value in reversed(standing):
                group[key] = value

    def measurements(
        self, hypergradients: dict[str, list[float]], scales: dict[str, list[float] | None]
    ) -> list[Measurement]:
        """Pair the numbers of a contraction with the values that the tracked step used."""
        found: dict[str, Measurement] = {}
        for at, row in enumerate(self.layout()):
            for key, h in row.learned.items():
                i = next(iter(row.place(h, at)), 0)
                if key not in self._used or key in found or i >= len(hypergradients[h.name]):
                    continue
                (scheduled, value), scale = self._used[key], scales[h.name]
                found[key] = Measurement(
                    *(key, h, scheduled, value, hypergradients[h.name][i]), None if scale is None else scale[i]
                )
        return list(found.values())

    def tracker_state(self) -> dict[str, Any] | None:
        """What the tracker carries, and the losses that it looks back at; None where a checkpoint cannot hold them."""
        try:
            losses = [None if loss is None else write_down(loss) for loss in self.tracker.losses]
        except TypeError:
            return None
        return {"tracker": self.tracker.state_dict(), "losses": losses}

    def load_tracker_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue as the attachment that returned `state`."""
        owner = self.training_loss
        losses = [None if loss is None or owner is None else read_back(loss, owner, device) for loss in state["losses"]]
        self.tracker.load_state_dict(state["tracker"], losses)

    def place_lr(self, offset: float) -> None:
        """Let the learning rates of all param groups be `exp(offset)` times what the schedule says."""
        for key in self._lr_keys():
            self._tuner.place(key, offset)

    def scale_lr(self, factor: float) -> None:
        """Multiply the learning rates of all param groups, beside all that has been learned."""
        for key in self._lr_keys():
            self._tuner.place(key, self._tuner.offset(key) + math.log(factor))

    def step_again(self) -> None:
        """One more update with the gradients that stand there, under the learned values; no hook hears of it."""
        self.steps -= 1  # the step that it repeats
        self._apply_learned()
        try:
            raw_step(self.optimizer)
        finally:
            self._restore_schedule()
            self.steps += 1

    def batch_ended(self) -> None:
        """No step is under way, also if one raised and was caught."""
        self._depth = 0
        self._restore_schedule()

    def measured(self) -> None:
        """The tracked step has been measured: count to the next."""
        self.pending = False
        due = self.measured_at + self._every_n_steps
        self.measured_at = due if due > self.steps - 1 else self.steps

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A class whose step() calls super().step() runs the hooks once more inside: only the outermost call counts.
        self._depth += 1
        if self._depth > 1:
            return None
        # With automatic optimization the gradient does not exist yet: the closure runs training_step and backward
        # (and clips), and the update follows it immediately. torch passes the optimizer itself as args[0].
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._wrapped(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._wrapped(kwargs["closure"])}
        self._before_update()
        return None

    def _wrapped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def then_prepare() -> Any:
            result = closure()
            self._before_update()
            return result

        return then_prepare

    def _before_update(self) -> None:
        self._apply_learned()
        due = self._every_step or self.steps + 1 - self.measured_at >= self._every_n_steps
        due = due and self.measures
        if self.training_loss is None and not due:
            self._tracked = True
            return
        with self.watch.running() if self.watch is not None else nullcontext():
            loss = self._loss_of_this_step()
            # A batch for which training_step returned None has no gradient, and moves nothing.
            self._tracked, self._loss = self.training_loss is None or loss is not None, loss
            if self._tracked and due:
                with torch.no_grad():
                    self.tracker.before_step(None if loss is None else loss.as_stepped())

    def _loss_of_this_step(self) -> StepLoss | None:
        if self.training_loss is None:
            return None
        try:
            return self.training_loss.of_this_step()
        except HypergradError as error:
            if self.without_replay is None:
                raise
            self.without_replay(error)
            return None

    def _after_step(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._restore_schedule()
        self.steps += 1
        due = self.measures and self._tracked and self.steps - self.measured_at >= self._every_n_steps
        if self.measures and self._tracked and (due or self._every_step):
            with torch.no_grad():
                self.tracker.after_step()
        self.pending = due and len(self.tracker.params) > 0
        if self.stepped is not None:
            self.stepped(self._loss)

    def _apply_learned(self) -> None:
        self._restore_schedule()  # a step that raised, or a closure that was called twice
        self._used = {}
        layout = self.layout()
        shaped = [self._shaped(group) for group in self.optimizer.param_groups]
        pairs = [self._tuner.pairs(shaped[row.group], row.learned) for row in layout]
        if self._per_tensor:
            self._standing = split_groups(self.optimizer)
        for group, row, found in zip(self.optimizer.param_groups, layout, pairs, strict=True):
            for (key, hyperparameter), (scheduled, value) in zip(row.learned.items(), found, strict=True):
                known = self._used.get(key)
                if _stands_for(hyperparameter, None if known is None else known[1], value):
                    self._used[key] = (scheduled, value)
                if value != hyperparameter.read(group):
                    self._scheduled.append((group, hyperparameter.key, group[hyperparameter.key]))
                    hyperparameter.write(group, value)

    def _lr_keys(self) -> set[str]:
        return {key for row in self.layout() for key, h in row.learned.items() if h.name == "lr"}

    def _shaped(self, group: dict[str, Any]) -> dict[str, Any]:
        """The param group as the schedule and the shape over the run have it."""
        return group if self.shape is None else {**group, "lr": group["lr"] * self.shape(self.steps)}

    def _restore_schedule(self) -> None:
        while self._scheduled:  # last written first: of two entries of one tuple, the oldest value is restored last
            group, key, value = self._scheduled.pop()
            group[key] = value
        if self._standing is not None:
            rejoin_groups(self.optimizer, self._standing, {h.key for h in self.hyperparameters})
            self._standing = None


def _stands_for(hyperparameter: OptimizerHyperparameter, known: float | None, value: float) -> bool:
    """Whether a shared number is counted in units of this group's value: the first that can move."""
    slope = hyperparameter.coordinate.slope
    return known is None or (slope(known) == 0.0 < slope(value))


def _check_entry(group: dict[str, Any], hyperparameter: OptimizerHyperparameter) -> None:
    entry = group[hyperparameter.key]
    if isinstance(entry, torch.Tensor) and entry.device.type != "cpu":
        raise HyperparameterError(
            f"{hyperparameter.name!r} is a tensor on {entry.device}: reading it would make every training step wait "
            "for the device. Give the optimizer a Python float."
        )
    hyperparameter.start(hyperparameter.read(group))
