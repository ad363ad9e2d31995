"""From noisy hypergradients to moves: the interface of a controller."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# A number for one coordinate; a tensor, element by element, for a hyperparameter in the loss that has several.
Move = float | torch.Tensor


@dataclass(frozen=True)
class Reading:
    """One hyperparameter of one param group, or one in the loss, measured once, in its unconstrained coordinate u.

    Args:
        key: identifies the coordinate along the run.
        slope: d(objective)/du, finite; the objective is to be made smaller. A tensor for several coordinates at once.
        cosine: the cosine between the gradient of the objective and d(parameters)/du, in [-1, 1]; None where the
            estimator does not know it, because it goes backwards.
        name: the hyperparameter's name, such as `"lr"` or `"betas[0]"`.
    """

    key: str
    slope: Move
    cosine: Move | None
    name: str = ""

    @property
    def strength(self) -> Move:
        """The cosine, which is free of the scale of the loss; where it is not known, the slope."""
        return self.slope if self.cosine is None else self.cosine


class Controller(ABC):
    """Decides how far each coordinate moves after a measurement. Bounds are enforced elsewhere, by the `Tuner`.

    A controller is a pure object: numbers in, numbers out, all its memory in `state_dict`.
    """

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({settings})"

    def begin(self, updates: int | None) -> None:  # noqa: B027 (most do not pace themselves)
        """A run begins in which there will be so many readings of each coordinate; None where that is not known."""

    @abstractmethod
    def moves(self, readings: Sequence[Reading]) -> Sequence[Move]:
        """The change of u for each reading, in order. Finite; 0 leaves the hyperparameter as it is.

        For a tensor a tensor of its shape, or one number for all of its elements.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decision depends on: numbers, strings and tensors in plain containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (stateless controllers have none)
        """Continue as the controller that returned `state`."""
