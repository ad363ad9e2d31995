"""Descent along the cosine: the same step size for any model, loss scale and hyperparameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypergrad.controllers.base import Controller, Reading


class Descent(Controller):
    """Moves each coordinate by `-rate * cosine`: bounded by `rate`, whatever the scale of the loss.

    The cosine is the hypergradient divided by both of its factors' norms. It is near 1 in size while the
    hyperparameter is clearly wrong and shrinks to the noise when it is right.

    Args:
        rate: the largest move per update, in units of the coordinate (0.1 in log lr is 10.5%). In (0, 1].

    >>> Descent(rate=0.1).moves([Reading("lr", slope=-2.0, cosine=-0.5)])
    [0.05]
    """

    def __init__(self, rate: float = 0.1) -> None:
        if not (math.isfinite(rate) and 0.0 < rate <= 1.0):
            raise ValueError(f"`rate` must lie in (0, 1], but got {rate=}.")
        self.rate = rate

    def moves(self, readings: Sequence[Reading]) -> list[float]:
        """`-rate * cosine` for each reading."""
        return [-self.rate * reading.cosine for reading in readings]
