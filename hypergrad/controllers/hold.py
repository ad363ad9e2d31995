"""The controller that measures and never moves."""

from __future__ import annotations

from collections.abc import Sequence

from hypergrad.controllers.base import Controller, Move, Reading


class Hold(Controller):
    """Leaves every hyperparameter as the user set it: for watching hypergradients of an unchanged training.

    >>> Hold().moves([Reading("lr", slope=-2.0, cosine=-0.5)])
    [0.0]
    """

    def moves(self, readings: Sequence[Reading]) -> list[Move]:
        """0 for each reading."""
        return [0.0] * len(readings)
