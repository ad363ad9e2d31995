"""Slows the growth of the learning rate once the run is under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypergrad.controllers.base import Controller, Move, Reading
from hypergrad.errors import ConfigurationError


class Cautious(Controller):
    """Wraps a controller: after the first `free` readings, upward moves of `lr` are multiplied by `slowdown`.

    At the start a learning rate that is too low costs the run, and it may rise as fast as the readings agree. Later
    the two directions are not alike: a fall that was wrong costs some progress, while a rise that was wrong can
    destroy the weights, which lowering the rate does not mend, and one-step hypergradients see no difference between
    them. On noise alone the rate then drifts down and not up.

    Args:
        controller: decides on the moves.
        free: readings of a coordinate before it is slowed down, at least 0.
        slowdown: factor on later upward moves, in [0, 1].

    Raises:
        ConfigurationError: for a value outside its range.

    >>> class Push(Controller):
    ...     def moves(self, readings):
    ...         return [0.5] * len(readings)
    >>> cautious = Cautious(Push(), free=1, slowdown=0.3)
    >>> [cautious.moves([Reading("lr", slope=-1.0, cosine=-1.0, name="lr")])[0] for _ in range(2)]
    [0.5, 0.15]
    """

    def __init__(self, controller: Controller, *, free: int = 30, slowdown: float = 0.3) -> None:
        if not isinstance(controller, Controller):
            raise ConfigurationError(f"`controller` must be an instance of Controller, but got {controller!r}.")
        if isinstance(free, bool) or not isinstance(free, int) or free < 0:
            raise ConfigurationError(f"`free` must be an integer of at least 0, but got {free!r}.")
        if not 0.0 <= slowdown <= 1.0:
            raise ConfigurationError(f"`slowdown` must lie in [0, 1], but got {slowdown=}.")
        self.controller = controller
        self.free = free
        self.slowdown = slowdown
        self._readings: dict[str, int] = {}

    def begin(self, updates: int | None) -> None:
        """Tell the wrapped controller."""
        self.controller.begin(updates)

    def moves(self, readings: Sequence[Reading]) -> list[Move]:
        """The wrapped controller's moves, the late upward ones of `lr` made smaller."""
        moves = self.controller.moves(readings)
        return [self._slowed(reading, move) for reading, move in zip(readings, moves, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """How many readings each coordinate has had, and the wrapped controller's state."""
        return {"readings": dict(self._readings), "controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the controller that returned `state`."""
        self._readings = dict(state["readings"])
        self.controller.load_state_dict(state["controller"])

    def _slowed(self, reading: Reading, move: Move) -> Move:
        self._readings[reading.key] = self._readings.get(reading.key, 0) + 1
        late = self._readings[reading.key] > self.free
        return move * self.slowdown if reading.name == "lr" and late and move > 0.0 else move
