"""Keeps the last good state of a fit and goes back to it when the run has blown up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from hypergrad import Hyperparameter, Rewind, TrainingState, Tuner
from hypergrad.callbacks._attachment import Attachment


class Guard:
    """Hears of validation losses; see `Rewind` for the rules.

    Args:
        rewind: the rules.
        module, attachment: of the fit.
        tuner, learned: the hyperparameters of the optimizer and in the loss: their values go back too.
    """

    def __init__(
        self,
        rewind: Rewind,
        module: pl.LightningModule,
        attachment: Attachment,
        tuner: Tuner,
        learned: Mapping[str, Hyperparameter],
    ) -> None:
        self.rewound: list[tuple[int, int]] = []  # from which step back to which
        self._rewind, self._module, self._attachment = rewind, module, attachment
        self._first = math.nan
        self._good: tuple[int, TrainingState, dict[str, Any]] | None = None
        self._tuner, self._learned = tuner, learned

    def saw(self, loss: float) -> bool:
        """Take in a validation loss; True if the run has gone back because of it."""
        if math.isnan(self._first):
            self._first = loss
        if self._good is None or not self._rewind.has_blown_up(loss, self._first):
            return False
        if len(self.rewound) >= self._rewind.times:
            return False
        back, state, values = self._good
        state.install()
        self._put_values(values)
        self.rewound.append((self._attachment.steps, back))
        # Each time from the same state: smaller still.
        again = sum(to == back for _, to in self.rewound)
        self._attachment.scale_lr(self._rewind.shrink**-again)
        rank_zero_warn(
            f"HyperGradient: the validation loss was {loss:.3g} at step {self._attachment.steps}, after "
            f"{self._first:.3g} at first. The weights are those of step {back} again, and lr is "
            f"{self._rewind.shrink**again:g} times smaller."
        )
        return True

    def keep(self, loss: float) -> None:
        """The run stands well here, if its loss says so."""
        if not self._rewind.has_blown_up(loss, self._first if not math.isnan(self._first) else loss):
            state = TrainingState(self._module, self._attachment.optimizer)
            self._good = self._attachment.steps, state, self._values()

    def state_dict(self) -> dict[str, Any]:
        """The last good state, and what has been rewound."""
        return {
            "rewound": [list(pair) for pair in self.rewound],
            "first": self._first,
            "good": None if self._good is None else [self._good[0], self._good[1].state_dict(), self._good[2]],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the one that returned `state`."""
        self.rewound = [(start, end) for start, end in state["rewound"]]
        self._first = state["first"]
        if state["good"] is not None:
            step, saved, values = state["good"]
            good = TrainingState(self._module, self._attachment.optimizer)
            good.load_state_dict(saved)
            self._good = step, good, values

    def _values(self) -> dict[str, Any]:
        tensors = {name: h.value.detach().clone() for name, h in self._learned.items()}
        return {"offsets": self._tuner.offsets, "tensors": tensors}

    @torch.no_grad()
    def _put_values(self, values: dict[str, Any]) -> None:
        for key, offset in values["offsets"].items():
            self._tuner.place(key, offset)
        for name, h in self._learned.items():
            h.value.copy_(values["tensors"][name])
