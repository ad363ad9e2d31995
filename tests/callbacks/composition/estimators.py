"""The columns of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypergrad import CG, Estimator, Exact, FiniteDifference, Forward, Implicit, Online, Unrolled

DAMPING = 5.0  # the Hessian of the small module, which is not trained to a minimum, has eigenvalues below 0


@dataclass(frozen=True)
class Column:
    """One estimator.

    Args:
        names: what it learns of the optimizer's.
        in_loss: whether it learns the penalty in the loss.
        whole: whether it differentiates all steps of the run, or the last one only.
        tolerance: relative, of its hypergradients in float64.
    """

    estimator: Estimator
    names: tuple[str, ...] = ("lr", "weight_decay")
    in_loss: bool = False
    whole: bool = True
    tolerance: float = 1e-5


ESTIMATORS = {
    "Online": Column(Online(), whole=False),
    "Online, in the loss": Column(Online(), ("lr",), in_loss=True, whole=False),
    "Forward, exact": Column(Forward(curvature=Exact())),
    "Forward, difference": Column(Forward(curvature=FiniteDifference()), tolerance=1e-3),
    "Unrolled": Column(Unrolled(steps=50), ("lr",), in_loss=True),
    "Implicit": Column(Implicit(CG(iterations=300, tolerance=1e-10), damping=DAMPING), (), in_loss=True),
}


def settings(name: str, module: Any) -> dict[str, Any]:
    """Arguments of the callback, for one module."""
    column = ESTIMATORS[name]
    learned = (*column.names, *([module.l2] if column.in_loss else []))
    return {"estimator": column.estimator, "hyperparameters": learned}
