"""Descent that moves as far as the hypergradients agree with each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hypergrad.controllers.base import Controller, Move, Reading
from hypergrad.errors import ConfigurationError


class Descent(Controller):
    """Moves each coordinate by `-rate * g * |g|`, where g in [-1, 1] says how much recent readings agree.

        g = m / sqrt(v),    m, v = exponential means of the cosine, or else the slope, and of its square

    bias-corrected as in Adam (Kingma & Ba 2015, "Adam: a method for stochastic optimization", algorithm 1). While a
    hyperparameter is clearly wrong every reading has the same sign, g is near 1 and the value changes by a factor of
    up to `exp(rate)` an update. Near the optimum readings are noise, g is around `sqrt((1 - memory) / 2)` and its
    square lets the value drift only slowly. The step is free of the scale of loss, model and hyperparameter; where the
    estimator knows the cosine, also of how large the gradients of each batch are. Elements of one hyperparameter move
    independently of each other.

    A move against the latest reading is not made: when a rising learning rate has just become too high, the mean
    would still push it up for some updates, and the damage is not undone by lowering it afterwards.

    Args:
        rate: the largest move per update, in units of the coordinate (0.5 in log lr is a factor of 1.65). In (0, 2].
        memory: decay of the mean, in [0, 1); 0.8 averages about 5 updates.
        scale_memory: decay of the mean square, in [0, 1); 0.99 averages about 100 updates.
        travel: the farthest that a coordinate can go in a whole run whose length is known: `rate` is then at most
            `travel` over the number of updates, so that how far values get does not depend on how often they are
            measured. Positive; None sets no such limit.
        pace: factors on the rate, in (0, 1], by the name of the hyperparameter: of what starts near its place.

    Raises:
        ConfigurationError: for a value outside its range.

    >>> descent = Descent(rate=0.5)
    >>> descent.moves([Reading("lr", slope=-2.0, cosine=-0.3)])  # the first reading is all the evidence there is
    [0.5]
    >>> descent.moves([Reading("lr", slope=0.2, cosine=0.1)])  # the mean still says up, the latest reading down
    [0.0]
    """

    def __init__(
        self,
        rate: float = 0.5,
        *,
        memory: float = 0.8,
        scale_memory: float = 0.99,
        travel: float | None = None,
        pace: Mapping[str, float] | None = None,
    ) -> None:
        if not (math.isfinite(rate) and 0.0 < rate <= 2.0):
            raise ConfigurationError(f"`rate` must lie in (0, 2], but got {rate=}.")
        for name, value in (("memory", memory), ("scale_memory", scale_memory)):
            if not 0.0 <= value < 1.0:
                raise ConfigurationError(f"`{name}` must lie in [0, 1), but got {name}={value!r}.")
        if travel is not None and not (math.isfinite(travel) and travel > 0.0):
            raise ConfigurationError(f"`travel` must be positive, but got {travel=}.")
        if not all(0.0 < factor <= 1.0 for factor in (pace or {}).values()):
            raise ConfigurationError(f"`pace` must have factors in (0, 1], but got {pace=}.")
        self.rate = rate
        self.travel = travel
        self.pace = dict(pace or {})
        self.memory = memory
        self.scale_memory = scale_memory
        self._rate = rate
        self._moments: dict[str, _Moments] = {}

    def begin(self, updates: int | None) -> None:
        """Pace the moves by the number of updates."""
        known = updates is not None and self.travel is not None
        self._rate = min(self.rate, self.travel / max(updates, 1)) if known else self.rate  # type: ignore[operator, type-var]

    def moves(self, readings: Sequence[Reading]) -> list[Move]:
        """`-rate * g * |g|` for each reading, or 0 where the reading disagrees with g in sign."""
        return [self._move(reading) for reading in readings]

    def state_dict(self) -> dict[str, Any]:
        """The moments of every coordinate."""
        return {key: asdict(moments) for key, moments in self._moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the controller that returned `state`."""
        self._moments = {key: _Moments(**moments) for key, moments in state.items()}

    def _move(self, reading: Reading) -> Move:
        moments, strength = self._moments.setdefault(reading.key, _Moments()), reading.strength
        moments.add(strength, self.memory, self.scale_memory)
        agreement = moments.agreement(self.memory, self.scale_memory)
        rate = self._rate * self.pace.get(reading.name, 1.0)
        if isinstance(agreement, torch.Tensor):
            moves = -rate * agreement * agreement.abs()
            return torch.where(agreement * strength > 0.0, moves, torch.zeros_like(moves))
        return -rate * agreement * abs(agreement) if agreement * strength > 0.0 else 0.0


@dataclass
class _Moments:
    """Exponential means of a reading's strength and of its square, not yet bias-corrected."""

    mean: Move = 0.0
    square: Move = 0.0
    count: int = 0

    def add(self, value: Move, memory: float, scale_memory: float) -> None:
        self.mean = memory * self.mean + (1.0 - memory) * value
        self.square = scale_memory * self.square + (1.0 - scale_memory) * value * value
        self.count += 1

    def agreement(self, memory: float, scale_memory: float) -> Move:
        mean = self.mean / (1.0 - memory**self.count)
        square = self.square / (1.0 - scale_memory**self.count)
        if isinstance(mean, torch.Tensor) and isinstance(square, torch.Tensor):
            ratio = mean / torch.where(square > 0.0, square, torch.ones_like(square)).sqrt()
            return ratio.clamp(-1.0, 1.0)
        if square <= 0.0:
            return 0.0
        return max(-1.0, min(1.0, mean / math.sqrt(square)))
