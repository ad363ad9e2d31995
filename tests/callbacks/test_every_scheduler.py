"""Every scheduler of torch, per step and per epoch: it never sees what is learned, and what is learned follows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import lr_scheduler as schedules

from hypergrad import Controller, Descent, Hold
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Stateful, data, trainer

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda t: min(1.0, (t + 1) / 3)),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda t: 0.8),
    "StepLR": lambda o: schedules.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 3], 0.4),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 2),  # the momentum, too
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.25, total_iters=2), schedules.ExponentialLR(o, 0.8)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ExponentialLR(o, 0.9), schedules.ConstantLR(o, 0.5, 2)]
    ),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.7, patience=0, threshold=0.1),
}


class Scheduled(Stateful):
    def __init__(self, scheduler: str, interval: str) -> None:
        super().__init__("SGD", lr=0.1, momentum=0.9, weight_decay=0.01)
        self.scheduler, self.interval = scheduler, interval

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        watched = "train_loss" if self.interval == "step" else "val_loss"
        config = {"scheduler": SCHEDULERS[self.scheduler](optimizer), "interval": self.interval, "monitor": watched}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Watch(pl.Callback):
    """What stands in the param groups when a batch begins and when it ends."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        (group,) = trainer.optimizers[0].param_groups
        self.seen.append({k: v for k, v in group.items() if isinstance(v, float)})

    on_train_batch_end = on_train_batch_start


def _run(tmp: Path, scheduler: str, interval: str, controller: Controller | None) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    module, watch, ours = Scheduled(scheduler, interval), Watch(), []
    if controller is not None:
        ours = [HyperGradient(val_dataloaders=data(32, seed=2), every_n_steps=1, controller=controller)]
    fitted = trainer(tmp, callbacks=[*ours, watch], num_sanity_val_steps=0, max_epochs=4)
    fitted.fit(module, data(32), data(16, seed=1))
    optimizer = fitted.optimizers[0].state_dict()
    return (module.state_dict(), optimizer), watch.seen, ours[0].history if ours else []


def test_all_are_here() -> None:
    assert SCHEDULERS.keys() == set(schedules.__all__) - {"LRScheduler"}


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_torch_scheduler(tmp_path: Path, scheduler: str, interval: str) -> None:
    end, seen, _ = _run(tmp_path, scheduler, interval, None)
    held_end, held_seen, held = _run(tmp_path, scheduler, interval, Hold())
    torch.testing.assert_close(held_end, end, rtol=0, atol=0)
    assert held_seen == seen
    scheduled = [at["lr"] for at in seen[::2]]
    assert len(set(scheduled)) > 1  # it does something
    assert [update.values["lr"] for update in held] == scheduled
    _, moved_seen, moved = _run(tmp_path, scheduler, interval, Descent(0.3))
    if scheduler != "ReduceLROnPlateau":  # whose schedule is another one where the losses are
        assert moved_seen == seen
    at_start = [at["lr"] for at in moved_seen[::2]]
    factors = [update.values["lr"] / lr for update, lr in zip(moved, at_start, strict=True) if lr > 0.0]
    assert factors[0] == 1.0
    assert max(abs(f - 1.0) for f in factors) > 0.05
