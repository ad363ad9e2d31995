"""A hyperparameter of the optimizer as a learned curve over the steps of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from hypergrad.errors import HyperparameterError
from hypergrad.hyperparameter import OptimizerHyperparameter


@dataclass(frozen=True)
class Schedule:
    """A piecewise linear curve in the hyperparameter's coordinate: of log lr, for `"lr"`.

    Stands in for a name in `hypergradient(...)`, where it sets the value of all param groups at each step; its
    hypergradient has one number per knot. For `Forward` and `Unrolled`, over whole runs.

    Args:
        name: as for `OptimizerHyperparameter`.
        knots: step -> value, in natural units, at least two; before the first and after the last the curve is flat.

    Raises:
        HyperparameterError: for fewer than two knots, steps that are no integers of at least 0, or a value outside the
            domain of the coordinate.

    >>> warm_up = Schedule("lr", {0: 0.001, 10: 0.1, 20: 0.1})
    >>> [round(warm_up.value(step), 6) for step in (0, 5, 10, 30)]
    [0.001, 0.01, 0.1, 0.1]
    >>> round(warm_up.moved([math.log(2), 0.0, 0.0]).value(0), 6)
    0.002
    """

    name: str
    knots: Mapping[int, float] = field(hash=False)

    def __post_init__(self) -> None:
        steps = list(self.knots)
        if len(steps) < 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in steps):
            raise HyperparameterError(
                f"`knots` must map at least two steps (integers from 0) to values, but got {dict(self.knots)!r}."
            )
        for step, value in self.knots.items():
            try:
                inside = math.isfinite(self.hyperparameter.coordinate.forward(float(value)))
            except ValueError:
                inside = False
            if not inside:
                raise HyperparameterError(
                    f"{self.name}={value!r} at step {step} lies outside the domain of "
                    f"{type(self.hyperparameter.coordinate).__name__}: give a value inside it."
                )
        object.__setattr__(self, "knots", {step: float(self.knots[step]) for step in sorted(steps)})

    @cached_property
    def hyperparameter(self) -> OptimizerHyperparameter:
        """What the curve is of."""
        return OptimizerHyperparameter(self.name)

    @property
    def values(self) -> torch.Tensor:
        """The values at the knots, in order: shape `(knots,)`, float64."""
        return torch.tensor(list(self.knots.values()), dtype=torch.float64)

    def value(self, step: int) -> float:
        """The value at a step, in natural units."""
        coordinate, values = self.hyperparameter.coordinate, list(self.knots.values())
        position = sum(w * coordinate.forward(values[j]) for j, w in self._weights(step).items())
        return coordinate.inverse(position)

    def rates(self, step: int) -> dict[int, float]:
        """d(value at a step)/d(value at a knot), by the index of the knot, where it is not 0."""
        slope, values = self.hyperparameter.coordinate.slope, list(self.knots.values())
        here = slope(self.value(step))
        return {j: w * here / slope(values[j]) for j, w in self._weights(step).items()}

    def moved(self, change: Sequence[float] | torch.Tensor) -> Schedule:
        """The schedule whose knots are moved in the coordinate, not beyond the bounds of the hyperparameter.

        Args:
            change: one number per knot.
        """
        lower, upper = self.hyperparameter.bounds
        coordinate = self.hyperparameter.coordinate
        pairs = zip(self.knots.items(), (float(c) for c in change), strict=True)
        return Schedule(
            self.name,
            {step: min(max(coordinate.inverse(coordinate.forward(v) + c), lower), upper) for (step, v), c in pairs},
        )

    def write(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Put the value of a step into every param group."""
        for group in optimizer.param_groups:
            self.hyperparameter.write(group, self.value(step))

    def _weights(self, step: int) -> dict[int, float]:
        steps = list(self.knots)
        right = bisect_right(steps, step)
        if right == 0 or right == len(steps):
            return {min(right, len(steps) - 1): 1.0}
        share = (step - steps[right - 1]) / (steps[right] - steps[right - 1])
        return {j: w for j, w in ((right - 1, 1.0 - share), (right, share)) if w}
