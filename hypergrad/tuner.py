"""Holds what has been learned, turns it into values for a step, and keeps every move inside its domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hypergrad.controllers.base import Controller, Reading
from hypergrad.errors import ConfigurationError
from hypergrad.hyperparameter import OptimizerHyperparameter, ParamGroup
from hypergrad.loss_hyperparameter import Hyperparameter
from hypergrad.signal import SignalToNoise

# A step multiplies decayed weights by 1 - lr * weight_decay: at 1 they are erased, beyond it they change sign.
MAX_DECAY_PER_STEP = 0.5


@dataclass(frozen=True)
class Measurement:
    """One hypergradient, in natural units, together with where it was taken.

    Args:
        key: identifies the coordinate along the run.
        hyperparameter: what was measured.
        scheduled: the value that the user or an LR scheduler set.
        value: the value that the step really used.
        hypergradient: d(objective)/d(value), the objective to be made smaller.
        scale: the product of the norms of the validation gradient and of d(parameters)/d(value), where it is known.
    """

    key: str
    hyperparameter: OptimizerHyperparameter
    scheduled: float
    value: float
    hypergradient: float
    scale: float | None


@dataclass(frozen=True)
class TensorMeasurement:
    """The hypergradient of a hyperparameter in the loss, in natural units, at its present value.

    Args:
        key: identifies it along the run.
        hyperparameter: what was measured; an update moves it.
        hypergradient: d(objective)/d(value), in the shape of the value.
    """

    key: str
    hyperparameter: Hyperparameter
    hypergradient: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """What one update did.

    Args:
        skipped: why nothing moved, or None.
        cosines, signal_to_noise: by key; see `Reading` and `SignalToNoise`.
    """

    skipped: str | None = None
    cosines: dict[str, float] = field(default_factory=dict)
    signal_to_noise: dict[str, float] = field(default_factory=dict)


class Tuner:
    """Owns one offset per coordinate: value = inverse(forward(scheduled) + offset).

    An offset, not a value, because schedulers keep writing the scheduled value: in a logarithmic coordinate the
    learned part is a factor on whatever the schedule says. An offset of exactly 0 returns the scheduled value itself.

    Args:
        controller: decides how far coordinates move.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self._offsets: dict[str, float] = {}
        self._signals: dict[str, SignalToNoise] = {}
        # By the first key of a param group: what its values were computed from, and (scheduled, value) of each.
        self._known: dict[str, tuple[tuple[float, ...], list[tuple[float, float]]]] = {}
        self._moved: dict[str, tuple[float, float]] = {}  # by key: (scheduled, value), before decay is bounded

    def values(self, group: ParamGroup, coordinates: Mapping[str, OptimizerHyperparameter]) -> dict[str, float]:
        """The values that a step should use, by key, for one param group in which the scheduled values stand.

        Args:
            group: the param group.
            coordinates: key -> hyperparameter, for all that is learned in this group.
        """
        return {key: value for key, (_, value) in zip(coordinates, self.pairs(group, coordinates), strict=True)}

    def pairs(
        self, group: ParamGroup, coordinates: Mapping[str, OptimizerHyperparameter]
    ) -> Sequence[tuple[float, float]]:
        """(scheduled, value) of each coordinate, in order; see `values`."""
        if not coordinates:
            return []
        numbers = [h.read(group) for h in coordinates.values()]
        origin = (*numbers, float(group.get("lr", 0.0)), float(group.get("weight_decay", 0.0)))
        key = next(iter(coordinates))
        known = self._known.get(key)
        if known is None or known[0] != origin:  # most steps of a training find what the last one used
            values = {k: self._value(k, h, x) for (k, h), x in zip(coordinates.items(), numbers, strict=True)}
            if any(self._offsets.get(k) for k in values):
                self._bound_decay(values, {h.name: k for k, h in coordinates.items()}, group)
            known = self._known[key] = (origin, list(zip(numbers, values.values(), strict=True)))
        return known[1]

    def place(self, key: str, offset: float) -> None:
        """Decide an offset: what a race has found, and not the controller."""
        self._offsets[key] = offset
        self._forget()

    @property
    def offsets(self) -> dict[str, float]:
        """A copy of all offsets, by key."""
        return dict(self._offsets)

    def offset(self, key: str) -> float:
        """How far a coordinate has been moved from what the schedule says."""
        return self._offsets.get(key, 0.0)

    def update(
        self, measurements: Sequence[Measurement], loss: float, tensors: Sequence[TensorMeasurement] = ()
    ) -> Outcome:
        """Let the controller move every coordinate; nothing moves where a number is not finite.

        Args:
            measurements: at most one per coordinate.
            loss: the validation loss at which they were taken.
            tensors: at most one per hyperparameter in the loss.
        """
        numbers = [loss, *(x for m in measurements for x in (m.hypergradient, m.scale or 0.0, m.value))]
        if not all(map(math.isfinite, numbers)) or not all(bool(t.hypergradient.isfinite().all()) for t in tensors):
            culprit = "hypergradient" if math.isfinite(loss) else "validation loss"
            return Outcome(skipped=f"non-finite {culprit}")
        readings = [_reading(m) for m in measurements]
        for reading in readings:
            self._signals.setdefault(reading.key, SignalToNoise()).add(float(reading.slope))
        moves = self.controller.moves([*readings, *map(_tensor_reading, tensors)])
        measured: list[Measurement | TensorMeasurement] = [*measurements, *tensors]
        for measurement, move in zip(measured, moves, strict=True):
            if not (bool(move.isfinite().all()) if isinstance(move, torch.Tensor) else math.isfinite(move)):
                raise ConfigurationError(f"{type(self.controller).__name__} moved {measurement.key!r} by {move}.")
            if isinstance(measurement, TensorMeasurement):
                if isinstance(move, torch.Tensor) or move != 0.0:
                    value = measurement.hyperparameter.value
                    measurement.hyperparameter.move(torch.as_tensor(move).to(value).expand_as(value))
            elif float(move) != 0.0:
                self._move(measurement, float(move))
        return Outcome(
            cosines={r.key: float(r.cosine) for r in readings if r.cosine is not None},
            signal_to_noise={r.key: self._signals[r.key].value for r in readings},
        )

    def state_dict(self) -> dict[str, Any]:
        """Offsets, signal statistics and the controller's memory."""
        return {
            "offsets": dict(self._offsets),
            "signals": {key: signal.state_dict() for key, signal in self._signals.items()},
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the tuner that returned `state`."""
        self._offsets = dict(state["offsets"])
        self._forget()
        self._signals = {key: SignalToNoise(**signal) for key, signal in state["signals"].items()}
        self.controller.load_state_dict(state["controller"])

    def _forget(self) -> None:
        self._known.clear()
        self._moved.clear()

    def _value(self, key: str, hyperparameter: OptimizerHyperparameter, scheduled: float) -> float:
        offset = self._offsets.get(key, 0.0)
        if offset == 0.0:
            return scheduled
        known = self._moved.get(key)
        if known is not None and known[0] == scheduled:
            return known[1]
        start = hyperparameter.start(scheduled)
        value = scheduled if start is None else _clamped(hyperparameter, start, start, offset)
        self._moved[key] = scheduled, value
        return value

    def _move(self, measurement: Measurement, move: float) -> None:
        hyperparameter = measurement.hyperparameter
        coordinate, start = hyperparameter.coordinate, hyperparameter.start(measurement.scheduled)
        if start is None:
            return
        # From the value that was really used to the one that can be reached: no wind-up at a bound.
        current = hyperparameter.start(measurement.value) or start
        target = _clamped(hyperparameter, current, current, move)
        self._forget()
        self._offsets[measurement.key] = coordinate.forward(target) - coordinate.forward(start)

    def _bound_decay(self, values: dict[str, float], keys: Mapping[str, str], group: ParamGroup) -> None:
        lr_key, decay_key = keys.get("lr"), keys.get("weight_decay")
        lr = values[lr_key] if lr_key else float(group.get("lr", 0.0))
        decay = values[decay_key] if decay_key else float(group.get("weight_decay", 0.0))
        if lr * decay <= MAX_DECAY_PER_STEP:
            return
        if decay_key and self._offsets.get(decay_key):
            values[decay_key] = MAX_DECAY_PER_STEP / lr
        elif lr_key:
            values[lr_key] = MAX_DECAY_PER_STEP / decay


def _clamped(hyperparameter: OptimizerHyperparameter, start: float, current: float, offset: float) -> float:
    """inverse(forward(start) + offset), not beyond the bounds; a value already beyond may only come back."""
    lower, upper = hyperparameter.bounds
    coordinate = hyperparameter.coordinate
    lower, upper = min(lower, current), max(upper, current)
    position = coordinate.forward(start) + offset
    # In the coordinate, where it cannot overflow: exp(800) would.
    if math.isfinite(lower):
        position = max(position, coordinate.forward(lower))
    if math.isfinite(upper):
        position = min(position, coordinate.forward(upper))
    return min(max(coordinate.inverse(position), lower), upper)


def _reading(measurement: Measurement) -> Reading:
    hyperparameter = measurement.hyperparameter
    value = hyperparameter.start(measurement.value) or 0.0
    slope = measurement.hypergradient * hyperparameter.coordinate.slope(value)
    if measurement.scale is None:
        return Reading(measurement.key, slope=slope, cosine=None, name=hyperparameter.name)
    cosine = measurement.hypergradient / measurement.scale if measurement.scale > 0.0 else 0.0
    return Reading(measurement.key, slope=slope, cosine=max(-1.0, min(1.0, cosine)), name=hyperparameter.name)


def _tensor_reading(measurement: TensorMeasurement) -> Reading:
    slope = measurement.hypergradient * measurement.hyperparameter.coordinate.slope(measurement.hyperparameter.value)
    return Reading(measurement.key, slope=slope, cosine=None, name=measurement.key)
