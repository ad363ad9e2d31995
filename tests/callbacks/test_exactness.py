"""Hypergradients of real fits against central differences of the training script itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from hypergrad import Hold, Online, OptimizerHyperparameter, Tuner, resolve
from hypergrad.callbacks import HyperGradient
from hypergrad.callbacks._attachment import Attachment
from tests.callbacks.modules import Net, data, trainer


class Doubles(Net):
    """In float64, with one batch, so that whole training scripts can be differenced."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        torch.manual_seed(5)
        for p in self.parameters():
            p.data.normal_(std=0.5)
        self.double()

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss((batch[0].double(), batch[1]))


class SetAtStep(pl.Callback):
    """Puts a value into the optimizer just before one optimizer step."""

    def __init__(self, name: str, step: int, value: float, group: int = 0) -> None:
        self.h, self.step, self.value, self.group = OptimizerHyperparameter(name), step, value, group

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.h.write(trainer.optimizers[0].param_groups[self.group], self.value)


def _loss_after(
    module: pl.LightningModule, val: DataLoader[Any], tmp: Path, extra: pl.Callback, **kwargs: Any
) -> float:
    fitted = trainer(tmp, callbacks=[extra], max_steps=4, **kwargs)
    fitted.fit(module, data(), data(seed=1))
    return module.eval().loss(next(iter(val))).item()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "lr"),
        ({}, "weight_decay"),
        ({}, "betas[0]"),
        ({"optimizer": "SGD", "momentum": 0.8, "lr": 0.1, "weight_decay": 0.1}, "lr"),
        ({"optimizer": "SGD", "momentum": 0.8, "lr": 0.1, "weight_decay": 0.1}, "weight_decay"),
        ({"optimizer": "SGD", "momentum": 0.8, "lr": 0.1, "weight_decay": 0.1}, "momentum"),
        ({"optimizer": "NAdam"}, "lr"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}],
    ids=["plain", "clipped", "accumulated and clipped"],
)
def test_equals_central_differences_of_the_training_script(
    tmp_path: Path, settings: dict[str, Any], name: str, options: dict[str, Any]
) -> None:
    val = data(32, 32, seed=7)
    callback = HyperGradient((name,), val_dataloaders=val, every_n_steps=4, controller=Hold())
    _loss_after(Doubles(**settings), val, tmp_path, callback, **options)
    (update,) = callback.history
    value = update.values[name]
    assert update.step == 4

    def loss(at: float) -> float:
        return _loss_after(Doubles(**settings), val, tmp_path, SetAtStep(name, 3, at), **options)

    assert update.val_loss == pytest.approx(loss(value), rel=1e-12)
    h = 1e-3 * value
    once, twice = ((loss(value + h / k) - loss(value - h / k)) / (2 * h / k) for k in (1, 2))
    assert update.hypergradients[name] == pytest.approx((4 * twice - once) / 3, rel=1e-6)


class TouchesUp(Doubles):
    """Sets the lr between gradient and update, and clamps the weights after it: both are common, and ordinary code."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = getattr(self, "lr_at_step_3", 0.02) if self.global_step == 3 else 0.01

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.net[0].bias.zero_()


def test_user_code_between_gradient_and_update_and_after_it(tmp_path: Path) -> None:
    val = data(32, 32, seed=7)
    callback = HyperGradient(("lr",), val_dataloaders=val, every_n_steps=4, controller=Hold())
    _loss_after(TouchesUp(), val, tmp_path, callback)
    (update,) = callback.history
    assert update.values["lr"] == 0.02
    # The weights that the callback sees are those after the step: module hooks of the same name run after callbacks.
    differences = []
    for sign in (1, -1):
        module = TouchesUp()
        module.lr_at_step_3 = 0.02 + sign * 1e-5
        module.on_train_batch_end = lambda *_: None if module.global_step == 4 else TouchesUp.on_train_batch_end(module)
        fitted = trainer(tmp_path, max_steps=4)
        fitted.fit(module, data(), data(seed=1))
        differences.append(module.eval().loss(next(iter(val))).item())
    assert update.hypergradients["lr"] == pytest.approx((differences[0] - differences[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("form", ["positional", "keyword", "none"])
@pytest.mark.parametrize("lr", [0.01, 1e-6])
def test_every_way_to_call_step(form: str, lr: float, double: None) -> None:
    def run(value: float, attach: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        attachment = (
            Attachment(0, optimizer, resolve(optimizer, ["lr"]), Online(), {}, Tuner(Hold()), 3) if attach else None
        )
        for i in range(3):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = (model(x) - 1.0).square().sum()
                loss.backward()
                return loss

            optimizer.param_groups[0]["lr"] = value if i == 2 else lr
            if form == "none":
                closure()
                optimizer.step()
            else:
                optimizer.step(closure) if form == "positional" else optimizer.step(closure=closure)
        val = model(torch.ones(1, 3)).square().sum()
        if attachment is None:
            return val.item(), 0.0
        params = list(attachment.tracker.params)
        assert attachment.pending
        gradients = dict(zip(params, torch.autograd.grad(val, params), strict=True))
        return val.item(), attachment.tracker.contract(gradients).hypergradients["lr"].item()

    h = 1e-4 * lr
    expected = (run(lr + h, False)[0] - run(lr - h, False)[0]) / (2 * h)
    assert run(lr, True)[1] == pytest.approx(expected, rel=1e-5)
