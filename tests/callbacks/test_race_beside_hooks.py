"""A race takes steps that no hook of the user's sees: where that matters there is no race, and it is said."""

from __future__ import annotations

import copy
import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from hypergrad import ConfigurationError, Cosine, Hold, Race, Readout
from hypergrad.callbacks import EarlyStopping, HyperGradient
from hypergrad.callbacks._plan import _steps
from tests.callbacks.modules import Net, data, trainer
from tests.callbacks.one_run import fit, seeded, tuner
from tests.callbacks.test_one_run import RACE, assert_equal, weights


class Clips(Net):
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class Freezes(Net):
    def on_after_backward(self) -> None:
        for p in self.net[0].parameters():
            p.grad = None


class ClipsByItself(Net):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)


class Clamps(Net):
    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.3, 0.3)


class Teacher(Net):
    """Consistent with an average of its own weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) + (self.net(batch[0]) - self.teacher(batch[0])).square().mean()

    def average(self) -> None:
        with torch.no_grad():
            for a, b in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                a.lerp_(b, 0.1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.average()


class TeacherBeforeZeroGrad(Teacher):
    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.global_step >= 5:
            self.average()


class TeacherInTheStep(TeacherBeforeZeroGrad):
    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average()


class ClampsInTheOptimizer(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.clamp())
        return optimizer

    def clamp(self) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.3, 0.3)


class LateTeacher(Teacher):
    """Not in the first steps, so that nothing is odd about them."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step >= 5:
            self.average()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Clips, "changed by a hook"),
        (Freezes, "changed by a hook"),
        (ClipsByItself, "configure_gradient_clipping may remember"),
        (Clamps, "changes outside of it"),
        (Teacher, "'teacher.*' changes outside of it"),
        (TeacherBeforeZeroGrad, "'teacher.*' changes outside of it"),
        (TeacherInTheStep, "'teacher.*' changes outside of it"),
        (ClampsInTheOptimizer, "may be changed by a hook of its own"),
        (LateTeacher, "'teacher.*' changes outside of it"),
    ],
)
def test_without_the_race_the_training_is_the_plain_one(
    kind: type[Net], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, raced = kind(lr=0.02), kind(lr=0.02)
    fit(plain, None)
    callback = tuner(race=RACE)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(raced, callback)
    assert callback.race is None
    (said,) = [r.getMessage() for r in caplog.records if "no race of learning rates" in r.getMessage()]
    assert re.search(why, said), said
    # Hypergradients would take over, which come too rarely here to do so.
    assert_equal(weights(raced), weights(plain))


class Unfreezes(Net):
    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.trainer.current_epoch >= 1)


class Partly(Net):
    """Of what has a gradient the optimizer has some, and what it clips is measured on that alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before = torch.nn.Linear(5, 5)

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss((self.before(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), **self.settings)


class CountsValidations(Net):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("validations", torch.zeros(()))

    def on_validation_epoch_end(self) -> None:
        self.validations += 1


class Slices(Net):
    """Buffers of one memory that are apart, and a sparse one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        first, second = torch.zeros(2, 3).unbind()
        self.register_buffer("first", first)
        self.register_buffer("second", second)
        self.register_buffer("graph", torch.eye(5).to_sparse())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.first += 1
        self.second += 2
        return super().training_step((torch.sparse.mm(self.graph, batch[0].T).T, batch[1]), batch_idx)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Unfreezes, {}),
        (Partly, {"gradient_clip_val": 0.1}),
        (Partly, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (CountsValidations, {"val_check_interval": 1}),
        (Slices, {}),
    ],
    ids=["unfreezes", "partly, clipped by norm", "by value", "counts validations", "slices"],
)
def test_what_is_ordinary_has_a_race(kind: type[Net], options: dict[str, Any]) -> None:
    callback, module = tuner(race=RACE), kind(lr=1e-6)
    fit(module, callback, **options)
    assert callback.race is not None
    assert len(callback.race["scores"]) == 3
    if kind is Slices:
        assert [module.first[0].item(), module.second[0].item()] == [120.0, 240.0]


class Adapter(Net):
    """Weights that nothing trains, beside a few that are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backbone = torch.nn.Linear(5, 5).requires_grad_(False)

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss((batch[0] + self.backbone(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), **self.settings)


class AdapterThatThaws(Adapter):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 4:
            self.backbone.requires_grad_(True)
            self.optimizers().add_param_group({"params": list(self.backbone.parameters())})


def test_arms_have_no_copies_of_what_nothing_trains() -> None:
    kept: list[set[str]] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            heat = callback._run._pieces._heat
            if heat is not None:
                kept.extend(set(state.state_dict()["tensors"]) for state in heat._states.values())

    callback, module = tuner(race=RACE), Adapter(lr=1e-6)
    fit(module, callback, callbacks=[Looks()])
    assert callback.race is not None
    assert kept
    assert all(names == {f"net.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")} for names in kept)


def test_weights_that_begin_to_be_trained_in_the_race_end_it(caplog: pytest.LogCaptureFixture) -> None:
    callback, raced, plain = tuner(race=RACE), AdapterThatThaws(lr=0.02), AdapterThatThaws(lr=0.02)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(raced, callback)
    fit(plain, None)
    assert callback.race is None
    assert "the optimizer is given 'backbone.weight' outside of it" in caplog.text
    assert_equal(weights(raced), weights(plain))


def test_a_buffer_whose_dtype_a_hook_changes_ends_the_race(caplog: pytest.LogCaptureFixture) -> None:
    class Changes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen = self.seen + 0.5

    callback = tuner(race=RACE)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(Changes(), callback)
    assert callback.race is None
    assert "'seen' changes outside of it" in caplog.text


class TiedByData(Net):
    """Two parameters of one memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5))
        self.net[2].weight.data = self.net[0].weight.data

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0])[:, :3], batch[1])


