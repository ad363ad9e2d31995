"""A run resumed from any checkpoint continues bit-identically."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from hypergrad import Cosine, Descent, Forward, Hold, Readout, Rewind
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Reseed, Resumable, Saves, Scheduled, continuing, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*ModelCheckpoint")


class Augmented(Dataset[Any]):
    """Hyper-validation data with randomness of its own."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        return torch.full((5,), i / 24) + torch.rand(5), i % 3


def _fit(tmp: Path, callback: HyperGradient, every: int, resume: str | None = None) -> tuple[Any, ModelCheckpoint]:
    torch.manual_seed(0)
    module = Scheduled()
    saver = ModelCheckpoint(tmp, "{step}", save_top_k=-1, every_n_train_steps=every, monitor=None)
    options = {"max_epochs": 4, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    fitted = trainer(tmp, callbacks=[callback, saver, Reseed()], **options)
    fitted.fit(module, Resumable(), data(seed=1), **continuing(resume))
    return (module.state_dict(), fitted.optimizers[0].state_dict(), callback.hyperparameters, callback.history), saver


@pytest.mark.parametrize("step", [3, 6, 7, 14, 20])
@pytest.mark.parametrize("every_n_steps", [1, 5])
def test_from_any_step(tmp_path: Path, step: int, every_n_steps: int) -> None:
    def callback() -> HyperGradient:
        return HyperGradient(val_dataloaders=DataLoader(Augmented(), batch_size=5), every_n_steps=every_n_steps)

    whole, _ = _fit(tmp_path / "whole", callback(), every=step)
    checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
    resumed, _ = _fit(tmp_path / "resumed", callback(), every=100, resume=str(checkpoint))
    for a, b in zip(whole[:2], resumed[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert resumed[2] == whole[2]
    assert resumed[3] == whole[3]
    assert whole[3][-1].step == 24 - 24 % every_n_steps


PIECES = {"readout": Readout(checkpoints=6, batches=2), "rewind": Rewind(), "shape": Cosine(), "controller": Descent()}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("step", [3, 6, 12, 15])
@pytest.mark.parametrize("pieces", [{}, PIECES], ids=["plain", "pieces"])
def test_from_a_checkpoint_of_a_callback_anywhere_in_the_list(
    tmp_path: Path, step: int, first: bool, pieces: dict[str, Any]
) -> None:
    def fit(*, saves: bool = False, resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        module, ours = Scheduled(), HyperGradient(val_dataloaders=data(seed=2), every_n_steps=3, **pieces)
        savers = [Saves("on_train_batch_end", tmp_path)] if saves else []
        callbacks = [*savers, ours] if first else [ours, *savers]
        fitted = trainer(tmp_path, callbacks=[*callbacks, Reseed()], max_epochs=4, num_sanity_val_steps=0)
        fitted.fit(module, Resumable(), data(seed=1), **continuing(None if resume is None else str(resume)))
        return (module.state_dict(), fitted.optimizers[0].state_dict()), ours.history, ours.hyperparameters

    tensors, *found = fit()
    for again in (fit(saves=True), fit(resume=tmp_path / f"{step}.ckpt")):
        torch.testing.assert_close(again[0], tensors, rtol=0, atol=0)
        assert list(again[1:]) == found
    assert found[0][-1].step == 24


def test_a_checkpoint_after_another_callback_has_failed_measures_nothing(tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                raise KeyError("mine")

    ours = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=3)
    fitted = trainer(tmp_path, callbacks=[Fails(), ours], max_epochs=4)
    with pytest.raises(KeyError, match="mine"):
        fitted.fit(Scheduled(), Resumable(), data(seed=1))
    fitted.save_checkpoint(tmp_path / "failed.ckpt")
    assert [u.step for u in ours.history] == [3]
    again = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=3)
    fitted = trainer(tmp_path, callbacks=[again], max_epochs=4)
    fitted.fit(Scheduled(), Resumable(), data(seed=1), **continuing(str(tmp_path / "failed.ckpt")))
    assert again.history[0] == ours.history[0]
    assert len(again.history) > 4


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad", "on_before_optimizer_step"])
def test_a_checkpoint_in_the_middle_of_a_batch_changes_nothing(tmp_path: Path, hook: str) -> None:
    def fit(*savers: pl.Callback) -> Any:
        torch.manual_seed(0)
        module, ours = Scheduled(), HyperGradient(val_dataloaders=data(seed=2), every_n_steps=3, **PIECES)
        trainer(tmp_path, callbacks=[*savers, ours, Reseed()], max_epochs=4).fit(module, Resumable(), data(seed=1))
        return module.state_dict(), ours.history

    found, expected = fit(Saves(hook, tmp_path)), fit()
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1] == expected[1]


def test_from_a_checkpoint_saved_after_the_fit_or_after_an_exception(tmp_path: Path) -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 9:
                raise InterruptedError

    def fit(epochs: int, *extra: pl.Callback, resume: Path | None = None) -> tuple[pl.Trainer, Any, HyperGradient]:
        torch.manual_seed(0)
        module, callback = Scheduled(), HyperGradient(val_dataloaders=data(seed=2), every_n_steps=5)
        fitted = trainer(tmp_path, max_epochs=epochs, callbacks=[callback, Reseed(), *extra], num_sanity_val_steps=0)
        with contextlib.suppress(InterruptedError):
            fitted.fit(module, Resumable(), data(seed=1), ckpt_path=resume)
        return fitted, module, callback

    _, expected, whole = fit(4)
    fitted, _, _ = fit(2)
    fitted.save_checkpoint(tmp_path / "after.ckpt")
    _, module, callback = fit(4, resume=tmp_path / "after.ckpt")
    assert callback.history == whole.history
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=0, atol=0)
    # An exception loses the batch that was being read, so that only the callback's own progress can be compared.
    fitted, _, _ = fit(4, Interrupt())
    fitted.save_checkpoint(tmp_path / "exception.ckpt")
    _, _, callback = fit(4, resume=tmp_path / "exception.ckpt")
    assert callback.history[:1] == whole.history[:1]
    assert [u.step for u in callback.history[:3]] == [5, 10, 15]


def test_state_is_plain_and_small(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _, saver = _fit(tmp_path, callback, every=20)
    checkpoint = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    (state,) = (s for name, s in checkpoint["callbacks"].items() if name.startswith("HyperGradient"))
    assert state["run"]["history"]["table"].shape[0] == 20
    assert saver.last_model_path == ""


def test_loads_without_the_callback_and_with_other_hyperparameters(tmp_path: Path) -> None:
    _fit(tmp_path, HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1), every=20)
    path = str(tmp_path / "step=20.ckpt")
    with pytest.warns(UserWarning, match=r"callbacks used to create the checkpoint.*HyperGradient"):
        trainer(tmp_path, max_epochs=4).fit(Scheduled(), Resumable(), data(seed=1), ckpt_path=path)
    fewer = HyperGradient(("lr",), val_dataloaders=data(seed=2), every_n_steps=1)
    with pytest.warns(UserWarning, match=r"written by HyperGradient\(hyperparameters=\('lr', 'weight_decay'\)\)"):
        _fit(tmp_path / "fewer", fewer, every=100, resume=path)
    assert set(fewer.hyperparameters) == {"lr/group_0", "lr/group_1"}


def test_a_callback_added_on_resume_starts_afresh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=12)
    options = {"max_epochs": 4, "enable_checkpointing": True}
    trainer(tmp_path, callbacks=[saver], **options).fit(Scheduled(), Resumable(), data(seed=1))
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(tmp_path / "added", callback, every=100, resume=str(tmp_path / "step=12.ckpt"))
    assert [u.step for u in callback.history] == list(range(13, 25))


