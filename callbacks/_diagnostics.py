"""What a run's report looks back at, and training does not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Diagnostics:
    """Losses that hypergradients foretold, and those that the Trainer measured on data of its own.

    Args:
        predicted: by checkpoint of the readout, the change of the validation loss since the last one.
        monitored: step and monitored value, the lower the better, of each validation of the Trainer.
    """

    predicted: list[float] = field(default_factory=list)
    monitored: list[tuple[int, float]] = field(default_factory=list)
    _foretold: float = 0.0

    def foretell(self, change: float) -> None:
        """The validation loss is expected to change by so much more until the next checkpoint."""
        self._foretold += change

    def checkpoint(self) -> None:
        """The readout has judged the weights."""
        self.predicted.append(self._foretold)
        self._foretold = 0.0

    def state_dict(self) -> list[Any]:
        """Plain containers."""
        return [list(map(list, self.monitored)), list(self.predicted), self._foretold]

    def load_state_dict(self, state: list[Any]) -> None:
        """Be the one that returned `state`."""
        monitored, predicted, self._foretold = state
        self.predicted = list(predicted)
        self.monitored = [(step, value) for step, value in monitored]
