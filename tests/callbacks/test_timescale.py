"""Weight decay starts where learning rate and length of the run say, and only where that is meant."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from hypergrad import ConfigurationError, Descent, Frozen, Hold, OptimizerHyperparameter, Race, Timescale
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer
from tests.callbacks.one_run import StopAt

STEPS = 120
RACE = Race(rates=(1e-4, 1e-2, 1e-1), rungs=((0.05, 3), (0.1, 1), (0.2, 1)), least=1)


def tuner(**kwargs: Any) -> HyperGradient:
    return HyperGradient(val_dataloaders=data(seed=2), **{"controller": Hold(), "every_n_steps": 10, **kwargs})


def fit(module: pl.LightningModule, callback: HyperGradient, **kwargs: Any) -> HyperGradient:
    torch.manual_seed(0)
    callbacks = [callback, *kwargs.pop("callbacks", [])]
    fitted = trainer(None, callbacks=callbacks, **{"max_epochs": STEPS // 6, **kwargs})
    fitted.fit(module, data(seed=1), data(seed=3))
    return callback


@pytest.mark.parametrize(
    ("optimizer", "settings", "rate"),
    [("AdamW", {}, 1.0), ("AdamW", {"weight_decay": 3.0}, 1.0), ("SGD", {"momentum": 0.9}, 10.0)],
    ids=["AdamW", "a large one of the user's", "SGD"],
)
def test_after_the_race_it_belongs_to_the_winner(optimizer: str, settings: dict[str, Any], rate: float) -> None:
    callback = fit(Net(optimizer, lr=1e-6, **settings), tuner(race=RACE, timescale=Timescale(0.2)))
    expected = 1.0 / (callback.race["lr"] * rate * 0.2 * STEPS)
    assert callback.history[0].values["weight_decay"] == pytest.approx(min(expected, 10.0))
    assert callback.race["weight_decay"] == pytest.approx([min(expected, 10.0)])
    assert "weight decay then started at" in callback.report()


class Weights(pl.Callback):
    """After every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, _: pl.Trainer, pl_module: pl.LightningModule, *__: Any) -> None:
        self.seen.append(torch.cat([p.detach().reshape(-1) for p in pl_module.parameters()]))


