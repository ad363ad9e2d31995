"""Race, shape, readout, rewind and budget in real fits: each is what it says, and nothing more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR

from hypergrad import ConfigurationError, Cosine, Race, Readout, Rewind
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, Reseed, Resumable, Stateful, continuing, data, trainer
from tests.callbacks.one_run import EPOCHS, StopAt, fit, seeded, tuner

RACE = Race(rates=(1e-4, 1e-2, 1e-1), rungs=((0.05, 3), (0.1, 1), (0.2, 1)), least=1)


def weights(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert torch.equal(t, b[name]), name


class WithCosine(Stateful):
    """The plain training that a race's winner must be, with the learning rate known beforehand."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        shape = LambdaLR(optimizer, lambda step: Cosine().factor(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": shape, "interval": "step"}}


@pytest.mark.parametrize(
    ("optimizer", "settings"), [("AdamW", {"weight_decay": 0.1}), ("SGD", {"momentum": 0.9})], ids=["AdamW", "SGD"]
)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=["plain", "accumulated", "clipped"]
)
def test_the_winner_is_the_plain_training_at_its_learning_rate(
    optimizer: str, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    # BatchNorm and dropout included: an arm takes the very steps that it would have taken alone.
    callback = tuner(race=replace(RACE, forks=()), shape=Cosine())
    raced = Stateful(optimizer, lr=1e-6, **settings)
    fit(raced, callback, **options)
    winner = callback.race["lr"]
    assert winner > 1e-3  # the user's own stays where it is
    alone = WithCosine(optimizer, lr=winner, **settings)
    fit(alone, None, **options)
    assert_equal(weights(raced), weights(alone))


@pytest.mark.parametrize("rooms", [[0.0] * 3, [0.0, math.inf]], ids=["all of it", "until there is room"])
def test_arms_that_stand_by_on_the_host_train_as_they_would_on_the_device(
    rooms: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Without an accelerator both are the host, but the arms are moved and kept by the same code.
    def run() -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
        callback, module = tuner(race=RACE, shape=Cosine()), Stateful("AdamW", lr=1e-6, weight_decay=0.1)
        fit(module, callback)
        return callback.race, weights(module)

    expected, left = run(), list(rooms)
    monkeypatch.setattr("hypergrad.callbacks._race.beside", lambda _: torch.device("cpu"))
    monkeypatch.setattr("hypergrad.callbacks._race.room", lambda _: left.pop(0))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        race, found = run()
    assert not left  # asked at every rung until there was room
    assert caplog.text.count("stand by on the host") == 1
    assert race == expected[0]
    assert_equal(found, expected[1])


def test_who_starts_far_too_high_ends_where_others_do() -> None:
    found = []
    for lr in (1e-6, 10.0):
        callback, module = tuner(race=RACE, shape=Cosine()), Net("SGD", lr=lr)
        fit(module, callback)
        found.append((callback.race["lr"], weights(module)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, t in found[0][1].items():
        torch.testing.assert_close(t, found[1][1][name], rtol=1e-3, atol=1e-4)


def test_an_arm_that_becomes_no_number_loses() -> None:
    callback, module = tuner(race=Race(rates=(1e-2,), rungs=((0.1, 1),), forks=(1e25,))), Net("SGD", lr=1e30)
    fit(module, callback)
    assert callback.race["lr"] == pytest.approx(1e-2)
    assert all(t.isfinite().all() for t in weights(module).values())


def test_the_race_is_recorded_and_told() -> None:
    callback = tuner(race=RACE)
    fit(Net(lr=1e-6), callback)
    rungs = callback.race["scores"]
    assert sorted(rungs[0]) == pytest.approx([1e-6, 1e-4, 1e-2, 1e-1])
    assert len(rungs[1]) == 3
    assert len(rungs[2]) == 3  # the best of them and its two forks
    best = min(rungs[1], key=rungs[1].__getitem__)
    assert sorted(rungs[2]) == pytest.approx([best / 10**0.5, best, best * 10**0.5])
    assert callback.race["lr"] == min(rungs[2], key=rungs[2].__getitem__)
    assert callback.hyperparameters["lr"] == pytest.approx(callback.race["lr"])
    assert f"lr {callback.race['lr']:.3g} won the race" in callback.report()


class Frozen(Net):
    def configure_optimizers(self) -> Any:
        self.net[0].requires_grad_(False)
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 0.001}]
        return torch.optim.AdamW(groups, lr=0.01)


def test_param_groups_keep_their_ratio_and_frozen_layers_stay() -> None:
    callback, module = tuner(race=RACE), Frozen()
    fit(module, callback)
    values = callback.hyperparameters
    assert values["lr/group_0"] == pytest.approx(callback.race["lr"])
    assert values["lr/group_1"] == pytest.approx(0.1 * callback.race["lr"])
    assert torch.equal(module.net[0].weight, seeded(Frozen()).net[0].weight)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("stop_at", [3, 9, 20, 40], ids=["first rung", "second rung", "forked", "after the race"])
def test_a_run_resumed_in_and_after_the_race_continues_bit_identically(stop_at: int, tmp_path: Path) -> None:
    def callback() -> HyperGradient:
        pieces = {"race": RACE, "shape": Cosine(), "readout": Readout(checkpoints=10), "rewind": Rewind()}
        return HyperGradient(val_dataloaders=data(seed=2), every_n_steps=3, controller=None, **pieces)

    def train(
        steps: int, module: pl.LightningModule, tuned: HyperGradient, checkpoint: Path | None = None
    ) -> pl.Trainer:
        saver = ModelCheckpoint(tmp_path / str(steps), "{step}", every_n_train_steps=stop_at, save_top_k=-1)
        options = {"max_epochs": EPOCHS, "enable_checkpointing": True, "limit_train_batches": 6}
        fitted = trainer(tmp_path, callbacks=[Reseed(), saver, tuned, StopAt(steps)], **options)
        fitted.fit(seeded(module), Resumable(), data(seed=1), **continuing(checkpoint))
        return fitted

    whole, part, rest = Stateful(lr=1e-6), Stateful(lr=1e-6), Stateful(lr=1e-6)
    straight, resumed = callback(), callback()
    train(10**6, whole, straight)
    train(stop_at, part, callback())
    train(10**5, rest, resumed, tmp_path / str(stop_at) / f"step={stop_at}.ckpt")
    assert_equal(weights(rest), weights(whole))
    assert resumed.hyperparameters == straight.hyperparameters
    assert resumed.race == straight.race
    assert resumed.history == straight.history
    assert resumed.ended_with == straight.ended_with


class Overfits(Net):
    """Learns well, and then unlearns."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        harmful = LambdaLR(optimizer, lambda step: 1.0 if step < 60 else -0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": harmful, "interval": "step"}}


def test_the_run_ends_with_the_best_weights_that_it_has_seen() -> None:
    validation = list(data(seed=2))

    class Watch(pl.Callback):
        losses: dict[int, float]

        def on_train_start(self, *_: Any) -> None:
            self.losses = {}

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            with torch.no_grad():
                self.losses[trainer.global_step] = float(torch.stack([module.loss(b) for b in validation]).mean())

    watch, module = Watch(), Overfits()
    callback = tuner(readout=Readout(checkpoints=20, batches=6), hyperparameters=("weight_decay",))
    fit(module, callback, callbacks=[watch])
    best = callback.ended_with
    at_checkpoints = {step: loss for step, loss in watch.losses.items() if step % 6 == 0}
    assert best.score <= min(at_checkpoints.values()) + 1e-6
    assert best.step < 100
    with torch.no_grad():
        final = float(torch.stack([module.loss(b) for b in validation]).mean())
    assert final == pytest.approx(best.score, rel=1e-5)
    assert f"{best.kind} weights of step {best.step}" in callback.report()


def test_the_average_of_the_readout_is_the_exponential_one() -> None:
    class Record(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            self.seen: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            self.seen.append(module.net[0].weight.detach().clone())

    record, readout = Record(), Readout(checkpoints=1, window=0.2)
    callback, module = tuner(readout=readout, hyperparameters=("weight_decay",)), Stateful("SGD", lr=0.3)
    fit(module, callback, callbacks=[record])
    average = record.seen[0]
    for i, w in enumerate(record.seen[1:], start=2):
        average = average.lerp(w, max(1 / i, 1 / (0.2 * 120)))
    expected = record.seen[-1] if callback.ended_with.kind == "raw" else average
    torch.testing.assert_close(module.net[0].weight.detach(), expected)


class Plateau(Net):
    """For a hundred steps, by the scale of its loss, hardly anything can be learned."""

    def loss(self, batch: Any) -> torch.Tensor:
        loss = super().loss(batch)
        return loss if self.trainer.global_step > 100 else 1.0 + 1e-4 * loss


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_race_on_a_plateau_does_not_choose_by_noise() -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2))
    fitted = trainer(None, callbacks=[callback], max_steps=600, max_epochs=-1, num_sanity_val_steps=0)
    fitted.fit(seeded(Plateau("SGD", lr=1e-3)), data())
    assert callback.race["lr"] >= 1.0  # none does harm there
    assert callback.race["weight_decay"] == []  # which would only shrink weights that have nothing to learn from


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("budget", [1.1, 1.25, 2.0])
def test_the_budget_is_kept_to_two_percent(budget: float) -> None:
    class Counts(Net):
        def loss(self, batch: Any) -> torch.Tensor:
            spent.append(1.0 if torch.is_grad_enabled() else 1 / 3)
            return super().loss(batch)

    module, steps, spent = Counts(), 1000, list[float]()
    callback = HyperGradient(val_dataloaders=data(seed=2), budget=budget)
    fitted = trainer(None, callbacks=[callback], max_steps=steps, max_epochs=-1, num_sanity_val_steps=0)
    fitted.fit(module, data())
    cost = sum(spent) / steps
    assert cost == pytest.approx(budget, rel=0.02)
    assert callback.cost == pytest.approx(cost, rel=0.005)
    assert callback.race["lr"] > 0.0
    assert callback.history


def test_a_small_budget_is_kept_without_a_race() -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), budget=1.1)
    fitted = trainer(None, callbacks=[callback], max_steps=475, max_epochs=-1)
    fitted.fit(Net(), data(), data(seed=1))
    assert callback.race is None
    assert 1.08 < callback.cost <= 1.11


def test_a_run_that_is_too_short_has_no_race(caplog: pytest.LogCaptureFixture) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(Net(lr=1e-3), callback)
    assert "no race of learning rates (the run has 120 steps" in caplog.text
    assert callback.race is None
    assert callback.ended_with is None
    assert callback.hyperparameters["lr"] != 1e-3  # by hypergradients


class Unrepeatable(Net):
    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        Unrepeatable.calls += 1
        return super().training_step(batch, batch_idx) * (1 + Unrepeatable.calls % 7)


def test_a_training_step_that_cannot_be_run_again_has_no_race(caplog: pytest.LogCaptureFixture) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fitted = trainer(None, callbacks=[callback], max_steps=400, max_epochs=-1)
        module = Unrepeatable(lr=1e-5)
        fitted.fit(module, data(), data(seed=1))
    assert "cannot be run again" in caplog.text
    assert "training_step" not in vars(module)
    assert callback.race is None
    assert callback.hyperparameters["lr"] > 1e-4


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_race_that_was_given_up_stays_given_up_after_a_checkpoint(tmp_path: Path) -> None:
    def train(callback: HyperGradient, steps: int, **kwargs: Any) -> None:
        Unrepeatable.calls = 0
        fitted = trainer(tmp_path, callbacks=[callback, StopAt(steps)], max_steps=400, max_epochs=-1)
        fitted.fit(seeded(Unrepeatable(lr=1e-5)), data(), data(seed=1), **kwargs)
        fitted.save_checkpoint(tmp_path / "given-up.ckpt")

    first, second = (HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1) for _ in range(2))
    train(first, 50)
    train(second, 120, **continuing(tmp_path / "given-up.ckpt"))
    assert second.history[: len(first.history)] == first.history
    assert second.history[-1].values["lr"] != first.history[-1].values["lr"]  # still learned


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"budget": 0.9}, "at least 1"),
        ({"budget": math.nan}, "at least 1"),
        ({"race": 3}, "`race` must be a Race"),
        ({"readout": "yes"}, "`readout` must be a Readout"),
        ({"shape": math.cos}, "`shape` must be a Shape"),
        ({"rewind": True}, "`rewind` must be a Rewind"),
    ],
)
def test_bad_pieces_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HyperGradient(**kwargs)


def test_a_small_hyper_validation_set_is_scored_once_and_the_rest_of_the_budget_goes_to_hypergradients() -> None:
    found = {}
    for size in (32, 96):  # two batches, or six
        callback = HyperGradient(val_dataloaders=data(size, seed=2), budget=1.5)
        fitted = trainer(None, callbacks=[callback], max_steps=500, max_epochs=-1, num_sanity_val_steps=0)
        fitted.fit(Net(), data(), data(seed=1))
        found[size] = (len(callback.history), callback.cost)
    assert found[32][0] > found[96][0]
    assert found[32][1] == pytest.approx(1.5, rel=0.02)
    assert found[96][1] == pytest.approx(1.5, rel=0.02)


def test_a_race_of_ones_own_that_is_too_long_for_the_run_is_not_run(caplog: pytest.LogCaptureFixture) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), race=Race(rates=(1e-4, 1e-2)))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(Net(lr=1e-3), callback)
    assert "no race of learning rates (the run has 120 steps, too few" in caplog.text
    assert callback.race is None
    assert callback.cost < 1.5  # an arm more at every step would double it


def test_a_validation_after_the_fit_does_not_change_the_report() -> None:
    callback = tuner(readout=Readout(checkpoints=10))
    fitted, module = trainer(None, callbacks=[callback], max_epochs=EPOCHS), Net()
    fitted.fit(module, data(), data(seed=1))
    before = callback.report()
    assert "monitored value minus" in before
    fitted.validate(module, data(seed=7), verbose=False)
    assert callback.report() == before
