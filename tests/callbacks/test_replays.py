"""Training losses that are evaluated again, in trainings that make it hard: right by differences, or refused."""

from __future__ import annotations

import copy
import io
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from hypergrad import (
    ConfigurationError,
    Estimator,
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
from tests.callbacks.modules import data, trainer

STEPS = 4


class Batches:
    """`data()` in float64."""

    def __init__(self, **kwargs: Any) -> None:
        self.batches = [(x.double(), y) for x, y in data(**kwargs)]

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Base(pl.LightningModule):
    def __init__(self, l2: float = 0.3, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
        self.l2 = Hyperparameter(torch.tensor(l2, dtype=torch.float64))
        self.lr = lr

    def fit_term(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0].double()), batch[1])

    def penalty(self) -> torch.Tensor:
        return self.l2() * sum(p.square().sum() for p in self.net.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.fit_term(batch) + self.penalty()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.fit_term(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.5)


class BySteps(Base):
    """The sign of the penalty, and whether there is one, depend on how far the Trainer has counted."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        sign = (1.0, 0.0, -0.5)[self.global_step % 3]
        return self.fit_term(batch) + sign * self.penalty() if sign else self.fit_term(batch)


class ByEpochs(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.fit_term(batch) + self.current_epoch * self.penalty()


class SkipsSteps(Base):
    """Lightning's documented pattern: step every other batch, with the last batch's gradient."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class Shared(Base):
    """One function for both, as many write it."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.training_step(batch, batch_idx)


class Sometimes(Base):
    """Lightning skips a batch for which there is no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Unfreezes(Base):
    """A layer that joins the optimizer later, in a param group of its own."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=self.lr, momentum=0.5)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.trainer.optimizers[0].add_param_group({"params": self.net[0].parameters(), "lr": 0.03})


def _held(tmp: Path, module: Base, estimator: Estimator, every: int, **options: Any) -> HyperGradient:
    callback = HyperGradient(
        module.l2,
        estimator=estimator,
        controller=Hold(),
        every_n_steps=every,
        val_dataloaders=Batches(n=96, batch_size=96),
    )
    settings = {"max_epochs": 1, "limit_train_batches": STEPS, "num_sanity_val_steps": 0, **options}
    callbacks = [callback, *settings.pop("callbacks", [])]
    trainer(tmp, callbacks=callbacks, precision="64-true", **settings).fit(module, Batches(), Batches(seed=1))
    return callback


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
@pytest.mark.parametrize("estimator", [Unrolled(steps=50), Forward()], ids=["Unrolled", "Forward"])
@pytest.mark.parametrize(
    ("make", "steps", "options"),
    [
        (BySteps, STEPS, {}),
        (ByEpochs, 3 * STEPS, {"max_epochs": 3}),
        (SkipsSteps, STEPS // 2, {}),
        (Shared, STEPS, {}),
        (Sometimes, STEPS, {}),
        (Unfreezes, STEPS, {}),
        (
            Base,
            4,
            {
                "max_epochs": 3,
                "limit_train_batches": 2,
                "callbacks": lambda: [GradientAccumulationScheduler({0: 2, 2: 1})],
            },
        ),
    ],
    ids=["by steps", "by epochs", "skipped steps", "shared step", "no loss", "new group", "accumulation changes"],
)
def test_equals_differences(
    tmp_path: Path, make: Callable[..., Base], steps: int, options: dict[str, Any], estimator: Estimator
) -> None:
    def run(l2: float) -> Any:
        extra = {k: v() if callable(v) else v for k, v in options.items()}
        return _held(tmp_path, make(l2), estimator, steps, **extra).history[-1]

    found = run(0.3)
    assert found.step == steps
    h = 1e-4
    expected = (run(0.3 + h).val_loss - run(0.3 - h).val_loss) / (2 * h)
    assert found.hypergradients["l2"] == pytest.approx(expected, rel=1e-6)
    assert found.status is None


@pytest.mark.parametrize("estimator", [Unrolled(steps=50), Forward()], ids=["Unrolled", "Forward"])
def test_values_are_those_of_each_step(tmp_path: Path, estimator: Estimator) -> None:
    """Each step's derivative is by its own value, at which its loss was evaluated."""

    def run(offsets: list[float]) -> Any:
        module = Base()

        def shifted(*_: Any) -> None:
            value = 0.3 * 1.5**module.global_step
            module.l2.value.fill_(value + offsets[module.global_step])

        module.on_train_batch_start = shifted  # type: ignore[method-assign]
        return _held(tmp_path, module, estimator, STEPS).history[-1]

    h = 1e-4
    expected = (run([h] * STEPS).val_loss - run([-h] * STEPS).val_loss) / (2 * h)
    assert run([0.0] * STEPS).hypergradients["l2"] == pytest.approx(expected, rel=1e-6)


class Attribute(Base):
    """Depends on something that nobody can put back."""

    factor = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.factor * super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        type(self).factor *= 2.0


class LateClip(Base):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.01)


