"""The two interfaces of an estimator: what a user names, and what follows one optimizer along a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hypergrad.curvature import Evaluation
from hypergrad.errors import HyperparameterError
from hypergrad.hyperparameter import OptimizerHyperparameter
from hypergrad.schedule import Schedule

# The values of hyperparameters in the loss, by name.
Tensors = Mapping[str, torch.Tensor]
# One value per param group, tensor or for all of them, or one curve over the steps for all of them.
Learned = OptimizerHyperparameter | Schedule


@dataclass(frozen=True)
class Contraction:
    """Validation gradient times d(parameters)/d(hyperparameter), per hyperparameter.

    For a hyperparameter of the optimizer all tensors have shape `(groups,)`, `(1,)` where it is shared and `(tensors,)`
    per tensor; for a `Schedule` of one `(knots,)`, for one in the loss that of its value.
    They stay on the parameters' device and are float32 or wider. A group that the steps did not move has zeros.

    Args:
        hypergradients: d(val_loss)/d(value), in natural units.
        tangent_norms: the Euclidean norm of d(parameters)/d(value), where the estimator knows it: going backwards
            through a run never forms that derivative.
        gradient_norms: the Euclidean norm of the validation gradient on the parameters that the number acts on, where
            `tangent_norms` has an entry.
        status: `"ok"`, or what was wrong and what to do about it.
        residual: of an implicit estimator: |(H + damping) x - g| / |g| of the linear system that it solved.
        products: Hessian-vector products spent on it, since the last one.
        unused: hyperparameters on which no gradient of a training loss depended, in the steps that were differentiated.
    """

    hypergradients: dict[str, torch.Tensor]
    tangent_norms: dict[str, torch.Tensor]
    gradient_norms: dict[str, torch.Tensor]
    status: str = "ok"
    residual: float | None = None
    products: int = 0
    unused: tuple[str, ...] = ()


class Tracker(ABC):
    """Follows one optimizer: told when a step is about to happen, asked for the hypergradient after it."""

    @property
    @abstractmethod
    def params(self) -> Sequence[torch.Tensor]:
        """The parameters and loss hyperparameters whose validation gradient `contract` needs; empty at the start."""

    @property
    def needs_loss(self) -> bool:
        """Whether steps must be tracked with an evaluation of their training loss."""
        return False

    @property
    def needs_graph(self) -> bool:
        """Whether a `TakenStep` would save the coming `before_step` an evaluation."""
        return False

    @property
    def needs_pattern(self) -> bool:
        """Whether the loss of the coming `before_step` should be a `HeldLoss`, which knows the pieces it was on."""
        return False

    @abstractmethod
    def before_step(self, loss: Evaluation | None = None) -> None:
        """Call between the final gradient and the update, on every step that is to be tracked.

        Args:
            loss: evaluates the training loss of this step, now or later; needed where `needs_loss`.
        """

    def after_step(self) -> None:  # noqa: B027 (an estimator may have nothing to read off the step)
        """Call right after the update of a tracked step, before anything else can touch the parameters."""

    @abstractmethod
    def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
        """The hypergradient, from the validation gradient at the parameters after the step. Call once per step.

        Args:
            gradients: the validation gradient of each tensor in `params`, in its shape.
        """

    @property
    def losses(self) -> Sequence[Evaluation | None]:
        """The losses of earlier steps that later ones will be differentiated with; they are not in `state_dict`."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What is carried from step to step: tensors, numbers and strings in plain containers."""
        return {}

    def load_state_dict(  # noqa: B027 (most estimators carry nothing)
        self, state: dict[str, Any], losses: Sequence[Evaluation | None] = ()
    ) -> None:
        """Continue as the tracker that returned `state`, of the same optimizer and hyperparameters.

        Args:
            losses: what its `losses` were, in their order.
        """


class Estimator(ABC):
    """A way to compute hypergradients: settings only, so that one object can serve many optimizers and runs."""

    @property
    def needs_every_step(self) -> bool:
        """Whether every step of a run must be tracked, and not only the one before a validation loss."""
        return False

    @abstractmethod
    def track(
        self,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[Learned],
        tensors: Tensors | None = None,
    ) -> Tracker:
        """Start to follow an optimizer.

        Args:
            hyperparameters: those of the optimizer.
            tensors: the values of those in the training loss, which the loss reads from these very tensors.

        Raises:
            UnsupportedOptimizerError: for an optimizer that this estimator cannot differentiate.
            HyperparameterError: for a hyperparameter on which the optimizer's step does not depend, or that this
                estimator cannot serve.
        """


def without_schedules(hyperparameters: Sequence[Learned], estimator: str) -> list[OptimizerHyperparameter]:
    """All of them, for an estimator that cannot serve schedules.

    Raises:
        HyperparameterError: if there is one.
    """
    for h in hyperparameters:
        if isinstance(h, Schedule):
            raise HyperparameterError(
                f"{estimator} cannot serve {h!r}: what a knot does shows over a whole run. Use Forward() or Unrolled()."
            )
    return [h for h in hyperparameters if isinstance(h, OptimizerHyperparameter)]


def plain(hyperparameter: Learned) -> OptimizerHyperparameter:
    """The hyperparameter itself, or the one that a schedule is of."""
    return hyperparameter.hyperparameter if isinstance(hyperparameter, Schedule) else hyperparameter


class Pace:
    """How far one hyperparameter's value moves at each step of a run, when it moves by one natural unit now.

    What moves is its coordinate, for the whole run: under a schedule a learning rate that is 1% higher is so at every
    step, and moves less where the schedule is low. Where the value never changes, all of that is 1.
    """

    def __init__(self) -> None:
        self.slope: float | None = None
        self._begun = False

    def step(self, hyperparameter: OptimizerHyperparameter, value: float) -> tuple[float, bool]:
        """The rate of the coming step, and whether what came before is to be forgotten.

        A value of 0 cannot move in a logarithm: steps that have it count for nothing once another value is seen, and
        by the natural unit while there is none.
        """
        slope, fresh = hyperparameter.coordinate.slope(value), self.slope is None
        begun, self._begun = self._begun, True
        if slope > 0.0:
            self.slope = slope
            return slope, fresh and begun
        return 1.0 if self.slope is None else 0.0, False

    @property
    def unit(self) -> float:
        """What turns a derivative at these rates into one per natural unit."""
        return 1.0 if self.slope is None else 1.0 / self.slope

    def state_dict(self) -> dict[str, Any]:
        """The last slope."""
        return {"slope": self.slope, "begun": self._begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the pace that returned `state`."""
        self.slope, self._begun = state["slope"], state["begun"]


def wide(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """float64 if any of the tensors has it, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def norm(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The Euclidean norm of all of them together."""
    if not tensors:
        return torch.zeros((), dtype=dtype)
    norms = torch.stack([torch.linalg.vector_norm(t.to(dtype)) for t in tensors])
    whole: torch.Tensor = torch.linalg.vector_norm(norms)
    return whole