class Views(Net):
    """Buffers that share the memory of a parameter, or of each other, and one that is expanded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("same", self.net[0].weight.data)
        self.register_buffer("counts", torch.zeros(4))
        self.register_buffer("some", self.counts[:2])
        self.register_buffer("mask", torch.ones(1, 3).expand(5, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.counts.add_(1.0)
        return super().training_step(batch, batch_idx)


class Temperature(Net):
    """A parameter that is one number, and one that is none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.none = torch.nn.Parameter(torch.empty(0))
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.scale * self.net(batch[0]), batch[1]) + self.none.sum()


@pytest.mark.parametrize("kind", [TiedByData, Views, Temperature])
def test_unusual_tensors_train_in_the_race_as_they_do_alone(kind: type[Net]) -> None:
    callback = tuner(race=Race(rates=(1e-4, 1e-1), rungs=((0.05, 2), (0.1, 1)), forks=(), least=1), shape=Cosine())
    raced = kind("SGD", lr=1e-6, momentum=0.9)
    fit(raced, callback)
    assert callback.race["lr"] == pytest.approx(1e-1)

    class Alone(kind):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            steps = self.trainer.estimated_stepping_batches
            shape = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: Cosine().factor(step / steps))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": shape, "interval": "step"}}

    alone = Alone("SGD", lr=callback.race["lr"], momentum=0.9)
    fit(alone, None)
    assert_equal(weights(raced), weights(alone))


class Grows(Net):
    """Keeps every loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("losses", torch.zeros(0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses = torch.cat([self.losses, loss.detach().reshape(1)])
        return loss


@pytest.mark.parametrize("kind", [TiedByData, Views, Grows])
def test_a_readout_does_not_disturb_what_is_trained(kind: type[Net]) -> None:
    class Remembers(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(lr=0.05)
            self.seen: list[float] = []

        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
            self.seen.append(outputs["loss"].item())

    plain, watched = Remembers(), Remembers()
    fit(plain, None)
    fit(watched, tuner(readout=Readout(checkpoints=10)))
    assert watched.seen == plain.seen


def test_who_restores_weights_decides_alone() -> None:
    def restoring() -> EarlyStopping:
        return EarlyStopping(restore_best_weights=True)

    with pytest.raises(ConfigurationError, match=r"\(restore_best_weights=True\) and `readout` would both"):
        fit(Net(), tuner(readout=Readout()), callbacks=[restoring()])
    callback = HyperGradient(val_dataloaders=data(seed=2))
    fitted = trainer(None, callbacks=[callback, restoring()], max_steps=400, max_epochs=-1)
    fitted.fit(seeded(Net(lr=1e-5)), data(seed=1), data(seed=3))
    assert callback.race is not None
    assert callback.ended_with is None


def test_a_learning_rate_of_zero_has_no_race(caplog: pytest.LogCaptureFixture) -> None:
    callback = tuner(race=RACE)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(Net("SGD", lr=0.0), callback)
    assert callback.race is None
    assert "a learning rate of 0 has no multiples" in caplog.text


@pytest.mark.parametrize(("limit", "steps"), [({}, 2 * 6 + 3 * 2), ({"max_steps": 15}, 15)], ids=["epochs", "steps"])
def test_the_length_of_a_run_whose_accumulation_changes_is_known(limit: dict[str, int], steps: int) -> None:
    class Asks(pl.Callback):
        steps: int | None = None

        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.steps = _steps(trainer)

    asks = Asks()
    options = {"callbacks": [GradientAccumulationScheduler({0: 1, 2: 4}), asks], "max_epochs": 5, **limit}
    fitted = trainer(None, **options)
    fitted.fit(Net(), data(), data(seed=1))
    assert (asks.steps, fitted.global_step) == (steps, steps)


def test_hold_refuses_an_embedding_that_scales_its_rows() -> None:
    class Renormalises(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(4, 5, max_norm=1.0)

        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss((batch[0] + self.table(batch[1]), batch[1]))

    callback = HyperGradient(val_dataloaders=data(seed=2), controller=Hold())
    with pytest.raises(ConfigurationError, match="'table' has max_norm=1: it scales rows"):
        trainer(None, callbacks=[callback], num_sanity_val_steps=2).fit(Renormalises(), data(), data(seed=1))
