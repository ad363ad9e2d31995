"""Curvature by differences inside a Trainer: on the pieces of the step, also of layers that are frozen meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hypergrad import Curvature, Exact, FiniteDifference, Forward, Hold
from hypergrad.callbacks import HyperGradient
from hypergrad.callbacks._history import Update
from tests.callbacks.modules import Net, fit, trainer
from tests.callbacks.test_estimators import DoubleData


class Kinked(Net):
    """Many units that switch, some of them seldom on."""

    def __init__(self) -> None:
        super().__init__("Adam", lr=3e-3)
        self.net = nn.Sequential(nn.Linear(5, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_a_difference_sees_only_the_pieces_that_the_step_was_on(tmp_path: Path, options: dict[str, Any]) -> None:
    found = {}
    for curvature in (Exact(), FiniteDifference()):
        torch.manual_seed(0)
        callback = HyperGradient("lr", estimator=Forward(1.0, curvature), controller=Hold(), every_n_steps=12)
        fit(Kinked(), callback, tmp_path, **{"max_epochs": 4, **options})
        found[curvature] = callback.history[-1].hypergradients["lr"]
    assert found[FiniteDifference()] == pytest.approx(found[Exact()], rel=1e-2)


class Freezes(Net):
    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.trainer.current_epoch == 0)


@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference()], ids=["exact", "difference"])
def test_what_is_frozen_meanwhile_is_still_differentiated(tmp_path: Path, curvature: Curvature) -> None:
    def run(lr: float) -> Update:
        torch.manual_seed(0)
        callback = HyperGradient(
            "lr",
            estimator=Forward(1.0, curvature),
            controller=Hold(),
            every_n_steps=12,
            val_dataloaders=DoubleData(n=16, seed=1),
        )
        fitted = trainer(tmp_path, callbacks=[callback], precision="64-true", max_epochs=2)
        fitted.fit(Freezes("SGD", lr=lr, momentum=0.9).double(), DoubleData(), DoubleData(seed=1))
        return callback.history[-1]

    ends = [run(0.1 + h).val_loss for h in (1e-4, -1e-4)]
    assert run(0.1).hypergradients["lr"] == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5)
