"""Stands between an optimizer's gradients and its update, through the public step hooks of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from hypergrad import Estimator, Measurement, OptimizerHyperparameter, Tracker, Tuner


class Attachment:
    """Learned values in, tracked steps out, for one optimizer of the Trainer.

    The learned values stand in `param_groups` only while a step runs: LR schedulers and checkpoints read and write
    the scheduled ones.

    Args:
        index: position of the optimizer in `trainer.optimizers`.
        every_n_steps: the step counted from 1 is tracked when it is a multiple of this.
    """

    def __init__(
        self,
        index: int,
        optimizer: torch.optim.Optimizer,
        hyperparameters: tuple[OptimizerHyperparameter, ...],
        estimator: Estimator,
        tuner: Tuner,
        every_n_steps: int,
    ) -> None:
        self.optimizer = optimizer
        self.hyperparameters = hyperparameters
        self.tracker: Tracker = estimator.track(optimizer, hyperparameters)
        self.steps = 0
        self.pending = False
        self._index = index
        self._tuner = tuner
        self._every_n_steps = every_n_steps
        self._used: dict[str, tuple[float, float]] = {}
        self._scheduled: list[tuple[dict[str, Any], str, Any]] = []
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

    def coordinates(self) -> Iterator[tuple[str, int, OptimizerHyperparameter]]:
        """Every learned number as `(key, index of its param group, hyperparameter)`.

        A group with weight decay 0 beside one with a positive one is taken to be excluded on purpose, as biases and
        norms are, and stays at 0.
        """
        groups = self.optimizer.param_groups
        for hyperparameter in self.hyperparameters:
            excluded = [hyperparameter.floor is not None and hyperparameter.read(g) == 0.0 for g in groups]
            for i in range(len(groups)):
                if not excluded[i] or all(excluded):
                    yield f"{self._index}/{hyperparameter.name}/{i}", i, hyperparameter

    def values(self) -> dict[str, float]:
        """The value that the next step would use, by key."""
        values: dict[str, float] = {}
        for i, group in enumerate(self.optimizer.param_groups):
            values.update(self._tuner.values(group, {k: h for k, at, h in self.coordinates() if at == i}))
        return values

    def measurements(self, hypergradients: dict[str, list[float]], scales: dict[str, list[float]]) -> list[Measurement]:
        """Pair the numbers of a contraction with the values that the tracked step used."""
        return [
            Measurement(
                key=key,
                hyperparameter=hyperparameter,
                scheduled=self._used[key][0],
                value=self._used[key][1],
                hypergradient=hypergradients[hyperparameter.name][i],
                scale=scales[hyperparameter.name][i],
            )
            for key, i, hyperparameter in self.coordinates()
            if key in self._used and i < len(hypergradients[hyperparameter.name])
        ]

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._apply_learned()
        if (self.steps + 1) % self._every_n_steps:
            return None
        # With automatic optimization the gradient does not exist yet: the closure runs training_step and backward
        # (and clips), and the update follows it immediately.
        if args and callable(args[0]):
            return (self._wrapped(args[0]), *args[1:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._wrapped(kwargs["closure"])}
        self._track()
        return None

    def _wrapped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def then_track() -> Any:
            result = closure()
            self._track()
            return result

        return then_track

    def _track(self) -> None:
        with torch.no_grad():
            self.tracker.before_step()

    def _after_step(self, *_: Any) -> None:
        self._restore_schedule()
        self.steps += 1
        self.pending = self.steps % self._every_n_steps == 0 and len(self.tracker.params) > 0

    def _apply_learned(self) -> None:
        self._used = {}
        coordinates = list(self.coordinates())
        for i, group in enumerate(self.optimizer.param_groups):
            mine = {key: h for key, at, h in coordinates if at == i}
            for key, value in self._tuner.values(group, mine).items():
                scheduled = mine[key].read(group)
                self._used[key] = (scheduled, value)
                if value != scheduled:
                    self._scheduled.append((group, mine[key].key, group[mine[key].key]))
                    mine[key].write(group, value)

    def _restore_schedule(self) -> None:
        while self._scheduled:  # last written first: two entries of one tuple restore its oldest value last
            group, key, value = self._scheduled.pop()
            group[key] = value
