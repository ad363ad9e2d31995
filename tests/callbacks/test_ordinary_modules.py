"""Promise 1: modules, loaders and optimizers as people write them work unedited, or are refused clearly."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hypergrad import ConfigurationError, Hold, HyperparameterError, NotDifferentiableError, UnsupportedOptimizerError
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer


def _fit(module: pl.LightningModule, tmp: Path, callback: HyperGradient | None = None, **kwargs: Any) -> HyperGradient:
    callback = callback or HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    torch.manual_seed(0)
    for p in module.parameters():
        p.data.normal_(std=0.5)
    trainer(tmp, callbacks=[callback], **kwargs).fit(module, data(), data(seed=1))
    return callback


class OnlyBatch(Net):
    def validation_step(self, batch: Any) -> Any:  # type: ignore[override]
        self.log("val_loss", self.loss(batch))


class NeedsIndex(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        self.log("val_loss", self.loss(batch))


class Anything(Net):
    def validation_step(self, *args: Any) -> Any:
        self.log("val_loss", self.loss(args[0]))


class ThirdArgument(Net):
    def validation_step(self, batch: Any, batch_idx: int, stage: str = "val") -> Any:
        self.log(f"{stage}_loss", self.loss(batch))


class Prefixes(Net):
    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().log(f"all/{name}", *args, **kwargs)


class WritesFiles(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        os.path.join(self.logger.log_dir, self.trainer.log_dir, str(self.logger.version))
        super().validation_step(batch, batch_idx)


class MakesListsAtEpochStart(Net):
    def on_validation_epoch_start(self) -> None:
        self.losses: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.losses.append(self.loss(batch))
        self.log("val_loss", self.losses[-1])

    def on_validation_epoch_end(self) -> None:
        del self.losses


class ParameterHooks(Net):
    def on_fit_start(self) -> None:
        for p in self.parameters():
            p.register_hook(lambda g: g * 1000.0)


@pytest.mark.parametrize("kind", [OnlyBatch, ThirdArgument, Anything, MakesListsAtEpochStart, WritesFiles])
def test_gives_the_hypergradients_of_the_plain_module(tmp_path: Path, kind: type[Net]) -> None:
    logger = TensorBoardLogger(tmp_path)
    expected = _fit(Net(), tmp_path).history
    assert _fit(kind(), tmp_path, logger=logger, num_sanity_val_steps=0).history == expected
    assert len(expected) == 18


def test_an_overridden_log(tmp_path: Path) -> None:
    callback = HyperGradient(monitor="all/val_loss", val_dataloaders=data(seed=2), every_n_steps=1)
    assert _fit(Prefixes(), tmp_path, callback).history == _fit(Net(), tmp_path).history
    assert pl.LightningModule.log.__qualname__ == "LightningModule.log"


def test_a_required_dataloader_idx(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fitted = trainer(tmp_path, callbacks=[callback])
    fitted.fit(NeedsIndex(), data(), [data(seed=1), data(seed=3)])
    assert len(callback.history) == 18


def test_hooks_on_gradients_belong_to_training(tmp_path: Path) -> None:
    module = ParameterHooks(optimizer="Adam", lr=1e-3)
    callback = HyperGradient(("lr",), val_dataloaders=data(seed=2), every_n_steps=1, controller=Hold())
    _fit(module, tmp_path, callback)
    plain = HyperGradient(("lr",), val_dataloaders=data(seed=2), every_n_steps=1, controller=Hold())
    _fit(Net(optimizer="Adam", lr=1e-3), tmp_path, plain)
    # Adam does not see the scale of gradients, so both trainings are the same, up to eps.
    for a, b in zip(callback.history, plain.history, strict=True):
        assert a.hypergradients["lr"] == pytest.approx(b.hypergradients["lr"], rel=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(tmp_path: Path, reentrant: bool) -> None:
    class Checkpointed(Net):
        def loss(self, batch: Any) -> torch.Tensor:
            hidden = checkpoint(self.net[:2], batch[0].requires_grad_(), use_reentrant=reentrant)
            return torch.nn.functional.cross_entropy(self.net[2](hidden), batch[1])

    if reentrant:
        with pytest.raises(NotDifferentiableError, match="use_reentrant=False"):
            _fit(Checkpointed(), tmp_path)
    else:
        for a, b in zip(_fit(Checkpointed(), tmp_path).history, _fit(Net(), tmp_path).history, strict=True):
            assert a.hypergradients == pytest.approx(b.hypergradients, rel=1e-4)


def test_parameters_that_change_in_an_evaluation_are_refused(tmp_path: Path) -> None:
    class Teacher(Net):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            for mine, theirs in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
                theirs.lerp_(mine.detach(), 0.5)
            return super().validation_step(batch, batch_idx)

    with pytest.raises(ConfigurationError, match=r"changes its parameter 'teacher.0.weight' when it is evaluated"):
        _fit(Teacher(), tmp_path)


def test_everything_frozen_until_a_later_epoch(tmp_path: Path) -> None:
    class Thaws(Net):
        def on_fit_start(self) -> None:
            self.net.requires_grad_(False)
            self.bias = torch.zeros(3, requires_grad=True)

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]) + self.bias, batch[1])

        def on_train_epoch_start(self) -> None:
            self.net.requires_grad_(self.current_epoch > 0)

    assert [u.step for u in _fit(Thaws(), tmp_path).history] == list(range(7, 19))


def test_a_class_that_calls_its_parents_step(tmp_path: Path) -> None:
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # from now on the parent's step runs hooks as well

    class Sub(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Own(Net):
        def configure_optimizers(self) -> Any:
            return Sub(self.parameters(), lr=0.01)

    a, b = _fit(Own(), tmp_path).history, _fit(Net(), tmp_path).history
    assert [u.step for u in a] == [u.step for u in b]
    for x, y in zip(a, b, strict=True):
        assert x.values == pytest.approx(y.values, rel=1e-3)


class Momentum(torch.optim.Optimizer):
    """Written by hand; subclasses get one thing wrong."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def lrs(self) -> list[float]:
        return [group["lr"] for group in self.param_groups]

    def memory(self, p: torch.Tensor) -> Any:
        return self.state[p]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group, lr in zip(self.param_groups, self.lrs(), strict=True):
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.memory(p).setdefault("buffer", torch.zeros_like(p))
                    buffer.mul_(0.9).add_(p.grad)
                    p.add_(buffer, alpha=-lr)
        return loss


