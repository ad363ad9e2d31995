"""Every estimator inside a Trainer: right by differences of whole trainings, without side effects, resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy

from hypergrad import (
    CG,
    ConfigurationError,
    Estimator,
    Exact,
    FiniteDifference,
    Forward,
    Hold,
    Hyperparameter,
    HyperparameterError,
    Implicit,
    Neumann,
    NotDifferentiableError,
    Online,
    Unrolled,
)
from hypergrad.callbacks import HyperGradient
from hypergrad.callbacks._history import Update
from tests.callbacks.modules import Net, Reseed, Resumable, Stateful, continuing, data, fit, trainer

# Bad minima and bad curvature are reported as warnings; what they say is tested where it matters.
pytestmark = pytest.mark.filterwarnings("ignore:HyperGradient at step")
WHOLE_RUN: dict[str, Estimator] = {
    "Forward": Forward(),
    "Forward, difference": Forward(curvature=FiniteDifference(1e-8)),
    "Unrolled": Unrolled(steps=6),
}


class Regularized(Net):
    """Hyperparameters in the loss of an ordinary module: an L2 penalty and a weight per class."""

    def __init__(self, optimizer: str = "SGD", schedule: bool = False, **settings: Any) -> None:
        super().__init__(optimizer, **{"lr": 0.1, "momentum": 0.9, **settings})
        self.l2 = Hyperparameter(1e-2)
        self.classes = Hyperparameter(torch.tensor([0.5, 1.0, 1.5]), transform="softplus")
        self.schedule = schedule

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = (cross_entropy(self.net(x), y, reduction="none") * self.classes()[y]).mean()
        loss = loss + self.l2() * sum(p.square().sum() for p in self.net.parameters())
        self.log("train_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if not self.schedule:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]


class DoubleData:
    """`data()` in float64."""

    def __init__(self, **kwargs: Any) -> None:
        self.batches = [(x.double(), y) for x, y in data(**kwargs)]

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


CLIPPING = {
    "clipped by norm": {"gradient_clip_val": 0.3},
    "clipped by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "clipping that does not bite": {"gradient_clip_val": 100.0},
}


@pytest.mark.parametrize("setting", ["plain", "schedule", "accumulation", *CLIPPING])
@pytest.mark.parametrize("kind", WHOLE_RUN)
def test_equals_differences_of_the_whole_training(tmp_path: Path, kind: str, setting: str) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 1, **CLIPPING.get(setting, {})}
    schedule = setting == "schedule"
    steps = 6
    if setting == "accumulation":
        options, steps = {"accumulate_grad_batches": 2, "max_epochs": 1}, 3

    def run(lr: float = 0.1, l2: float = 1e-2) -> HyperGradient:
        torch.manual_seed(0)
        module = Regularized(schedule=schedule, lr=lr)
        module.l2.value.fill_(l2)
        callback = HyperGradient(
            ("lr", module.l2, module.classes),
            estimator=WHOLE_RUN[kind],
            controller=Hold(),
            every_n_steps=steps,
            val_dataloaders=DoubleData(n=16, seed=1),
        )
        fitted = trainer(tmp_path, callbacks=[callback], precision="64-true", **{"max_epochs": 1, **options})
        fitted.fit(module.double(), DoubleData(), DoubleData(seed=1))
        return callback

    last = run().history[-1]
    assert last.step == steps
    for name, value in (("lr", 0.1), ("l2", 1e-2)):
        h = 1e-3 * value
        ends = [run(**{name: value + sign * h}).history[-1].val_loss for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * h)
        factor = 0.8 ** (steps - 1) if name == "lr" and schedule else 1.0  # per unit of the last value
        assert last.hypergradients[name] * factor == pytest.approx(expected, rel=1e-5)
    assert last.hypergradients["classes/norm"] > 0.0


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"rnn": nn.GRU(1, 6, batch_first=True), "head": nn.Linear(6, 3)})

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return cross_entropy(self.net["head"](self.net["rnn"](x.unsqueeze(2))[0][:, -1]), y)


class Attention(Net):
    """Tied weights, an embedding, scaled_dot_product_attention, a frozen layer and two param groups."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"in": nn.Embedding(4, 4), "out": nn.Linear(4, 3), "frozen": nn.Linear(4, 4)})
        self.net["frozen"].requires_grad_(False)

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        h = self.net["frozen"](self.net["in"]((x > 0).long()))
        h = nn.functional.scaled_dot_product_attention(h, h, h) @ self.net["in"].weight
        return cross_entropy(self.net["out"](h.mean(1)), y)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net["in"].parameters(), "lr": 0.02}, {"params": self.net["out"].parameters()}]
        return torch.optim.AdamW(groups, lr=0.01)


