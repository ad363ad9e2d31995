"""From noisy hypergradients to moves: the interface of a controller."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reading:
    """One hyperparameter of one param group, measured once, in its unconstrained coordinate u.

    Args:
        key: identifies the coordinate along the run.
        slope: d(objective)/du, finite; the objective is to be made smaller.
        cosine: the cosine between the gradient of the objective and d(parameters)/du, in [-1, 1].
        name: the hyperparameter's name, such as `"lr"` or `"betas[0]"`.
    """

    key: str
    slope: float
    cosine: float
    name: str = ""


class Controller(ABC):
    """Decides how far each coordinate moves after a measurement. Bounds are enforced elsewhere, by the `Tuner`.

    A controller is a pure object: floats in, floats out, all its memory in `state_dict`.
    """

    @abstractmethod
    def moves(self, readings: Sequence[Reading]) -> list[float]:
        """The change of u for each reading, in order. Finite; 0 leaves the hyperparameter as it is."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decision depends on: numbers and strings in plain containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (stateless controllers have none)
        """Continue as the controller that returned `state`."""