class OwnClip(Base):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize("estimator", [Unrolled(steps=3), Forward()], ids=["Unrolled", "Forward"])
@pytest.mark.parametrize(
    ("make", "error", "problem"),
    [
        (Attribute, NotDifferentiableError, "another gradient when it is evaluated again"),
        (LateClip, NotDifferentiableError, "clipped, scaled or changed by a hook"),
        (OwnClip, ConfigurationError, "configure_gradient_clipping"),
    ],
)
def test_what_cannot_be_put_back_is_found_out(
    tmp_path: Path, make: type[Base], error: type[Exception], problem: str, estimator: Estimator
) -> None:
    Attribute.factor = 1.0
    if make is Attribute and isinstance(estimator, Forward):
        return  # evaluates within the step, where nothing has changed yet
    with pytest.raises(error, match=problem):
        _held(tmp_path, make(), estimator, STEPS)


class Shrinks(Base):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        for p in self.net.parameters():
            p.grad.mul_(0.1)  # type: ignore[union-attr]


def test_where_a_minimum_lies_does_not_depend_on_clipping(tmp_path: Path) -> None:
    estimator = Implicit(Neumann(3), damping=1.0)
    here, clipped = (_held(tmp_path, make(lr=0.0), estimator, STEPS) for make in (Base, Shrinks))
    assert [u.hypergradients for u in clipped.history] == [u.hypergradients for u in here.history]
    assert clipped.history[-1].hypergradients["l2"] != 0.0


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_name_that_could_mean_two_things_is_refused(tmp_path: Path, name: str) -> None:
    module = Base()
    del module.lr
    setattr(module, name, Hyperparameter(0.1))
    module.configure_optimizers = lambda: torch.optim.SGD(module.net.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(HyperparameterError, match="give the attribute of the model another name"):
        trainer(tmp_path, callbacks=[HyperGradient()], precision="64-true").fit(module, Batches(), Batches())


def test_a_path_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(HyperparameterError, match=r"name the module itself, model\.l2"):
        trainer(tmp_path, callbacks=[HyperGradient("l2")]).fit(Base(), Batches(), Batches())


def test_one_that_is_not_used_is_reported(tmp_path: Path) -> None:
    class Unused(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.fit_term(batch)

    with pytest.warns(UserWarning, match="do not depend on l2"):
        callback = _held(tmp_path, Unused(), Online(), 2)
    assert callback.history[-1].hypergradients == {"l2": 0.0}


@pytest.mark.parametrize("estimator", [Forward(), Forward(decay=0.9), Unrolled(3), Online()], ids=repr)
def test_a_learning_rate_of_0_on_the_way(tmp_path: Path, estimator: Estimator) -> None:
    class WarmUp(Base):
        def configure_optimizers(self) -> Any:
            adam = torch.optim.AdamW(self.net.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: (0.0, 0.5, 1.0, 0.0)[step % 4])
            return [adam], [{"scheduler": schedule, "interval": "step"}]

    callback = HyperGradient(
        estimator=estimator, controller=Hold(), every_n_steps=1, val_dataloaders=Batches(n=16, seed=2)
    )
    trainer(tmp_path, callbacks=[callback], precision="64-true", max_epochs=1).fit(WarmUp(), Batches(), Batches())
    assert len(callback.history) == 6
    assert all(u.skipped is None for u in callback.history)


def test_the_module_is_as_it_was(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            trainer_of, module.trainer = module.trainer, None  # a Trainer cannot be copied, with or without us
            seen.append(copy.deepcopy(module))
            buffer = io.BytesIO()
            torch.save(module, buffer)
            buffer.seek(0)
            seen.append(torch.load(buffer, weights_only=False))
            module.trainer = trainer_of

    module = Base()
    _held(tmp_path, module, Unrolled(2), 2, callbacks=[Look()])
    assert "training_step" not in vars(module)
    for twin in seen:
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        loss = twin.training_step(next(iter(Batches())), 0)
        assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())  # its own weights, which are 0
    own = Base()
    own.training_step = types.MethodType(lambda self, batch, i: 2.0 * Base.training_step(self, batch, i), own)
    step = own.training_step
    _held(tmp_path, own, Unrolled(2), 2)
    assert vars(own)["training_step"] is step


def test_a_buffer_that_grows(tmp_path: Path) -> None:
    class Queue(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", torch.zeros(0, dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx) * (1 + 0.1 * len(self.queue))
            self.queue = torch.cat([self.queue, loss.detach().reshape(1)])
            return loss

    module = Queue()
    callback = _held(tmp_path, module, Unrolled(3), STEPS)
    assert len(module.queue) == STEPS
    assert callback.history[-1].hypergradients["l2"] != 0.0


def test_recording_every_step_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Unrolled\(steps=5\)"):
        HyperGradient(estimator=Unrolled())
