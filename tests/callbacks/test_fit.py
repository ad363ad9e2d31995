"""The callback in real fits: what it measures, what it learns, what it composes with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from hypergrad import Descent, Hold, OptimizerHyperparameter
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer


def _fit(module: pl.LightningModule, callback: HyperGradient, tmp: Path, **kwargs: Any) -> pl.Trainer:
    fitted = trainer(tmp, callbacks=[callback], **kwargs)
    fitted.fit(module, data(), data(seed=1))
    return fitted


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
    from hypergrad import Online, Tuner, resolve
    from hypergrad.callbacks._attachment import Attachment

    def run(value: float, attach: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        attachment = (
            Attachment(0, optimizer, resolve(optimizer, ["lr"]), Online(), Tuner(Hold()), 3) if attach else None
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


def test_learned_values_stand_in_param_groups_only_during_the_update(tmp_path: Path) -> None:
    class Looks(Net):
        seen: set[float]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.add(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.seen.add(optimizer.param_groups[0]["lr"])

    module = Looks()
    module.seen = set()
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(module, callback, tmp_path)
    assert module.seen == {0.01}
    assert len({u.values["lr"] for u in callback.history}) > 5


def test_a_controller_shared_by_two_callbacks_or_fits_is_not_shared_memory(tmp_path: Path) -> None:
    shared = Descent()
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1, controller=shared)
        _fit(Net(), callback, tmp_path)
        results.append(callback.hyperparameters)
    assert results[0] == results[1]
    assert shared.state_dict() == {}


def test_learns_upwards_from_a_hopeless_lr(tmp_path: Path) -> None:
    plain, tuned = (Net(lr=1e-6, weight_decay=0.1) for _ in range(2))
    tuned.load_state_dict(plain.state_dict())
    reference = trainer(tmp_path, max_epochs=30)
    reference.fit(plain, data(), data(seed=1))
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=2)
    fitted = _fit(tuned, callback, tmp_path, max_epochs=30)
    assert callback.hyperparameters["lr"] > 1e-4
    assert fitted.callback_metrics["val_loss"] < 0.6 * reference.callback_metrics["val_loss"]


def test_mode_max_climbs(tmp_path: Path) -> None:
    class Likelihood(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("log_likelihood", -self.loss(batch))

    def learned(module: Net, **kwargs: Any) -> HyperGradient:
        torch.manual_seed(0)
        for p in module.parameters():
            p.data.normal_(std=0.5)
        callback = HyperGradient(val_dataloaders=data(seed=2), **kwargs)
        _fit(module, callback, tmp_path)
        return callback

    minimised = learned(Net(lr=1e-5))
    maximised = learned(Likelihood(lr=1e-5), monitor="log_likelihood", mode="max")
    assert maximised.hyperparameters == minimised.hyperparameters
    assert maximised.history[0].hypergradients["lr"] == -minimised.history[0].hypergradients["lr"]


@pytest.mark.parametrize(
    "how", ["logs", "logs and returns a float", "logs a float and returns", "returns", "returns a dict", "log_dict"]
)
def test_the_validation_loss_is_what_is_logged_or_returned(tmp_path: Path, how: str) -> None:
    class Variant(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            if how == "log_dict":
                self.log_dict({"val_loss": loss, "val_twice": 2 * loss}, prog_bar=True)
            elif how == "logs a float and returns":
                self.log("val_loss", loss.item())
                return loss
            elif how.startswith("logs"):
                self.log("val_loss", loss, on_epoch=True)
                return loss.item() if "float" in how else None
            elif how == "returns":
                return loss
            else:
                return {"loss": loss, "logits": 1}
            return None

    callback = HyperGradient(val_dataloaders=data(seed=2), controller=Hold())
    _fit(Variant(), callback, tmp_path)
    assert all(u.hypergradients["lr"] != 0.0 for u in callback.history)


def test_learned_factor_multiplies_the_schedule(tmp_path: Path) -> None:
    class Scheduled(Net):
        seen: list[float]

        def configure_optimizers(self) -> Any:
            self.seen = []
            optimizer = super().configure_optimizers()
            warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen.append(self.optimizers().param_groups[0]["lr"])

    module = Scheduled(lr=0.001)
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(module, callback, tmp_path)
    scheduled = [0.001 * t / 10 for t in range(18)]
    # The scheduler has stepped by the end of the batch, and sees its own values only.
    assert module.seen == pytest.approx([*scheduled[1:], 0.0018])
    assert callback.history[0].values["lr"] == 0.0
    assert callback.history[0].hypergradients["lr"] < 0.0
    assert "times the schedule)" in callback.summary()
    factors = [u.values["lr"] / s for u, s in zip(callback.history[1:], scheduled[1:], strict=True)]
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] > 2.0
    assert all(0.6 < b / a < 1.7 for a, b in itertools.pairwise(factors))


def test_hand_written_warm_up_in_optimizer_step(tmp_path: Path) -> None:
    class WarmUp(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.001 * min(1.0, (self.global_step + 1) / 10)
            optimizer.step(closure=closure)

    callback = HyperGradient(("lr",), val_dataloaders=data(seed=2), every_n_steps=1, controller=Hold())
    _fit(WarmUp(), callback, tmp_path)
    assert [u.values["lr"] for u in callback.history[:3]] == pytest.approx([1e-4, 2e-4, 3e-4])


def test_param_groups_learn_apart_and_excluded_ones_stay_excluded(tmp_path: Path) -> None:
    class Groups(Net):
        def configure_optimizers(self) -> Any:
            weights = {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": 0.1, "name": "weights"}
            biases = {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 1e-4}
            return torch.optim.AdamW([weights, biases], lr=1e-3)

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fitted = _fit(Groups(), callback, tmp_path)
    assert set(callback.hyperparameters) == {"lr/weights", "lr/group_1", "weight_decay/weights"}
    assert callback.hyperparameters["lr/weights"] / 1e-3 != callback.hyperparameters["lr/group_1"] / 1e-4
    assert fitted.optimizers[0].param_groups[1]["weight_decay"] == 0.0


def test_weight_decay_of_zero_everywhere_starts_from_its_floor(tmp_path: Path) -> None:
    callback = HyperGradient(("weight_decay",), val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(Net(optimizer="SGD", lr=0.1), callback, tmp_path)
    values = [u.values["weight_decay"] for u in callback.history]
    assert values[0] == 0.0
    assert 1e-6 <= values[-1] < 1.0
    assert values[-1] > 0.0


class Manual(Net):
    """Two optimizers, stepped by hand; the first of them twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, first, second):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.01), torch.optim.Adam(self.net[2].parameters(), lr=1e-3)


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(Manual(), callback, tmp_path)
    assert set(callback.hyperparameters) == {
        "lr/optimizer_0",
        "lr/optimizer_1",
        "weight_decay/optimizer_0",
        "weight_decay/optimizer_1",
    }
    assert len(callback.history) == 18
    assert all(set(u.values) == set(callback.hyperparameters) for u in callback.history)


