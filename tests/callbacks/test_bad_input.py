"""Whatever a user gets wrong is said at construction or at the start of fit, with the value and the way out."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset

from hypergrad import (
    ConfigurationError,
    HypergradError,
    HyperparameterError,
    NotDifferentiableError,
    Schedule,
    UnsupportedOptimizerError,
)
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "5"])
def test_every_n_steps(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"at least 1, but got {value!r}"):
        HyperGradient(every_n_steps=value)


def test_mode_and_loaders() -> None:
    with pytest.raises(ConfigurationError, match="'min' or 'max', but got 'minimum'"):
        HyperGradient(mode="minimum")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="one DataLoader, but got a list"):
        HyperGradient(val_dataloaders=[data()])
    with pytest.raises(ConfigurationError, match=r"hypergrad\.hypergradient"):
        HyperGradient([Schedule("lr", {0: 0.1, 10: 0.01})])  # type: ignore[list-item]


@pytest.mark.parametrize("name", [3, None, 0.1])
def test_names_of_another_type(name: Any) -> None:
    with pytest.raises(HyperparameterError, match=f"such as 'lr'.*but got {name!r}"):
        HyperGradient((name,))


class Two(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.net[0].parameters(), lr=0.1)


class NoOptimizer(Net):
    def configure_optimizers(self) -> None:
        return None


class Silent(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("accuracy", 0.5)


class Detached(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch).detach())


class Float(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch).item())


class NoGrad(Net):
    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class ReturnsLoss(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
        return self.loss(batch)


class Vector(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"val_loss": self.net(batch[0]).sum(1)}


class Copy(Net):
    """Evaluates an average of its weights, which requires a gradient as every copy does."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.net)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.average(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("module", "settings", "error", "match"),
    [
        (Net(), {"hyperparameters": ("learning_rate",)}, HyperparameterError, "offers lr, betas"),
        (Net(), {"hyperparameters": ()}, HyperparameterError, "Name at least one"),
        (Net("SGD"), {"hyperparameters": ("momentum",)}, HyperparameterError, "does not depend on 'momentum'"),
        (Net("LBFGS"), {"hyperparameters": ("lr",)}, UnsupportedOptimizerError, "LBFGS cannot.*use SGD, Adam"),
        (Net("LBFGS"), {}, UnsupportedOptimizerError, "LBFGS cannot.*use SGD, Adam"),
        (Copy(), {}, NotDifferentiableError, "depends on none of the parameters.*a copy of the model"),
        (Net("SparseAdam"), {"hyperparameters": ("lr",)}, UnsupportedOptimizerError, "sparse=False"),
        (Two(), {"hyperparameters": ("lr",)}, ConfigurationError, r"shape \(8, 5\) is stepped by optimizers 0 and 1"),
        (Silent(), {}, NotDifferentiableError, r"neither logs 'val_loss' nor returns a loss \(it logs 'accuracy'\)"),
        (Net(), {"monitor": "loss/val"}, NotDifferentiableError, r"logs 'loss/val'.*it logs 'val_loss'"),
        (Detached(), {}, NotDifferentiableError, "has no gradient: Detached.validation_step detaches it"),
        (Float(), {}, NotDifferentiableError, r"is a float.*self.log\('val_loss', loss\)"),
        (NoGrad(), {}, NotDifferentiableError, "has no gradient"),
        (ReturnsLoss(), {"monitor": "accuracy", "mode": "max"}, NotDifferentiableError, "'accuracy' has no gradient"),
        (ReturnsLoss(), {"monitor": "accuracy"}, NotDifferentiableError, "'accuracy' has no gradient"),
        (ReturnsLoss(), {"mode": "max"}, NotDifferentiableError, "mode='max' would make the loss large"),
        (Net("SGD", momentum=1.5), {"hyperparameters": ("momentum",)}, HyperparameterError, "outside the domain of Lo"),
        (Vector(), {}, NotDifferentiableError, r"has shape \(16,\)"),
        (Net(), {"val_dataloaders": DataLoader(TensorDataset(torch.zeros(0, 5)))}, ConfigurationError, "has no batch"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, pl.LightningModule) else None,
)
def test_at_the_start_of_fit(
    tmp_path: Path, module: Net, settings: dict[str, Any], error: type[HypergradError], match: str
) -> None:
    before = {k: v.clone() for k, v in module.state_dict().items()}
    fitted = trainer(tmp_path, callbacks=[HyperGradient(**{"val_dataloaders": data(seed=2), **settings})])
    if isinstance(module, Two):
        module.automatic_optimization = False
    with pytest.raises(error, match=match):
        fitted.fit(module, data(), data(seed=1))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert fitted.global_step == 0


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
def test_no_validation_data_and_no_validation_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no validation data.*val_dataloaders="):
        trainer(tmp_path, callbacks=[HyperGradient()]).fit(Net(), data())

    class TrainsOnly(pl.LightningModule):
        training_step, configure_optimizers, loss = Net.training_step, Net.configure_optimizers, Net.loss
        optimizer, settings = "SGD", {"lr": 0.1}

        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(5, 3)

    with pytest.raises(ConfigurationError, match="TrainsOnly has no validation_step"):
        trainer(tmp_path, callbacks=[HyperGradient(val_dataloaders=data())]).fit(TrainsOnly(), data())


