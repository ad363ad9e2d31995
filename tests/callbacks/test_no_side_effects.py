"""Promise 2: with nothing to learn, a run with the callback is bit-identical to one without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Dataset

from hypergrad import Hold, OptimizerHyperparameter, Race, Unrolled
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, Stateful, data, trainer


class Witness(pl.Callback):
    """Writes down what every batch and every epoch saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int):
        rng = (torch.get_rng_state().sum().item(), np.random.get_state()[1].sum(), random.getstate()[1][-1])  # type: ignore[index]
        group = {k: v for k, v in trainer.optimizers[0].param_groups[0].items() if k != "params"}
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith("hypergradient")}
        flags = [m.training for m in pl_module.modules()]
        self.seen.append((batch[0].sum().item(), rng, group, metrics, flags, trainer.state.stage))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any):
        self.seen.append(batch[0].sum().item())


def _fit(module: pl.LightningModule, callbacks: list[pl.Callback], tmp: Path, train: Any, val: Any, **kwargs: Any):
    pl.seed_everything(3, verbose=False)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    witness = Witness()
    fitted = trainer(tmp, callbacks=[*callbacks, witness], **kwargs)
    fitted.fit(module, train, val)
    return {
        "weights": module.state_dict(),
        "optimizer": [o.state_dict() for o in fitted.optimizers],
        "seen": witness.seen,
        "metrics": {k: v for k, v in fitted.callback_metrics.items() if not k.startswith("hypergradient")},
    }


def _assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["seen"] == b["seen"]
    assert len(a["seen"]) > 10
    for key in ("weights", "optimizer", "metrics"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


SGD = {"optimizer": "SGD", "momentum": 0.9, "nesterov": True, "lr": 0.1}


@pytest.mark.parametrize("every_n_steps", [1, 3])
@pytest.mark.parametrize("settings", [{}, SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("own_data", [True, False], ids=["own data", "trainer's data"])
def test_hold_is_bit_identical(tmp_path: Path, settings: dict[str, Any], every_n_steps: int, own_data: bool) -> None:
    callback = HyperGradient(
        val_dataloaders=data(40, 8, seed=2, shuffle=True) if own_data else None,
        every_n_steps=every_n_steps,
        controller=Hold(),
    )
    runs = [
        _fit(Stateful(**settings), callbacks, tmp_path, data(shuffle=True), data(48, 16, seed=1, shuffle=True))
        for callbacks in ([], [callback])
    ]
    _assert_identical(*runs)
    assert len(callback.history) == 18 // every_n_steps
    assert all(u.skipped is None for u in callback.history)


class Augmented(Dataset[Any]):
    """Draws from every global stream for every item, as augmentations do."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> Any:
        return torch.rand(5) + random.random() + float(np.random.rand()), i % 3


def test_hold_is_bit_identical_with_random_augmentation_and_global_shuffling(tmp_path: Path) -> None:
    loaders = [DataLoader(Augmented(), batch_size=8, shuffle=True) for _ in range(2)]
    callback = HyperGradient(every_n_steps=1, controller=Hold())
    _assert_identical(*[_fit(Stateful(), callbacks, tmp_path, *loaders) for callbacks in ([], [callback])])


def test_hold_is_bit_identical_with_persistent_workers(tmp_path: Path) -> None:
    val = DataLoader(Augmented(), batch_size=8, num_workers=1, persistent_workers=True)
    callback = HyperGradient(every_n_steps=2, controller=Hold())
    _assert_identical(*[_fit(Stateful(), c, tmp_path, data(), val, max_epochs=2) for c in ([], [callback])])


def test_hold_is_bit_identical_under_accumulation_clipping_schedule_and_bf16(tmp_path: Path) -> None:
    class Scheduled(Stateful):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
    callback = HyperGradient(every_n_steps=1, controller=Hold())
    _assert_identical(*[_fit(Scheduled(), c, tmp_path, data(), data(seed=1), **options) for c in ([], [callback])])
    assert len(callback.history) == 9


def test_what_the_user_logs_is_unchanged_and_logged_once(tmp_path: Path) -> None:
    def scalars(name: str, callbacks: list[pl.Callback]) -> dict[str, list[tuple[int, float]]]:
        logger = TensorBoardLogger(tmp_path, name=name, version="")
        _fit(Stateful(), callbacks, tmp_path, data(), data(seed=1), logger=logger)
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    plain = scalars("plain", [])
    watched = scalars("watched", [HyperGradient(every_n_steps=1, controller=Hold())])
    assert {"train_loss", "val_loss", "val_accuracy", "mine"} <= set(plain)
    assert {tag: values for tag, values in watched.items() if not tag.startswith("hypergradient/")} == plain


def test_the_optimizer_is_left_as_found(tmp_path: Path) -> None:
    module = Net(weight_decay=0.0)
    callback = HyperGradient(every_n_steps=1)
    fitted = trainer(tmp_path, callbacks=[callback])
    fitted.fit(module, data(), data(seed=1))
    optimizer = fitted.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert callback.hyperparameters["lr"] != 0.01
    steps = len(callback.history)
    optimizer.step()
    assert len(callback.history) == steps
    assert "log" not in vars(module)


@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_an_exception_leaves_module_and_optimizer_intact(tmp_path: Path, where: str) -> None:
    class Fails(Stateful):
        armed = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 4:
                type(self).armed = True
                if where == "training_step":
                    raise KeyError("mine")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            result = super().validation_step(batch, batch_idx)
            if self.armed:
                raise KeyError("mine")
            return result

    module = Fails()
    fitted = trainer(tmp_path, callbacks=[HyperGradient(every_n_steps=1, val_dataloaders=data(seed=2))])
    with pytest.raises(KeyError, match="mine"):
        fitted.fit(module, data(), data(seed=1))
    assert fitted.optimizers[0].param_groups[0]["lr"] == 0.01
    assert module.training
    assert module.outputs == []
    assert "log" not in vars(module)


HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
)
CHOICES: dict[str, dict[str, Any]] = {
    "Online": {},
    "Unrolled": {"estimator": Unrolled(3)},
    "per tensor": {"hyperparameters": OptimizerHyperparameter("lr", per="tensor")},
    "race": {"race": Race(rates=(1e-3, 1e-1), rungs=((0.3, 2), (0.6, 1)), forks=(), least=1)},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("hook", [*HOOKS, "on_train_batch_end"])
def test_a_hook_that_raises_leaves_module_and_optimizer_intact(tmp_path: Path, hook: str, choice: str) -> None:
    def fails(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.global_step >= 4:
            raise KeyError("mine")
        getattr(super(kind, self), hook)(*args, **kwargs)

    kind = type("Fails", (Net,), {hook: fails})
    module = kind(lr=0.01)
    callback = HyperGradient(every_n_steps=2, val_dataloaders=data(seed=2), **CHOICES[choice])
    fitted = trainer(tmp_path, callbacks=[callback])
    with pytest.raises(KeyError, match="mine"):
        fitted.fit(module, data(), data(seed=1))
    optimizer = fitted.optimizers[0]
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.01, 0.01, 4)
    assert "training_step" not in vars(module)
    assert module.training
    before, values = len(callback.history), callback.hyperparameters
    optimizer.step()  # no hook of ours is left
    assert (len(callback.history), callback.hyperparameters) == (before, values)