ALL: dict[str, Callable[[], Estimator]] = {
    "Online": Online,
    "Forward": Forward,
    "Forward, difference": lambda: Forward(0.9, FiniteDifference()),
    "Unrolled": lambda: Unrolled(3, FiniteDifference()),
    "Implicit": lambda: Implicit(Neumann(3), damping=1.0, batches=2),
}


@pytest.mark.parametrize("module", [Stateful, Recurrent, Attention], ids=lambda m: m.__name__)
@pytest.mark.parametrize("kind", ALL)
def test_measuring_changes_nothing(tmp_path: Path, kind: str, module: type[Net]) -> None:
    class Penalized(module):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.l2 = Hyperparameter(1e-3)
            self.lines: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch) + self.l2() * sum(p.square().sum() for p in self.parameters() if p.requires_grad)
            self.log("train_loss", loss)
            self.lines.append(loss.item())
            return loss

    runs = []
    for measured in (False, True):
        torch.manual_seed(0)
        net = Penalized()
        callback = HyperGradient(
            estimator=ALL[kind](), controller=Hold(), val_dataloaders=data(seed=2), every_n_steps=2
        )
        fitted = trainer(tmp_path, callbacks=[callback] if measured else [], max_epochs=2)
        fitted.fit(net, data(shuffle=True), data(seed=1))
        runs.append((net.state_dict(), fitted.optimizers[0].state_dict(), net.lines, torch.get_rng_state()))
        assert "training_step" not in vars(net)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert len(callback.history) == 6
    assert all(u.skipped is None for u in callback.history)
    if kind != "Online":
        assert "further training gradients" in callback.summary()


@pytest.mark.parametrize("kind", ALL)
def test_a_penalty_that_is_too_high_is_lowered(tmp_path: Path, kind: str) -> None:
    module = Regularized(lr=0.05)
    module.l2.value.fill_(0.1)
    callback = HyperGradient(module.l2, estimator=ALL[kind](), every_n_steps=2, val_dataloaders=data(n=96, seed=2))
    fit(module, callback, tmp_path, max_epochs=8)
    assert callback.hyperparameters["l2"] < 0.05
    assert callback.hyperparameters["l2"] == module.l2().item()
    assert torch.equal(callback.tensors["l2"], module.l2())
    assert module.classes().tolist() == [0.5, 1.0, 1.5]  # not named, not learned


def test_found_automatically_and_described(tmp_path: Path) -> None:
    module = Regularized()
    callback = HyperGradient(val_dataloaders=data(seed=2))
    fit(module, callback, tmp_path)
    assert set(callback.hyperparameters) == {"lr", "weight_decay", "l2", "classes/mean", "classes/min", "classes/max"}
    assert callback.tensors["classes"].shape == (3,)
    assert module.classes().tolist() != [0.5, 1.0, 1.5]
    assert {"hypergradient/l2/value", "hypergradient/classes/norm/hypergradient"} <= set(callback.history[-1].scalars())
    only = HyperGradient(("lr",), val_dataloaders=data(seed=2))
    fit(Regularized(), only, tmp_path)
    assert set(only.hyperparameters) == {"lr"}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("step", [4, 9])