def test_the_race_itself_has_the_users() -> None:
    seen = []
    for timescale in (Timescale(), None):
        torch.manual_seed(1)
        weights = Weights()
        fit(Net("SGD", lr=1e-6), tuner(race=RACE, timescale=timescale), callbacks=[weights])
        seen.append(weights.seen)
    same = [torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert same == [step <= 0.2 * STEPS for step in range(1, STEPS + 1)]


def test_it_moves_from_there(caplog: pytest.LogCaptureFixture) -> None:
    sgd = {"momentum": 0.5, "lr": 1e-6}
    moving = Frozen(Descent(0.5), ("lr",))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        callback = fit(Net("SGD", **sgd), tuner(race=RACE, timescale=Timescale(), controller=moving))
    first, last = (callback.history[i].values["weight_decay"] for i in (0, -1))
    assert first == pytest.approx(1.0 / (callback.race["lr"] * 2 * 0.1 * STEPS))
    assert last != first
    assert f"weight decay starts at {first:.3g}, by Timescale(share=0.1)" in caplog.text


def test_without_a_race_it_starts_at_once_from_the_users_learning_rate() -> None:
    callback = fit(Net("AdamW", lr=0.05), tuner(timescale=Timescale(0.5)))
    assert callback.history[0].values["weight_decay"] == pytest.approx(1.0 / (0.05 * 0.5 * STEPS))


class Groups(Net):
    """Learning rates of their own, and one group that is not to decay."""

    def configure_optimizers(self) -> Any:
        (a, b), (c, d) = (self.net[i].parameters() for i in (0, 2))
        groups = [
            {"params": [a], "lr": 0.05},
            {"params": [c], "lr": 0.2, "weight_decay": 0.3},
            {"params": [b, d], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)


def test_each_group_has_that_of_its_learning_rate_and_none_stays_none() -> None:
    values = fit(Groups(), tuner(timescale=Timescale())).hyperparameters
    assert values["weight_decay/group_0"] == pytest.approx(1.0 / (0.05 * 0.1 * STEPS))
    assert values["weight_decay/group_1"] == pytest.approx(1.0 / (0.2 * 0.1 * STEPS))
    assert values.get("weight_decay/group_2", 0.0) == 0.0


@pytest.mark.parametrize("per", ["shared", "tensor"])
def test_in_every_scope(per: Any) -> None:
    names = ("lr", OptimizerHyperparameter("weight_decay", per=per))
    values = fit(Net("AdamW", lr=0.05), tuner(hyperparameters=names, timescale=Timescale())).hyperparameters
    found = [v for label, v in values.items() if label.startswith("weight_decay")]
    assert len(found) == (1 if per == "shared" else 4)
    assert found == pytest.approx([1.0 / (0.05 * 0.1 * STEPS)] * len(found))


class OneCycle(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.001)
        cycle = OneCycleLR(optimizer, max_lr=0.1, total_steps=int(self.trainer.estimated_stepping_batches) + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def test_the_peak_of_a_schedule_counts() -> None:
    callback = fit(OneCycle(), tuner(timescale=Timescale()))
    assert callback.hyperparameters["weight_decay"] == pytest.approx(1.0 / (0.1 * 0.1 * STEPS))


class Coupled(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=1e-4)


def test_by_default_it_is_left_alone_where_it_means_something_else() -> None:
    def default(module: pl.LightningModule, **kwargs: Any) -> HyperGradient:
        callback = HyperGradient(val_dataloaders=data(seed=2), **kwargs)
        return fit(module, callback, max_epochs=-1, max_steps=500, callbacks=[StopAt(60)])  # after the race

    coupled = default(Coupled())
    assert coupled.race is not None
    assert coupled.history[0].values["weight_decay"] == pytest.approx(1e-4)
    assert coupled.race["weight_decay"] == []
    assert "pace={}" in coupled.state_dict()["run"]["settings"]["controller"]
    only_lr = Net("AdamW", lr=0.01, weight_decay=0.02)
    default(only_lr, hyperparameters=("lr",))
    assert only_lr.trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.02
    usual = default(Net("AdamW", lr=0.01))
    expected = 1.0 / (usual.race["lr"] * 0.1 * 500)
    assert usual.history[0].values["weight_decay"] == pytest.approx(expected)
    assert "pace={'weight_decay': 0.2}" in usual.state_dict()["run"]["settings"]["controller"]
    off = default(Net("AdamW", lr=0.01), timescale=None)
    assert off.history[0].values["weight_decay"] == pytest.approx(0.01)


class Two(Net):
    """Each steps at every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.net[i].parameters(), lr=0.01) for i in (0, 2)]


@pytest.mark.parametrize(
    ("module", "settings", "options", "message"),
    [
        (Coupled, {}, {}, r"Timescale\(share=0.1\) cannot .* the weight decay of Adam"),
        (Net, {"hyperparameters": ("lr",)}, {}, "weight_decay is not among the hyperparameters"),
        (Net, {}, {"max_epochs": -1, "max_time": "00:00:00:05"}, "give the Trainer max_steps or max_epochs"),
        (Two, {}, {}, "into a weight decay: 2 optimizers"),
    ],
    ids=["a rule that is not known", "weight decay is not learned", "no known length", "several optimizers"],
)
def test_one_that_cannot_be_had_is_refused_at_the_start(
    module: Any, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(module(), tuner(timescale=Timescale(), **settings), **options)


def test_what_is_no_timescale_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`timescale` must be a Timescale"):
        HyperGradient(timescale=0.1)  # type: ignore[arg-type]
