"""Leaves some hyperparameters where they are and measures them all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypergrad.controllers.base import Controller, Move, Reading
from hypergrad.errors import ConfigurationError


class Frozen(Controller):
    """Wraps a controller: hyperparameters of these names do not move, the others are the wrapped one's.

    What a race has decided is no matter of one step ahead: there the learning rate is frozen, and its schedule is a
    `Shape`.

    Args:
        controller: decides on the others.
        names: such as `("lr",)`.

    Raises:
        ConfigurationError: for no controller, and for one string in place of a sequence of them.
    """

    def __init__(self, controller: Controller, names: Sequence[str] = ("lr",)) -> None:
        if not isinstance(controller, Controller):
            raise ConfigurationError(f"`controller` must be an instance of Controller, but got {controller!r}.")
        self.controller = controller
        if isinstance(names, str):
            raise ConfigurationError(f"`names` must be a sequence of names, such as ({names!r},), but got {names!r}.")
        self.names = tuple(names)

    def begin(self, updates: int | None) -> None:
        """Tell the wrapped controller."""
        self.controller.begin(updates)

    def moves(self, readings: Sequence[Reading]) -> list[Move]:
        """The wrapped controller's moves of what is not frozen, and 0."""
        free = [reading for reading in readings if reading.name not in self.names]
        moves = iter(self.controller.moves(free))
        return [0.0 if reading.name in self.names else next(moves) for reading in readings]

    def state_dict(self) -> dict[str, Any]:
        """The wrapped controller's state."""
        return {"controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the controller that returned `state`."""
        self.controller.load_state_dict(state["controller"])
