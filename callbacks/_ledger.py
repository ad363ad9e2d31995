"""What a run has cost beside training: gradients by kind, and time."""

from __future__ import annotations

from typing import Any

import torch

from hypergrad import Estimator, Exact
from hypergrad.callbacks._history import Stopwatch

_COUNTS = ("training_batches", "gradients", "products")


class Ledger:
    """The accounts of one run.

    Args:
        device: that does the work.
        estimator: whose Hessian-vector products are counted; one by differences is a gradient, and counted as that.
    """

    def __init__(self, device: torch.device, estimator: Estimator) -> None:
        self.training_batches = 0
        self.gradients = 0  # of the validation loss
        self.products = 0  # Hessian-vector products
        self.per_product = 2.0 if isinstance(getattr(estimator, "curvature", None), Exact) else 0.0
        self._device = device
        self.updates = Stopwatch(device)
        self.training = Stopwatch(device)
        self.tracking = Stopwatch(device)  # ours, and within training steps

    def cost(self, replays: int, others: float) -> float:
        """Gradients over those of plain training.

        Args:
            replays: training gradients taken again.
            others: what race and scores have cost, in gradients.
        """
        spent = self.gradients + replays + self.per_product * self.products + others
        return 1.0 + spent / max(self.training_batches, 1)

    def words(self, replays: int) -> str:
        """Gradients and time in words."""
        tracking = self.tracking.seconds
        own, training = self.updates.seconds + tracking, self.training.seconds - tracking
        ratio = f"{1 + own / training:.2f}x" if training > 0 else "unknown against"
        return (
            f"{self.gradients} validation gradients"
            + (f" and {replays} further training gradients" if replays else "")
            + f" beside {self.training_batches} training gradients, {ratio} the training steps' own time of "
            f"{training:.1f} s"
        )

    def state_dict(self) -> dict[str, Any]:
        """Counts and seconds."""
        watches = (self.updates, self.training, self.tracking)
        return {**{name: getattr(self, name) for name in _COUNTS}, "seconds": [watch.seconds for watch in watches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.updates, self.training, self.tracking = (Stopwatch(self._device, s) for s in state["seconds"])
