"""Keeps the best weights that a fit has seen, raw or averaged, and puts them into the module at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hypergrad import Best, Readout, copied, exchange_tensors, live_tensors, write_tensors
from hypergrad.callbacks._placement import beside


class Keeper:
    """Averages every few steps and judges at every checkpoint.

    The best weights so far stand by on the host, for they are seldom touched.

    Args:
        readout: when, and with what window.
        steps: of the whole run.
        module: whose weights are kept.
        score: the validation loss of the module as it stands.
    """

    def __init__(self, readout: Readout, steps: int, module: torch.nn.Module, score: Callable[[], float]) -> None:
        self.best = Best()
        self.scores: list[tuple[int, float, float]] = []  # step, raw, averaged
        self._readout, self._steps, self._module, self._score = readout, steps, module, score
        self._stride = readout.stride(steps)
        # Where the averaged tensors are: to walk through the module at every step would cost more than to average.
        self._places: dict[str, tuple[torch.nn.Module, str]] = {}
        self._average: dict[str, torch.Tensor] = {}
        self._averaged = 0
        self._kept: dict[str, torch.Tensor] = {}

    def after_step(self, step: int) -> float | None:
        """Take the state after so many steps into the average; at a checkpoint judge it and return its own score."""
        due = self._readout.is_due(step, self._steps)
        if self._averaged == 0 or due:
            self._places = _places(self._module)
        if self._averaged == 0 or step % self._stride == 0:
            self._take_in()
        if not due:
            return None
        self._judge(step)
        return self.scores[-1][1]

    def forget_average(self) -> None:
        """Begin the average anew: the weights have been put back."""
        self._averaged = 0

    def finish(self, step: int) -> Best:
        """Put the best into the module; a run that ended between two checkpoints is judged once more."""
        if self._averaged and (not self.scores or self.scores[-1][0] != step):
            self._judge(step)
        if self._kept:
            write_tensors(self._module, self._kept)
        return self.best

    def state_dict(self) -> dict[str, Any]:
        """The average, the best weights so far and their scores."""
        return {
            "best": [self.best.score, self.best.kind, self.best.step],
            "scores": [list(row) for row in self.scores],
            "average": dict(self._average),
            "averaged": self._averaged,
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the one that returned `state`."""
        live = live_tensors(self._module)
        self.best = Best(*state["best"])
        self.scores = [(int(step), raw, averaged) for step, raw, averaged in state["scores"]]
        self._averaged = state["averaged"]
        self._places = _places(self._module)
        self._average = {name: t.to(live[name].device) for name, t in state["average"].items() if name in live}
        kept = {name: (t, live[name].device) for name, t in state["kept"].items() if name in live}
        self._kept = {name: t.to(beside(device) or device) for name, (t, device) in kept.items()}

    def _take_in(self) -> None:
        now = [getattr(owner, leaf) for owner, leaf in self._places.values()]
        self._averaged += 1
        shapes = {name: t.shape for name, t in zip(self._places, now, strict=True)}
        if self._averaged == 1 or {name: t.shape for name, t in self._average.items()} != shapes:
            copies = (t.detach().clone() for t in now)
            self._average, self._averaged = dict(zip(self._places, copies, strict=True)), 1
        else:
            weight = self._readout.weight(self._averaged, self._steps)
            _averaging(weight)(list(self._average.values()), now, None)

    def _judge(self, step: int) -> None:
        raw = self._score()
        if self.best.beaten_by(raw, "raw", step):
            self._keep()
        exchange_tensors(self._module, self._average)
        try:
            averaged = self._score()
            if self.best.beaten_by(averaged, "averaged", step):
                self._keep()
        finally:
            exchange_tensors(self._module, self._average)
        self.scores.append((step, raw, averaged))

    def _keep(self) -> None:
        self._kept = {}  # first, so that there are not two of them
        self._kept = {name: copied(t, beside(t.device)) for name, t in live_tensors(self._module).items()}


@lru_cache(maxsize=1)  # after a window the weight stays the same
def _averaging(weight: float) -> Any:
    return get_ema_multi_avg_fn(1.0 - weight)  # type: ignore[no-untyped-call]


def _places(module: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """Owner and attribute of every tensor of floating point, by name."""
    places = {}
    for name, t in live_tensors(module).items():
        owner, _, leaf = name.rpartition(".")
        if t.is_floating_point():
            places[name] = module.get_submodule(owner), leaf
    return places
