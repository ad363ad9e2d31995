"""Shared and per-tensor values inside a fit: applied while the optimizer steps, and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from hypergrad import Descent, Forward, Hold, OptimizerHyperparameter, Unrolled
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, Reseed, Resumable, continuing, data, fit, trainer


class Groups(Net):
    """Two param groups with different lr, under a schedule; what users see of them is written down."""

    def __init__(self, optimizer: str = "SGD", **settings: Any) -> None:
        super().__init__(optimizer, **{"lr": 0.1, "momentum": 0.9, **settings})
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        groups = self.optimizers().param_groups
        self.seen.append([(len(g["params"]), g["lr"], g["initial_lr"]) for g in groups])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 0.03}]
        optimizer = getattr(torch.optim, self.optimizer)(groups, **self.settings)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def _callback(per: Any, **options: Any) -> HyperGradient:
    return HyperGradient(
        OptimizerHyperparameter("lr", per=per), **{"every_n_steps": 2, "val_dataloaders": data(seed=2), **options}
    )


TENSORS = ["lr/net.0.weight", "lr/net.0.bias", "lr/net.2.weight", "lr/net.2.bias"]


@pytest.mark.parametrize("per", ["shared", "tensor"])
def test_users_see_their_own_groups(tmp_path: Path, per: str) -> None:
    plain, tuned, callback = Groups(), Groups(), _callback(per)
    trainer(tmp_path).fit(plain, data(), data(seed=1))
    fitted = fit(tuned, callback, tmp_path)
    assert tuned.seen == plain.seen
    assert [len(g["params"]) for g in fitted.optimizers[0].param_groups] == [2, 2]
    assert list(callback.hyperparameters) == (["lr"] if per == "shared" else TENSORS)
    scalars = callback.history[-1].scalars()
    assert all(f"hypergradient/{label}/{kind}" in scalars for label in callback.hyperparameters for kind in ("value",))
    values = list(callback.history[-1].values.values())
    assert len(set(values)) == len(values)
    if per == "tensor":
        learned = callback.hyperparameters
        ratio = learned["lr/net.0.weight"] / learned["lr/net.0.bias"]
        assert ratio != pytest.approx(1.0, rel=1e-3)


def test_shared_groups_keep_their_ratio(tmp_path: Path) -> None:
    used: list[list[float]] = []

    class Watched(Groups):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            before = [p.detach().clone() for p in self.parameters()]
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            moved = [b - p.detach() for b, p in zip(before, self.parameters(), strict=True)]
            rates = [float(m.norm() / p.grad.norm()) for m, p in zip(moved, self.parameters(), strict=True)]
            used.append([rates[0], rates[2]])

    callback = _callback("shared", controller=Descent())
    fit(Watched(momentum=0.0), callback, tmp_path)
    for first, second in used:
        assert first / second == pytest.approx(0.1 / 0.03, rel=1e-3)
    assert used[-1][0] == pytest.approx(callback.history[-1].values["lr"], rel=1e-3)
    assert used[-1][0] != pytest.approx(0.1 * 0.9**17, rel=1e-2)


@pytest.mark.parametrize("per", ["shared", "tensor"])
@pytest.mark.parametrize("estimator", [Forward(), Unrolled(6)], ids=lambda e: type(e).__name__)
def test_equals_differences_of_the_whole_training(tmp_path: Path, per: str, estimator: Any) -> None:
    class Double(Groups):
        def configure_optimizers(self) -> Any:
            scale = self.scale
            params = [p for part in (self.net[0], self.net[2]) for p in part.parameters()]
            rates = [0.1, 0.1, 0.03, 0.03]
            if scale is None:
                groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.03}]
            else:
                groups = [{"params": [p], "lr": r * s} for p, r, s in zip(params, rates, scale, strict=True)]
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    batches, val = (
        DataLoader([(x.double(), y) for x, y in loader], batch_size=None) for loader in (data(), data(n=16, seed=1))
    )

    def run(scale: list[float] | None, estimated: Any) -> Any:
        torch.manual_seed(0)
        module = Double()
        module.scale = scale
        callback = _callback(
            per if scale is None else "group",
            estimator=estimated,
            controller=Hold(),
            every_n_steps=6,
            val_dataloaders=val,
        )
        fitted = trainer(tmp_path, callbacks=[callback], precision="64-true", max_epochs=1)
        fitted.fit(module.double(), batches, val)
        return callback.history[-1]

    found, h = run(None, estimator), 1e-6
    moves = [[1.0] * 4] if per == "shared" else [[float(i == t) for i in range(4)] for t in range(4)]
    rates = [0.1] if per == "shared" else [0.1, 0.1, 0.03, 0.03]
    for label, move, rate in zip(found.hypergradients, moves, rates, strict=True):
        ends = [run([1 + s * h * m for m in move], None).val_loss for s in (1, -1)]
        assert found.hypergradients[label] == pytest.approx((ends[0] - ends[1]) / (2 * h) / rate, rel=1e-5)


@pytest.mark.parametrize("settings", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_measuring_per_tensor_changes_nothing(tmp_path: Path, settings: Any) -> None:
    runs = []
    for measured in (False, True):
        torch.manual_seed(0)
        net = _adamw(settings)
        callback = _callback("tensor", controller=Hold())
        fitted = trainer(tmp_path, callbacks=[callback] if measured else [])
        fitted.fit(net, data(), data(seed=1))
        runs.append((copy.deepcopy(net.state_dict()), fitted.optimizers[0].state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert len(callback.history) == 9


def _adamw(settings: dict[str, Any]) -> Net:
    net = Groups("AdamW", **settings)
    del net.settings["momentum"]
    return net


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("per", ["shared", "tensor"])
def test_resumes_bit_identically(tmp_path: Path, per: str) -> None:
    def run(folder: Path, resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        module, callback = Groups(), _callback(per, estimator=Forward(0.95), every_n_steps=3)
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=4, monitor=None)
        options = {"max_epochs": 3, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        fitted = trainer(folder, callbacks=[callback, saver, Reseed()], **options)
        fitted.fit(module, Resumable(), data(seed=1), **continuing(resume))
        return module.state_dict(), fitted.optimizers[0].state_dict(), callback.hyperparameters, callback.history

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "step=4.ckpt")
    torch.testing.assert_close(whole[:2], resumed[:2], rtol=0, atol=0)
    assert whole[2:] == resumed[2:]
