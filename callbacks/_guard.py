"""Keeps the last good state of a fit and goes back to it when the run has blown up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from hypergrad import Hyperparameter, Rewind, TrainingState, Tuner, notable
from hypergrad.callbacks._agreement import mean
from hypergrad.callbacks._attachment import Attachment
from hypergrad.callbacks._lightning import unscaled
from hypergrad.callbacks._placement import beside


@dataclass(frozen=True)
class _Saved:
    """Where a run can go back to."""

    step: int
    state: TrainingState
    values: dict[str, Any]  # of hyperparameters
    best: float  # validation and mean training loss until then
    best_trained: float

    def state_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "state": self.state.state_dict()}


class Guard:
    """Hears of losses; see `Rewind` for the rules.

    Args:
        rewind: the rules.
        steps: of the whole run.
        trainer, module, attachment: of the fit.
        tuner, learned: the hyperparameters of the optimizer and in the loss: their values go back too.
    """

    def __init__(
        self,
        rewind: Rewind,
        steps: int,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        attachment: Attachment,
        tuner: Tuner,
        learned: Mapping[str, Hyperparameter],
    ) -> None:
        self.rewound: list[tuple[int, int]] = []  # from which step back to which
        self._rewind, self._steps = rewind, steps
        self._trainer, self._module, self._attachment = trainer, module, attachment
        self._first = self._best = math.nan  # of the validation loss
        self._first_trained: torch.Tensor | None = None
        self._best_trained = math.inf  # of the means between two checkpoints
        self._sum: torch.Tensor | None = None  # on the device, so that a step does not wait for it
        self._summed = 0
        self._began = attachment.steps
        self._tuner, self._learned = tuner, learned
        self._good = self._here()
        self._start: _Saved | None = self._good  # while there is time to begin anew

    def lost(self, loss: torch.Tensor) -> None:
        """Take in the loss of a training batch, which may be scaled for float16."""
        if loss.numel() != 1:  # manual optimization may go back from anything
            return
        loss = unscaled(self._trainer, loss.detach().reshape(()))
        if self._first_trained is None:
            self._first_trained = loss.clone()
        self._sum = loss.clone() if self._sum is None else self._sum.add_(loss)
        self._summed += 1

    def begin_at(self, untrained: float) -> None:
        """Training in earnest begins: whatever came before was a trial, and this the loss that it began at."""
        self._first = self._best = untrained
        self._sum, self._summed = None, 0
        # The weights of then, with what has been found since.
        self._good = self._start = replace(self._good, values=self._values(), best=untrained)

    def saw(self, loss: float) -> bool:
        """Take in a validation loss; True if the run has gone back because of it."""
        if math.isnan(self._first):
            self._first = loss
        if math.isnan(self._first):  # there has been no number yet to compare with
            return False
        return self._rewind.has_blown_up(loss, self._first) and self._go_back(self._good, loss)

    def at_checkpoint(self, loss: float) -> bool:
        """The same for a loss that is always of the same batches; the run may stand well, and be kept as it is."""
        trained, first = self._mean_trained()
        if self.saw(loss):
            return True
        self._best = loss if math.isnan(self._best) else min(self._best, loss)
        self._best_trained = min(self._best_trained, first, trained)
        is_worse = self._rewind.has_relapsed(loss, self._first, self._best)
        trains_worse = not trained <= self._best_trained + notable(first) and math.isfinite(first)
        learns = not self._best_trained >= first - notable(first)
        unlearns = learns and loss >= self._first and self._rewind.has_relapsed(trained, first, self._best_trained)
        if self._attachment.steps > self._rewind.anew * self._steps:
            self._start = None
        if (is_worse and trains_worse) or unlearns:
            return self._go_back(self._start or self._good, loss)
        if self._start is not None and not learns and loss >= self._first and self._is_late():
            return self._go_back(self._start, loss)
        if (learns or loss < self._first) and not (is_worse and trained > self._best_trained):
            self._good = self._here()
        return False

    def state_dict(self) -> dict[str, Any]:
        """The last good state, what has been rewound, and the losses that are looked back at."""
        scalars = (None if t is None else t.clone() for t in (self._first_trained, self._sum))  # it is added to
        return {
            "rewound": [list(pair) for pair in self.rewound],
            "first": self._first,
            "good": self._good.state_dict(),
            "start": None if self._start is None or self._start is self._good else self._start.state_dict(),
            "at_start": self._start is self._good,
            "losses": [self._best, self._best_trained, *scalars, self._summed],
            "began": self._began,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the one that returned `state`."""
        self.rewound = [(start, end) for start, end in state["rewound"]]
        self._first = state["first"]
        if isinstance(state["good"], dict):  # older versions wrote something else
            self._good = self._read(state["good"])
            self._start = self._good if state["at_start"] else state["start"] and self._read(state["start"])
        self._began = state.get("began", self._began)
        if "losses" in state:  # not in those of versions that knew no relapse
            self._best, self._best_trained, *scalars, self._summed = state["losses"]
            self._first_trained, self._sum = (
                None if t is None else t.to(self._module.device, copy=True) for t in scalars
            )

    def _is_late(self) -> bool:
        """Whether something should have been learned since the start, or the last way back."""
        since = self.rewound[-1][0] if self.rewound else self._began
        return bool(self._attachment.steps - since >= self._rewind.patience * self._steps)

    def _mean_trained(self) -> tuple[float, float]:
        """The mean training loss since the last checkpoint and the first one, of all ranks; NaN where unknown."""
        pair = [math.nan if t is None else float(t) for t in (self._sum, self._first_trained)]
        pair[0] /= max(self._summed, 1)
        self._sum, self._summed = None, 0
        # Every rank takes part, also one that has nothing to say.
        trained, first = mean(self._trainer, torch.tensor(pair, dtype=torch.float32)).tolist()
        return trained, first

    def _go_back(self, to: _Saved, loss: float) -> bool:
        if len(self.rewound) >= self._rewind.times:
            return False
        to.state.install()
        self._put_values(to.values)
        self._best, self._best_trained = to.best, to.best_trained
        self._sum, self._summed = None, 0  # losses of what is given up
        self.rewound.append((self._attachment.steps, to.step))
        # Each time from the same state: smaller still.
        again = sum(step == to.step for _, step in self.rewound)
        self._attachment.scale_lr(self._rewind.shrink**-again)
        rank_zero_warn(
            f"HyperGradient: the validation loss was {loss:.3g} at step {self._attachment.steps}, after "
            f"{self._first:.3g} at first. The weights are those of step {to.step} again, and lr is "
            f"{self._rewind.shrink**again:g} times smaller."
        )
        return True

    def _read(self, saved: dict[str, Any]) -> _Saved:
        state = self._state()
        state.load_state_dict(saved["state"])
        return _Saved(**{**saved, "state": state})

    def _here(self) -> _Saved:
        return _Saved(self._attachment.steps, self._state(), self._values(), self._best, self._best_trained)

    def _state(self) -> TrainingState:
        """A copy of where the training stands, on the host: it is seldom gone back to."""
        return TrainingState(self._module, self._attachment.optimizer, beside(self._module.device))

    def _values(self) -> dict[str, Any]:
        tensors = {name: h.value.detach().clone() for name, h in self._learned.items()}
        return {"offsets": self._tuner.offsets, "tensors": tensors}

    @torch.no_grad()
    def _put_values(self, values: dict[str, Any]) -> None:
        for key, offset in values["offsets"].items():
            self._tuner.place(key, offset)
        for name, h in self._learned.items():
            h.value.copy_(values["tensors"][name])
