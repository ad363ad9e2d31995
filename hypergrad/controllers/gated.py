"""Moves only what the measurements agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hypergrad.controllers.base import Controller, Move, Reading
from hypergrad.errors import ConfigurationError


class Gated(Controller):
    """Wraps a controller: a coordinate moves only while its readings have a signal-to-noise ratio of `threshold`.

        |m| / sqrt(v - m^2) >= threshold,    m, v = exponential means of the reading's strength and of its square

    The mean over n readings is known to 1 / sqrt(n) of their deviation, so that with a memory of 0.9, or ten readings,
    a threshold of 0.3 is one standard error. The wrapped controller sees every reading, also while the gate is shut.
    Elements of a tensor have a gate each.

    Args:
        controller: decides on the moves.
        threshold: at least 0; at 0 the gate is always open.
        memory: of the exponential means, in [0, 1).
        least: readings of a coordinate before its gate may open, at least 2.

    Raises:
        ConfigurationError: for a value outside its range.

    >>> class Push(Controller):
    ...     def moves(self, readings):
    ...         return [0.5] * len(readings)
    >>> gated = Gated(Push(), threshold=1.0)
    >>> [gated.moves([Reading("lr", slope=slope, cosine=None)])[0] for slope in (1.0, 1.1, -3.0)]
    [0.0, 0.5, 0.0]
    """

    def __init__(self, controller: Controller, *, threshold: float = 0.3, memory: float = 0.9, least: int = 2) -> None:
        if not isinstance(controller, Controller):
            raise ConfigurationError(f"`controller` must be an instance of Controller, but got {controller!r}.")
        if not (math.isfinite(threshold) and threshold >= 0.0):
            raise ConfigurationError(f"`threshold` must be at least 0, but got {threshold=}.")
        if not 0.0 <= memory < 1.0:
            raise ConfigurationError(f"`memory` must lie in [0, 1), but got {memory=}.")
        if isinstance(least, bool) or not isinstance(least, int) or least < 2:
            raise ConfigurationError(f"`least` must be an integer of at least 2, but got {least!r}.")
        self.controller = controller
        self.threshold = threshold
        self.memory = memory
        self.least = least
        self._moments: dict[str, _Moments] = {}

    def begin(self, updates: int | None) -> None:
        """Tell the wrapped controller."""
        self.controller.begin(updates)

    def moves(self, readings: Sequence[Reading]) -> list[Move]:
        """The wrapped controller's moves where the gate is open, and 0."""
        moves = self.controller.moves(readings)
        return [self._passed(reading, move) for reading, move in zip(readings, moves, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """What each gate has seen, and the wrapped controller's state."""
        return {
            "moments": {key: asdict(moments) for key, moments in self._moments.items()},
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the controller that returned `state`."""
        self._moments = {key: _Moments(**moments) for key, moments in state["moments"].items()}
        self.controller.load_state_dict(state["controller"])

    def _passed(self, reading: Reading, move: Move) -> Move:
        moments = self._moments.setdefault(reading.key, _Moments())
        moments.add(reading.strength, self.memory)
        if moments.count < self.least:
            return 0.0
        mean, square = moments.mean, moments.square
        # threshold^2 (v - m^2) <= m^2, without a root or a quotient
        open_gate = (1.0 + self.threshold**2) * mean * mean >= self.threshold**2 * square
        if isinstance(open_gate, torch.Tensor):
            moved = torch.as_tensor(move).to(open_gate.device)
            return torch.where(open_gate, moved, torch.zeros_like(moved))
        return move if open_gate else 0.0


@dataclass
class _Moments:
    """Exponential means of a reading's strength and of its square, plain ones while there are few."""

    mean: Move = 0.0
    square: Move = 0.0
    count: int = 0

    def add(self, value: Move, memory: float) -> None:
        self.count += 1
        share = max(1.0 - memory, 1.0 / self.count)
        self.mean = self.mean + share * (value - self.mean)
        self.square = self.square + share * (value * value - self.square)
