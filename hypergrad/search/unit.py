"""Parameters in the coordinate in which they are searched: [0, 1], on the log scale where they have one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hypergrad.search.parameter import Float, Int, Parameter


def to_unit(parameter: Float | Int, value: float) -> float:
    """Where `value` lies between the bounds."""
    low, high = _edges(parameter)
    if parameter.log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)


def from_unit(parameter: Float | Int, u: float) -> Any:
    """The value at `u`, which is clipped to [0, 1]; on a step where the parameter has steps.

    >>> from_unit(Int(1, 4), 0.99), from_unit(Float(1e-4, 1.0, log=True), 0.5)
    (4, 0.01)
    """
    low, high = _edges(parameter)
    u = min(max(u, 0.0), 1.0)
    value = low * (high / low) ** u if parameter.log else low + u * (high - low)
    if parameter.step is not None:
        value = parameter.low + parameter.step * round((value - parameter.low) / parameter.step)
    value = min(max(value, parameter.low), parameter.high)
    return int(value) if isinstance(parameter, Int) else float(value)


def drawn(parameter: Parameter, generator: np.random.Generator) -> Any:
    """A uniform draw from the whole domain."""
    if isinstance(parameter, (Float, Int)):
        return from_unit(parameter, generator.random())
    choices = parameter.values() or ()
    return choices[int(generator.integers(len(choices)))]


def _edges(parameter: Float | Int) -> tuple[float, float]:
    # Every step gets an interval of the same length, the first and the last one too.
    half = parameter.step / 2 if parameter.step is not None else 0.0
    return parameter.low - half, parameter.high + half
