"""Pruning inside real fits: graceful, at once for what is not finite, and the same on all ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from hypergrad import ConfigurationError
from hypergrad.callbacks import TrialPruning
from hypergrad.search import Float, Local, Study, Trial
from tests.callbacks.modules import Net, data, trainer
from tests.search.objectives import net

SPACE = {"lr": Float(1e-3, 1e-2)}


class Given(Net):
    """Logs a number per epoch as val_loss, and says which hooks ran."""

    def __init__(self, values: list[float], folder: Path) -> None:
        super().__init__()
        self.values, self.folder = values, folder

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 0.0 if self.trainer.sanity_checking else self.values[self.current_epoch])

    def on_train_epoch_end(self) -> None:
        (self.folder / f"epoch-{self.current_epoch}-rank-{self.global_rank}").touch()

    def on_fit_end(self) -> None:
        (self.folder / f"fit-end-rank-{self.global_rank}").touch()


def _fit(trial: Trial, values: list[float], **options: Any) -> pl.Trainer:
    module = Given(values, trial.folder)
    fitted = trial.trainer(max_epochs=len(values), accelerator="cpu", **options)
    fitted.fit(module, data(), data(seed=1), ckpt_path=trial.checkpoint)
    return fitted


def test_the_pruner_stops_a_fit_gracefully(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        values = [1.0, 1.0, 1.0] if trial.number == 0 else [2.0, 3.0, 4.0]
        fitted = _fit(trial, values)
        (trial.folder / "checkpoint.json").write_text(json.dumps(fitted.checkpoint_callback.best_model_path))
        return fitted.callback_metrics["val_loss"]

    pruner = ("median", {"n_startup_trials": 1, "n_warmup_steps": 2})
    good, bad = Study(tmp_path / "s", space=SPACE, pruner=pruner).run(train, 2)
    assert (good.state, bad.state) == ("complete", "pruned")
    assert bad.curve == {1: 2.0, 2: 3.0}
    assert bad.value == 3.0
    assert str(bad.reason).endswith("stopped it at step 2, where val_loss was 3")
    assert sorted(p.name for p in bad.folder.glob("*rank-0")) == ["epoch-0-rank-0", "epoch-1-rank-0", "fit-end-rank-0"]
    assert (bad.folder / "checkpoints" / "last.ckpt").exists()


def test_not_a_number_ends_a_fit_at_once_without_any_pruner(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        return _fit(trial, [1.0, math.nan, 1.0, 1.0]).callback_metrics["val_loss"]

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1)
    assert (record.state, record.reason) == ("pruned", "val_loss is nan at step 2")
    assert not list(record.folder.glob("epoch-2-*"))


def test_every_n_epochs_and_steps(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        settings: dict[str, Any] = [{"every_n_epochs": 2}, {"every_n_steps": 4, "monitor": "train_loss"}][trial.number]
        return _fit(trial, [1.0] * 4, callbacks=[TrialPruning(trial, **settings)]).callback_metrics["val_loss"]

    epochs, steps = Study(tmp_path / "s", space=SPACE).run(train, 2)
    assert epochs.curve == {2: 1.0, 4: 1.0}
    assert sorted(steps.curve) == list(range(4, 25, 4))  # 6 batches an epoch


def test_a_metric_that_never_appears_is_an_error_that_lists_what_there_is(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        settings: dict[str, Any] = [{"monitor": "val_acc"}, {"every_n_epochs": 9}][trial.number]
        return _fit(trial, [1.0] * 2, callbacks=[TrialPruning(trial, **settings)]).callback_metrics["val_loss"]

    absent, never = Study(tmp_path / "s", space=SPACE).run(train, 2)
    assert absent.state == never.state == "failed"
    assert "'val_acc' is not among the logged metrics ['train_loss', 'val_loss']" in str(absent.reason)
    assert "'val_loss' was never reported" in str(never.reason)


def test_outside_a_study_it_does_nothing(tmp_path: Path) -> None:
    fitted = trainer(tmp_path, callbacks=[TrialPruning(monitor="whatever")])
    fitted.fit(Net(), data(), data(seed=1))
    assert fitted.current_epoch == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": 0}, "`every_n_epochs` must be"),
        ({"every_n_steps": 1.5}, "`every_n_steps` must be"),
        ({"every_n_epochs": 1, "every_n_steps": 1}, "Give one of"),
        ({"trial": 3}, "`trial` must be the Trial"),
        ({"monitor": 3}, "`monitor` must be"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TrialPruning(**settings)


def test_what_the_trainer_wires_in(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        fitted = net(trial, epochs=2)
        assert fitted.default_root_dir == str(trial.folder)
        assert fitted.progress_bar_callback is None
        bare = trial.trainer(logger=False, enable_checkpointing=False, max_epochs=1, accelerator="cpu")
        assert bare.logger is None
        assert bare.checkpoint_callback is None
        return fitted.callback_metrics["val_loss"]

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1)
    assert record.state == "complete", record.reason
    assert set(record.metrics) == {"train_loss", "val_loss"}
    assert record.metrics["val_loss"] == record.curve[2] == record.value


def test_two_ranks_are_one_trial_and_agree(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        values = [1.0, 1.0, 1.0] if trial.number == 0 else [2.0, 3.0, 4.0]
        fitted = _fit(trial, values, devices=2, strategy="ddp")
        return fitted.callback_metrics["val_loss"]

    pruner = ("median", {"n_startup_trials": 1, "n_warmup_steps": 2})
    study = Study(tmp_path / "s", space=SPACE, pruner=pruner)
    good, bad = study.run(train, 2, execution=Local(1, threads=1))
    assert (good.state, bad.state) == ("complete", "pruned"), (good, bad)
    assert (good.attempts, bad.attempts) == (1, 1)
    for rank in (0, 1):
        assert len(list(good.folder.glob(f"epoch-*-rank-{rank}"))) == 3
        assert len(list(bad.folder.glob(f"epoch-*-rank-{rank}"))) == 2
        assert (bad.folder / f"fit-end-rank-{rank}").exists()