def test_gradients_are_counted_and_the_summary_says_so(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=4)
    assert callback.summary() == "HyperGradient: not fitted yet"
    assert callback.hyperparameters == {}
    _fit(Net(), callback, tmp_path)
    # 18 steps, every fourth, and one at the start that tries the validation loss
    assert [u.step for u in callback.history] == [4, 8, 12, 16]
    assert "5 validation gradients beside 18 training gradients" in callback.summary()
    assert "lr 0.01 -> " in callback.summary()


def test_a_passing_nan_skips_the_update_and_is_recorded(tmp_path: Path) -> None:
    class Nan(Net):
        calls = 0

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return loss * float("nan") if self.global_step in (2, 3) and not self.trainer.sanity_checking else loss

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(Nan(), callback, tmp_path)
    skipped = [u.step for u in callback.history if u.skipped]
    assert skipped == [2, 3]
    assert callback.history[1].skipped == "non-finite validation loss"
    assert callback.history[3].values == callback.history[1].values
    assert "2 updates skipped" in callback.summary()
    assert all(torch.isfinite(torch.tensor(list(u.values.values()))).all() for u in callback.history)


def test_training_step_that_returns_none_is_no_step_to_learn_from(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    with pytest.warns(UserWarning, match="returned `None`"):
        _fit(Skips(), callback, tmp_path)
    assert all(u.skipped is None for u in callback.history)


def test_frozen_and_later_unfrozen_layers(tmp_path: Path) -> None:
    class Freezes(Net):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(Freezes(), callback, tmp_path)
    assert len(callback.history) == 18


def test_param_groups_added_during_the_fit(tmp_path: Path) -> None:
    class Grows(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net[2].parameters(), lr=1e-3)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.optimizers().optimizer.add_param_group({"params": list(self.net[0].parameters()), "lr": 1e-4})

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(Grows(), callback, tmp_path)
    assert set(callback.history[0].values) == {"lr", "weight_decay"}
    assert set(callback.hyperparameters) == {f"{n}/group_{i}" for n in ("lr", "weight_decay") for i in (0, 1)}


def test_a_second_fit_starts_afresh(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1, controller=Descent())
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        _fit(Net(), callback, tmp_path)
        results.append((callback.hyperparameters, len(callback.history)))
    assert results[0] == results[1]


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
def test_fast_dev_run_and_no_validation_loop(tmp_path: Path) -> None:
    _fit(Net(), HyperGradient(every_n_steps=1), tmp_path, fast_dev_run=True)
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fitted = trainer(tmp_path, callbacks=[callback], limit_val_batches=0)
    fitted.fit(Net(), data())
    assert len(callback.history) == 18


def test_datamodule_with_batch_transfer_hooks(tmp_path: Path) -> None:
    class Module(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return data()

        def val_dataloader(self) -> Any:
            return data(seed=1)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert self.trainer.validating or self.trainer.training or self.trainer.sanity_checking
            return {"x": batch[0], "y": batch[1]}

    class FromDict(Net):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss((batch["x"], batch["y"]))

    callback = HyperGradient(every_n_steps=2)
    trainer(tmp_path, callbacks=[callback]).fit(FromDict(), datamodule=Module())
    assert len(callback.history) == 9


def test_several_validation_loaders_are_told_apart_by_the_monitor(tmp_path: Path) -> None:
    indices: list[int] = []

    class Two(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if self.trainer.global_step and not self.trainer.sanity_checking:
                indices.append(dataloader_idx)
            self.log("val_loss", self.loss(batch))

    callback = HyperGradient(monitor="val_loss/dataloader_idx_1", every_n_steps=1)
    fitted = trainer(tmp_path, callbacks=[callback], max_epochs=1)
    fitted.fit(Two(), data(), [data(seed=1), data(seed=2)])
    assert indices[:5] == [1] * 5
    assert len(callback.history) == 6


@pytest.mark.parametrize("net", ["lstm", "gru", "attention", "embedding", "tied"])
def test_layers(tmp_path: Path, net: str) -> None:
    class Layers(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kind = net
            self.rnn = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(net, torch.nn.LSTM)(5, 8, batch_first=True)
            self.attention = torch.nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
            self.embedding = torch.nn.Embedding(11, 8)
            self.head = torch.nn.Linear(8, 11)
            if net == "tied":
                self.head.weight = self.embedding.weight

        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            tokens = (x * 2).round().long().clamp(-5, 5) + 5
            h = self.embedding(tokens)
            if net in ("lstm", "gru"):
                h = self.rnn(x[:, None, :])[0]
            elif net == "attention":
                h = torch.nn.functional.scaled_dot_product_attention(h, h, h) + self.attention(h, h, h)[0]
            return torch.nn.functional.cross_entropy(self.head(h.mean(1)), y)

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=3)
    _fit(Layers(), callback, tmp_path)
    assert all(u.hypergradients["lr"] != 0.0 and u.skipped is None for u in callback.history)