def test_a_setting_that_the_checkpoint_does_not_know_is_no_obstacle(tmp_path: Path) -> None:
    first = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(tmp_path, first, every=12)
    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if "HyperGradient" in key)
    del state["run"]["settings"]["timescale"]
    torch.save(saved, tmp_path / "older.ckpt")
    again = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(tmp_path / "again", again, every=100, resume=str(tmp_path / "older.ckpt"))
    assert again.history == first.history


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint", "ignore:Forward looks back at steps")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"controller": Hold()}, r"controller=Cautious\(controller=Descent\(rate=0.5,.*, now Hold\(\)"),
        ({"controller": Descent()}, r"controller=Cautious\(.*, now Descent\("),
        ({"every_n_steps": 7}, "every_n_steps=1, now 7"),
        ({"seed": 3}, "seed=0, now 3"),
        ({"readout": Readout(), "rewind": Rewind(), "budget": 2.0}, r"budget=1.25, now 2.0; .*readout='auto', now Rea"),
        ({"estimator": Forward()}, r"estimator=Online\(.*, now Forward\("),
    ],
    ids=lambda v: str(v)[:20],
)
def test_loads_with_other_settings_and_says_which(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    first = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    _fit(tmp_path, first, every=12)
    other = HyperGradient(**{"val_dataloaders": data(seed=2), "every_n_steps": 1, **settings})
    with pytest.warns(UserWarning, match=f"written with other settings of HyperGradient: .*{said}"):
        _fit(tmp_path / "again", other, every=100, resume=str(tmp_path / "step=12.ckpt"))
    assert other.history[:12] == first.history[:12]
    assert other.history[-1].step > 12
    # What was learned by then stays: the next measurement is under the same factor on the schedule.
    factors = [
        u.values["lr/group_0"] / (1 + math.cos(math.pi * (u.step - 1) / 30))
        for u in (other.history[12], first.history[12])
    ]
    assert factors[0] == pytest.approx(factors[1])