def test_several_loaders_need_a_choice(tmp_path: Path) -> None:
    fitted = trainer(tmp_path, callbacks=[HyperGradient()], num_sanity_val_steps=0)
    with pytest.raises(ConfigurationError, match=r"2 validation loaders.*val_loss/dataloader_idx_0"):
        fitted.fit(Net(), data(), [data(), data()])


def test_no_optimizer(tmp_path: Path) -> None:
    fitted = trainer(tmp_path, callbacks=[HyperGradient(val_dataloaders=data())])
    with pytest.warns(UserWarning, match="returned `None`"), pytest.raises(ConfigurationError, match="NoOptimizer"):
        fitted.fit(NoOptimizer(), data(), data())


def test_strategies_that_shard_are_refused(tmp_path: Path) -> None:
    for sharding in (FSDPStrategy, ModelParallelStrategy, type("DeepSpeedStrategy", (DDPStrategy,), {})):

        class Stub:
            strategy, optimizers = sharding(), trainer(tmp_path).optimizers

        with pytest.raises(ConfigurationError, match=rf"{sharding.__name__} shards or replaces.*strategy='ddp'"):
            HyperGradient().on_train_start(Stub(), Net())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("monitor", "told"), [("vla_loss", True), ("val_loss", False)], ids=["of one's own", "the usual"]
)
def test_a_key_of_ones_own_that_is_not_logged_where_others_are_is_told(monitor: str, told: bool) -> None:
    expected = (
        pytest.warns(UserWarning, match=r"monitor='vla_loss'.*logs 'accuracy' but nothing under that key")
        if told
        else contextlib.nullcontext()
    )
    callback = HyperGradient(monitor=monitor, val_dataloaders=data(seed=2), every_n_steps=5)
    with expected:
        trainer(None, callbacks=[callback], max_epochs=1).fit(ReturnsLoss(), data(), data(seed=1))
    assert len(callback.history) == 1


def test_the_monitored_number_is_no_longer_held_out_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer(tmp_path, callbacks=[HyperGradient()]).fit(Net(), data(), data(seed=1))
        said = [r for r in caplog.records if "no longer held out" in r.message]
        assert len(said) == 1
        caplog.clear()
        trainer(tmp_path, callbacks=[HyperGradient(val_dataloaders=data(seed=2))]).fit(Net(), data(), data(seed=1))
        assert not any("held out" in r.message for r in caplog.records)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_validation_loss_that_is_never_a_number_leaves_the_training_alone() -> None:
    class Nan(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val_loss", self.loss(batch) * float("nan"))

    weights = []
    for callbacks in ([], [HyperGradient(val_dataloaders=data(seed=2))]):
        torch.manual_seed(0)
        module = Nan(lr=0.01)
        fitted = trainer(None, callbacks=callbacks, max_epochs=-1, max_steps=500)
        if callbacks:
            with pytest.warns(UserWarning, match="the validation loss is no number|nothing is learned from it"):
                fitted.fit(module, data())
            assert callbacks[0].race is None
            assert all(u.skipped for u in callbacks[0].history)
        else:
            fitted.fit(module, data())
        weights.append(module.state_dict())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)  # for the first rung lr had the shape of a cosine