class KeepsStateElsewhere(Momentum):
    def memory(self, p: torch.Tensor) -> Any:
        self.elsewhere = getattr(self, "elsewhere", {})
        return self.elsewhere.setdefault(p, {})


class DrawsNoise(Momentum):
    """As stochastic gradient Langevin dynamics does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=1e-3)


class CouplesGroups(Momentum):
    def lrs(self) -> list[float]:
        mean = sum(super().lrs()) / len(self.param_groups)
        return [mean] * len(self.param_groups)


class ReadsEarly(Momentum):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        before = super().lrs()
        self.lrs = lambda: before  # type: ignore[method-assign]
        super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (KeepsStateElsewhere, r"keeps state outside `state\[parameter\]`"),
        (DrawsNoise, "draws random numbers in its step"),
        (CouplesGroups, "acts on the parameters of another"),
        (ReadsEarly, "before it runs the closure"),
        (Momentum, None),
    ],
)
def test_optimizers_written_by_hand(tmp_path: Path, optimizer: type[Momentum], match: str | None) -> None:
    class Own(Net):
        def configure_optimizers(self) -> Any:
            return optimizer([{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}], lr=0.01)

    callback = HyperGradient(("lr",), val_dataloaders=data(seed=2), every_n_steps=1)
    if match is None:
        assert len(_fit(Own(), tmp_path, callback).history) == 18
        return
    with pytest.raises(UnsupportedOptimizerError, match=match):
        _fit(Own(), tmp_path, callback)


class OwnGenerator(Dataset[Any]):
    """Augments from a generator of its own, which its subsets share."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.settings = {"noise": [torch.Generator().manual_seed(0)]}

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> Any:
        noise = torch.randn(5, generator=self.settings["noise"][0])
        return noise + float(self.rng.normal()), i % 3


class Endless(IterableDataset[Any]):
    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.full((5,), float(self.rng.normal())), 1


@pytest.mark.parametrize("endless", [False, True])
def test_randomness_inside_datasets_is_not_shared_with_training(tmp_path: Path, endless: bool) -> None:
    weights = []
    for callbacks in ([], [HyperGradient(every_n_steps=1, controller=Hold())]):
        torch.manual_seed(0)
        items = OwnGenerator()
        generator = torch.Generator().manual_seed(3)
        train = DataLoader(items, batch_size=8, shuffle=True, generator=generator)
        val = DataLoader(Endless() if endless else items, batch_size=8, generator=generator)
        module = Net()
        for p in module.parameters():
            p.data.normal_(std=0.5)
        trainer(tmp_path, callbacks=callbacks, limit_val_batches=2).fit(module, train, val)
        weights.append(module.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_validating_another_checkpoint_between_fits_leaves_no_trace(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(Net(), tmp_path, callback)
    first = callback.history
    fitted = trainer(tmp_path, callbacks=[callback])
    fitted.fit(Net(), data(), data(seed=1))
    fitted.save_checkpoint(tmp_path / "some.ckpt")
    fitted.validate(Net(), data(seed=1), ckpt_path=tmp_path / "some.ckpt", verbose=False)
    assert _fit(Net(), tmp_path, callback).history == first


def test_copies_and_pickles(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=2)
    _fit(Net(), tmp_path, callback)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.history == []
        assert _fit(Net(), tmp_path, twin).history == callback.history


def test_groups_of_the_same_name_are_told_apart_by_number(tmp_path: Path) -> None:
    class Named(Net):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[i].parameters(), "name": "layer"} for i in (0, 2)]
            return torch.optim.AdamW(groups, lr=0.01)

    assert set(_fit(Named(), tmp_path).hyperparameters) == {
        f"{n}/group_{i}" for n in ("lr", "weight_decay") for i in (0, 1)
    }


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"val_dataloaders": data().dataset}, "got the dataset itself"),
        ({"val_dataloaders": iter(data())}, "read only once"),
        ({"val_dataloaders": 3}, "not iterable"),
        ({"controller": "hold"}, "instance of Controller, but got 'hold'"),
        ({"controller": Hold}, "instance of Controller"),
        ({"estimator": "online"}, "instance of Estimator"),
        ({"hyperparameters": 5}, "sequence of names, but got 5"),
        ({"monitor": None}, "`monitor` must be the key"),
        ({"seed": 1.5}, "`seed` must be an integer, but got 1.5"),
    ],
)
def test_wrong_types_at_construction(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        HyperGradient(**settings)


@pytest.mark.parametrize("settings", [{"name": 3}, {"name": "lr", "transform": "log"}, {"name": "lr", "lower": "1e-3"}])
def test_wrong_types_in_a_hyperparameter(settings: dict[str, Any]) -> None:
    from hypergrad import OptimizerHyperparameter

    with pytest.raises(HyperparameterError, match="but got"):
        OptimizerHyperparameter(**settings)
