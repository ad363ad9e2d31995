"""Learned values beside an LR schedule, which sees its own values only."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from hypergrad import Hold
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, fit


def test_learned_values_stand_in_param_groups_only_during_the_update(tmp_path: Path) -> None:
    class Looks(Net):
        seen: set[float]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.add(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.seen.add(optimizer.param_groups[0]["lr"])

    module = Looks()
    module.seen = set()
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fit(module, callback, tmp_path)
    assert module.seen == {0.01}
    assert len({u.values["lr"] for u in callback.history}) > 5


def test_learned_factor_multiplies_the_schedule(tmp_path: Path) -> None:
    class Scheduled(Net):
        seen: list[float]

        def configure_optimizers(self) -> Any:
            self.seen = []
            optimizer = super().configure_optimizers()
            warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen.append(self.optimizers().param_groups[0]["lr"])

    module = Scheduled(lr=0.001)
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fit(module, callback, tmp_path)
    scheduled = [0.001 * t / 10 for t in range(18)]
    # The scheduler has stepped by the end of the batch, and sees its own values only.
    assert module.seen == pytest.approx([*scheduled[1:], 0.0018])
    assert callback.history[0].values["lr"] == 0.0
    assert callback.history[0].hypergradients["lr"] < 0.0
    assert "times the schedule)" in callback.summary()
    factors = [u.values["lr"] / s for u, s in zip(callback.history[1:], scheduled[1:], strict=True)]
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] > 2.0
    assert all(0.6 < b / a < 1.7 for a, b in itertools.pairwise(factors))


def test_hand_written_warm_up_in_optimizer_step(tmp_path: Path) -> None:
    class WarmUp(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.001 * min(1.0, (self.global_step + 1) / 10)
            optimizer.step(closure=closure)

    callback = HyperGradient(("lr",), val_dataloaders=data(seed=2), every_n_steps=1, controller=Hold())
    fit(WarmUp(), callback, tmp_path)
    assert [u.values["lr"] for u in callback.history[:3]] == pytest.approx([1e-4, 2e-4, 3e-4])


@pytest.mark.parametrize("loaded", [False, True])
def test_steps_use_the_learned_value_whatever_becomes_of_the_groups(tmp_path: Path, loaded: bool) -> None:
    """New group objects, a value set by hand, the same value again: each step has the factor on what stands there."""

    class Reloads(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            if loaded:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.param_groups[0]["lr"] = (0.01, 0.01, 0.005, 0.005, 0.01, 0.02)[batch_idx]

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(self.watch)
            return optimizer

        def watch(self, optimizer: Any, *_: Any) -> None:
            factors.append(optimizer.param_groups[0]["lr"] / scheduled[len(factors)])

    scheduled = (0.01, 0.01, 0.005, 0.005, 0.01, 0.02) * 3
    factors: list[float] = []
    callback = HyperGradient("lr", val_dataloaders=data(seed=2), every_n_steps=4)
    fit(Reloads("SGD"), callback, tmp_path)
    measured = [u.values["lr"] / scheduled[u.step - 1] for u in callback.history]
    assert [factors[u.step - 1] for u in callback.history] == pytest.approx(measured)
    # Between two hypergradients the factor is one and the same.
    for at in range(4, 16, 4):
        assert factors[at : at + 4] == pytest.approx([factors[at]] * 4)
    assert len({round(f, 6) for f in factors}) == 5
