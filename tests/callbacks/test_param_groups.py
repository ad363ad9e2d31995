"""Several param groups, several optimizers, and groups that come and go during the fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, fit


def test_param_groups_learn_apart_and_excluded_ones_stay_excluded(tmp_path: Path) -> None:
    class Groups(Net):
        def configure_optimizers(self) -> Any:
            weights = {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": 0.1, "name": "weights"}
            biases = {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 1e-4}
            return torch.optim.AdamW([weights, biases], lr=1e-3)

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fitted = fit(Groups(), callback, tmp_path)
    assert set(callback.hyperparameters) == {"lr/weights", "lr/group_1", "weight_decay/weights"}
    assert callback.hyperparameters["lr/weights"] / 1e-3 != callback.hyperparameters["lr/group_1"] / 1e-4
    assert fitted.optimizers[0].param_groups[1]["weight_decay"] == 0.0


def test_weight_decay_of_zero_everywhere_starts_from_its_floor(tmp_path: Path) -> None:
    callback = HyperGradient(("weight_decay",), val_dataloaders=data(seed=2), every_n_steps=1)
    fit(Net(optimizer="SGD", lr=0.1), callback, tmp_path)
    values = [u.values["weight_decay"] for u in callback.history]
    assert values[0] == 0.0
    assert 1e-6 <= values[-1] < 1.0
    assert values[-1] > 0.0


class Manual(Net):
    """Two optimizers, stepped by hand; the first of them twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, first, second):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.01), torch.optim.Adam(self.net[2].parameters(), lr=1e-3)


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fit(Manual(), callback, tmp_path)
    assert set(callback.hyperparameters) == {
        "lr/optimizer_0",
        "lr/optimizer_1",
        "weight_decay/optimizer_0",
        "weight_decay/optimizer_1",
    }
    assert len(callback.history) == 18
    assert all(set(u.values) == set(callback.hyperparameters) for u in callback.history)


def test_param_groups_added_during_the_fit(tmp_path: Path) -> None:
    class Grows(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net[2].parameters(), lr=1e-3)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.optimizers().optimizer.add_param_group({"params": list(self.net[0].parameters()), "lr": 1e-4})

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fit(Grows(), callback, tmp_path)
    assert set(callback.history[0].values) == {"lr", "weight_decay"}
    assert set(callback.hyperparameters) == {f"{n}/group_{i}" for n in ("lr", "weight_decay") for i in (0, 1)}


def test_frozen_and_later_unfrozen_layers(tmp_path: Path) -> None:
    class Freezes(Net):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fit(Freezes(), callback, tmp_path)
    assert len(callback.history) == 18
