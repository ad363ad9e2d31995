"""The two interfaces of an estimator: what a user names, and what follows one optimizer along a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hypergrad.curvature import Evaluation
from hypergrad.hyperparameter import OptimizerHyperparameter


@dataclass(frozen=True)
class Contraction:
    """Validation gradient times d(parameters)/d(hyperparameter), per hyperparameter and param group.

    All tensors have shape `(groups,)`, stay on the parameters' device and are float32 or wider. A group that the
    step did not move has zeros.

    Args:
        hypergradients: d(val_loss)/d(value), in natural units.
        tangent_norms: the Euclidean norm of d(parameters)/d(value of the group).
        gradient_norms: the Euclidean norm of the validation gradient on the parameters that the group's
            hyperparameters act on.
    """

    hypergradients: dict[str, torch.Tensor]
    tangent_norms: dict[str, torch.Tensor]
    gradient_norms: torch.Tensor


class Tracker(ABC):
    """Follows one optimizer: told when a step is about to happen, asked for the hypergradient after it."""

    @property
    @abstractmethod
    def params(self) -> Sequence[torch.Tensor]:
        """The parameters whose validation gradient `contract` needs; empty before the first tracked step."""

    @abstractmethod
    def before_step(self, loss: Evaluation | None = None) -> None:
        """Call between the final gradient and the update, on every step that is to be tracked.

        Args:
            loss: evaluates the training loss of this step; needed where `Estimator.needs_training_loss`.
        """

    def after_step(self) -> None:  # noqa: B027 (an estimator may have nothing to read off the step)
        """Call right after the update of a tracked step, before anything else can touch the parameters."""

    @abstractmethod
    def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
        """The hypergradient, from the validation gradient at the parameters after the step. Call once per step.

        Args:
            gradients: the validation gradient of each tensor in `params`, in its shape.
        """


class Estimator(ABC):
    """A way to compute hypergradients: settings only, so that one object can serve many optimizers and runs."""

    @property
    def needs_every_step(self) -> bool:
        """Whether every step of a run must be tracked, and not only the one before a validation loss."""
        return False

    @property
    def needs_training_loss(self) -> bool:
        """Whether steps must be tracked with an evaluation of their training loss."""
        return False

    @abstractmethod
    def track(self, optimizer: torch.optim.Optimizer, hyperparameters: Sequence[OptimizerHyperparameter]) -> Tracker:
        """Start to follow an optimizer.

        Raises:
            UnsupportedOptimizerError: for an optimizer that this estimator cannot differentiate.
            HyperparameterError: for a hyperparameter on which the optimizer's step does not depend.
        """
