"""The columns of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypergrad import Estimator, Exact, FiniteDifference, Forward, Implicit, Neumann, Online, Unrolled

# Name -> estimator, and what it learns: names of the optimizer's, and whether the penalty in the loss.
ESTIMATORS: dict[str, tuple[Callable[[], Estimator], tuple[str, ...], bool]] = {
    "Online": (Online, ("lr", "weight_decay"), False),
    "Online, in the loss": (Online, ("lr",), True),
    "Forward, exact": (lambda: Forward(curvature=Exact()), ("lr", "weight_decay"), False),
    "Forward, difference": (lambda: Forward(curvature=FiniteDifference()), ("lr", "weight_decay"), False),
    "Unrolled": (lambda: Unrolled(steps=3), ("lr",), True),
    "Implicit": (lambda: Implicit(solver=Neumann(terms=3), damping=1.0), (), True),
}


def settings(name: str, module: Any) -> dict[str, Any]:
    """Arguments of the callback, for one module."""
    make, names, in_loss = ESTIMATORS[name]
    return {"estimator": make(), "hyperparameters": (*names, *([module.l2] if in_loss else []))}
