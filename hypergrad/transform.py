"""Unconstrained coordinates: where a hyperparameter can move freely without leaving its domain."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, TypeVar

import torch

from hypergrad.errors import ConfigurationError

# A number, or a tensor of any shape that is mapped element by element.
Real = TypeVar("Real", float, torch.Tensor)


class Transform(ABC):
    """A monotone map from a hyperparameter's natural value x to an unconstrained coordinate u; tensors elementwise."""

    @abstractmethod
    def forward(self, value: Real) -> Real:
        """u(x). Raises ValueError where the number x lies outside the open domain; a tensor has NaN or inf there."""

    @abstractmethod
    def inverse(self, position: Real) -> Real:
        """x(u), for any finite u."""

    @abstractmethod
    def slope(self, value: Real) -> Real:
        """dx/du at x: turns a derivative in natural units into one along the coordinate."""


class Log(Transform):
    """u = log x, for positive scales such as `lr` and `weight_decay`.

    >>> round(Log().inverse(Log().forward(0.1) + 1.0) / 0.1, 12)  # moving by 1 multiplies by e
    2.718281828459
    """

    def forward(self, value: Real) -> Real:
        return value.log() if isinstance(value, torch.Tensor) else math.log(value)

    def inverse(self, position: Real) -> Real:
        return position.exp() if isinstance(position, torch.Tensor) else math.exp(position)

    def slope(self, value: Real) -> Real:
        return value


class Logit(Transform):
    """u = log(x / (1 - x)), for fractions such as `momentum` and `betas`.

    >>> round(Logit().inverse(Logit().forward(0.9)), 12)
    0.9
    """

    def forward(self, value: Real) -> Real:
        if isinstance(value, torch.Tensor):
            return value.log() - (-value).log1p()
        return math.log(value) - math.log1p(-value)

    def inverse(self, position: Real) -> Real:
        if isinstance(position, torch.Tensor):
            return position.sigmoid()
        # Two branches, so that exp() never overflows.
        if position >= 0.0:
            return 1.0 / (1.0 + math.exp(-position))
        return math.exp(position) / (1.0 + math.exp(position))

    def slope(self, value: Real) -> Real:
        return value * (1.0 - value)


class Softplus(Transform):
    """u = log(exp(x) - 1), for positive values that should move like logarithms near 0 and like themselves far from it.

    >>> round(Softplus().inverse(Softplus().forward(3.0)), 12)
    3.0
    """

    def forward(self, value: Real) -> Real:
        if isinstance(value, torch.Tensor):
            return value + (-(-value).expm1()).log()
        return value + math.log(-math.expm1(-value))

    def inverse(self, position: Real) -> Real:
        if isinstance(position, torch.Tensor):
            return torch.nn.functional.softplus(position)
        return max(position, 0.0) + math.log1p(math.exp(-abs(position)))

    def slope(self, value: Real) -> Real:
        if isinstance(value, torch.Tensor):
            return -(-value).expm1()
        return -math.expm1(-value)


class Identity(Transform):
    """u = x, for hyperparameters that may take any real value."""

    def forward(self, value: Real) -> Real:
        return value

    def inverse(self, position: Real) -> Real:
        return position

    def slope(self, value: Real) -> Real:
        return torch.ones_like(value) if isinstance(value, torch.Tensor) else 1.0


TransformName = Literal["log", "logit", "softplus", "none"]
_BY_NAME: dict[str, type[Transform]] = {"log": Log, "logit": Logit, "softplus": Softplus, "none": Identity}


def as_transform(transform: Transform | TransformName) -> Transform:
    """A transform, or the one of that name.

    Raises:
        ConfigurationError: for anything else.
    """
    if isinstance(transform, Transform):
        return transform
    if not isinstance(transform, str) or transform not in _BY_NAME:
        raise ConfigurationError(
            f"`transform` must be a Transform or one of {', '.join(map(repr, _BY_NAME))}, but got {transform!r}."
        )
    return _BY_NAME[transform]()