def test_forward_resumes_bit_identically(tmp_path: Path, step: int) -> None:
    def run(folder: Path, resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        module = Regularized()
        callback = HyperGradient(estimator=Forward(0.95), every_n_steps=3, val_dataloaders=data(seed=2))
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=step, monitor=None)
        options = {"max_epochs": 3, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        fitted = trainer(folder, callbacks=[callback, saver, Reseed()], **options)
        fitted.fit(module, Resumable(), data(seed=1), **continuing(resume))
        return module.state_dict(), fitted.optimizers[0].state_dict(), callback.hyperparameters, callback.history

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / f"step={step}.ckpt")
    torch.testing.assert_close(whole[:2], resumed[:2], rtol=0, atol=0)
    assert whole[2:] == resumed[2:]
    assert len(whole[3]) == 6


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Named(Resumable):
    """Batches of a class that a checkpoint cannot hold as what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = [Pair(*batch) for batch in self.batches]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_without_the_recorded_steps_a_run_continues_and_says_so(tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> tuple[dict[str, Any], list[Update]]:
        torch.manual_seed(0)
        module = Regularized()
        callback = HyperGradient(
            estimator=Unrolled(3), every_n_steps=1, controller=Hold(), val_dataloaders=data(seed=2)
        )
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=8, monitor=None)
        options = {"max_epochs": 3, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        trainer(folder, callbacks=[callback, saver], **options).fit(module, Named(), data(seed=1), **continuing(resume))
        return module.state_dict(), callback.history

    weights, history = run(tmp_path / "whole")
    with pytest.warns(UserWarning, match="Unrolled looks back at steps that the checkpoint does not hold"):
        again, continued = run(tmp_path / "resumed", tmp_path / "whole" / "step=8.ckpt")
    torch.testing.assert_close(again, weights, rtol=0, atol=0)
    # Of the three steps that the hypergradients of steps 9 and 10 look back at, some lie before the checkpoint.
    same = [a.hypergradients == b.hypergradients for a, b in zip(continued, history, strict=True)]
    assert same == [True] * 8 + [False] * 2 + [True] * 8


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*ModelCheckpoint")
@pytest.mark.filterwarnings("ignore:The checkpoint was written with other settings")
def test_with_another_estimator_a_run_continues_and_says_so(tmp_path: Path) -> None:
    make = lambda estimator: HyperGradient(estimator=estimator, every_n_steps=3, val_dataloaders=data(seed=2))
    fitted = fit(Regularized(), make(Forward()), tmp_path, max_epochs=1)
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    again = trainer(tmp_path, callbacks=[make(Unrolled(4))], max_epochs=2)
    with pytest.warns(UserWarning, match="Unrolled looks back at steps that the checkpoint does not hold"):
        again.fit(Regularized(), data(), data(seed=1), ckpt_path=tmp_path / "one.ckpt")


class Manual(Regularized):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Hooked(Regularized):
    def on_after_backward(self) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)


class InPlace(Regularized):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].mul_(2.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("module", "options", "error", "problem"),
    [
        (Manual, {}, ConfigurationError, "manual optimization"),
        (Hooked, {}, ConfigurationError, "clipped, scaled or changed by a hook"),
        (InPlace, {}, NotDifferentiableError, "changes its batch in place"),
    ],
)
def test_what_cannot_be_evaluated_again_is_refused(
    tmp_path: Path, module: type[Regularized], options: Any, error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        fit(module(), HyperGradient(estimator=Forward()), tmp_path, **options)


def test_what_an_estimator_cannot_serve_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(HyperparameterError, match="Implicit cannot serve lr"):
        fit(Regularized(), HyperGradient("lr", estimator=Implicit()), tmp_path)
    with pytest.raises(HyperparameterError, match="at least one Hyperparameter"):
        fit(Net(), HyperGradient(estimator=Implicit()), tmp_path)
    with pytest.raises(HyperparameterError, match="not part of"):
        fit(Net(), HyperGradient(Hyperparameter(0.1)), tmp_path)


def test_a_bad_linear_system_is_reported(tmp_path: Path) -> None:
    callback = HyperGradient(estimator=Implicit(CG(iterations=2)), val_dataloaders=data(seed=2), every_n_steps=3)
    with pytest.warns(UserWarning, match="conjugate gradients"):
        fit(Regularized(), callback, tmp_path)
    assert "conjugate gradients" in (callback.history[0].status or "")
    assert isinstance(Implicit().curvature, Exact)


class OwnTarget(Net):
    """The network is its own target, detached; two param groups and a schedule."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        one, other = self.net(x), self.net(x + 0.3)
        return (one - other.detach()).square().mean() + (one.square().mean() - 1).square()

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 0.005}]
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
@pytest.mark.parametrize("estimator", [Forward(), Unrolled(2)], ids=["forward", "unrolled"])
def test_a_detached_target_is_refused_before_a_step_is_taken(
    tmp_path: Path, estimator: Estimator, options: dict[str, Any]
) -> None:
    module = OwnTarget()
    before = [p.detach().clone() for p in module.parameters()]
    callback = HyperGradient("lr", estimator=estimator, controller=Hold(), every_n_steps=4)
    with pytest.raises(NotDifferentiableError, match=r"not the derivative of its loss.*FiniteDifference\(\)"):
        fit(module, callback, tmp_path, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_an_honest_loss_is_not_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = HyperGradient("lr", estimator=Forward(), controller=Hold(), every_n_steps=3)
    fit(Net("SGD", lr=0.1, momentum=0.9), callback, tmp_path, **options)
    assert callback.history
