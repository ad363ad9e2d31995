"""Unconstrained coordinates: where a hyperparameter can move freely without leaving its domain."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class Transform(ABC):
    """A monotone map from a hyperparameter's natural value x to an unconstrained coordinate u."""

    @abstractmethod
    def forward(self, value: float) -> float:
        """u(x). Raises ValueError where x lies outside the open domain."""

    @abstractmethod
    def inverse(self, position: float) -> float:
        """x(u), for any finite u."""

    @abstractmethod
    def slope(self, value: float) -> float:
        """dx/du at x: turns a derivative in natural units into one along the coordinate."""


class Log(Transform):
    """u = log x, for positive scales such as `lr` and `weight_decay`.

    >>> round(Log().inverse(Log().forward(0.1) + 1.0) / 0.1, 12)  # moving by 1 multiplies by e
    2.718281828459
    """

    def forward(self, value: float) -> float:
        return math.log(value)

    def inverse(self, position: float) -> float:
        return math.exp(position)

    def slope(self, value: float) -> float:
        return value


class Logit(Transform):
    """u = log(x / (1 - x)), for fractions such as `momentum` and `betas`.

    >>> round(Logit().inverse(Logit().forward(0.9)), 12)
    0.9
    """

    def forward(self, value: float) -> float:
        return math.log(value) - math.log1p(-value)

    def inverse(self, position: float) -> float:
        # Two branches, so that exp() never overflows.
        if position >= 0.0:
            return 1.0 / (1.0 + math.exp(-position))
        return math.exp(position) / (1.0 + math.exp(position))

    def slope(self, value: float) -> float:
        return value * (1.0 - value)


class Identity(Transform):
    """u = x, for hyperparameters that may take any real value."""

    def forward(self, value: float) -> float:
        return value

    def inverse(self, position: float) -> float:
        return position

    def slope(self, value: float) -> float:  # noqa: ARG002
        return 1.0
