"""A trial that died goes on from its last checkpoint, or begins anew where that cannot be restored, and says so."""

from __future__ import annotations

import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from hypergrad.search import Float, Study, Trial
from tests.search.driving import SPACE
from tests.search.objectives import DieAfterEpoch, die, net


def test_a_killed_fit_continues_from_its_last_checkpoint_with_the_same_parameters(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        return net(trial, callbacks=[DieAfterEpoch(trial, 2)]).callback_metrics["val_loss"]

    def alone(trial: Trial) -> Any:
        return net(trial).callback_metrics["val_loss"]

    space = {"lr": Float(1e-3, 1e-1, log=True)}
    (record,) = Study(tmp_path / "s", space=space).run(train, 1, retries=1)
    assert (record.state, record.attempts) == ("complete", 2)
    # Epoch 2 was begun twice, and epochs 0 and 1 once.
    begun = sorted(path.name[:7] for path in record.folder.glob("epoch-*"))
    assert begun == ["epoch-0", "epoch-1", "epoch-2", "epoch-2", "epoch-3"]
    (undisturbed,) = Study(tmp_path / "t", space=space).run(alone, 1)
    assert record.params == undisturbed.params
    assert record.value == undisturbed.value
    assert record.curve == undisturbed.curve


def test_a_damaged_checkpoint_is_not_continued_from(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        if trial.attempt == 2:
            checkpoint = trial.folder / "checkpoints" / "last.ckpt"
            whole = checkpoint.read_bytes()
            checkpoint.write_bytes(whole[: len(whole) // 2])
            assert trial.checkpoint is None
            checkpoint.write_bytes(whole[:3000] + b"\0" * 100 + whole[3100:])
            assert trial.checkpoint is None
        return net(trial, callbacks=[DieAfterEpoch(trial, 2)]).callback_metrics["val_loss"]

    (record,) = Study(tmp_path / "s", space={"lr": Float(1e-3, 1e-1, log=True)}).run(train, 1, retries=1)
    assert (record.state, record.attempts) == ("complete", 2)
    assert len(list(record.folder.glob("epoch-0-*"))) == 2
    assert str(record.reason).startswith("began anew in attempt 2: ")
    assert str(record.reason).endswith("last.ckpt is damaged")
    assert "begins anew" in (record.folder / "log.txt").read_text()


@pytest.mark.parametrize("how", ["no checkpoint", "another model"])
def test_a_checkpoint_that_cannot_be_restored_costs_one_attempt(tmp_path: Path, how: str) -> None:
    """It is a whole file, so that only trying tells."""

    def train(trial: Trial) -> Any:
        if trial.attempt == 2:
            checkpoint = trial.folder / "checkpoints" / "last.ckpt"
            if how == "no checkpoint":
                with zipfile.ZipFile(checkpoint, "w") as archive:
                    archive.writestr("archive/data.pkl", b"not a pickle")
            else:
                content = torch.load(checkpoint, weights_only=False)
                content["state_dict"] = {"another": torch.zeros(3)}
                torch.save(content, checkpoint)
        return net(trial, callbacks=[DieAfterEpoch(trial, 2)]).callback_metrics["val_loss"]

    (record,) = Study(tmp_path / "s", space={"lr": Float(1e-3, 1e-1, log=True)}).run(train, 1, retries=3)
    assert (record.state, record.attempts) == ("complete", 3)
    assert "an earlier attempt could not be continued from" in str(record.reason)
    assert len(list(record.folder.glob("epoch-0-*"))) == 2
    assert sorted(record.curve) == [1, 2, 3, 4]
    assert not (record.folder / "checkpoints" / "restoring").exists()


def test_an_exception_or_a_kill_later_on_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    class Dies(pl.Callback):
        def __init__(self, trial: Trial) -> None:
            self.trial = trial

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            (self.trial.folder / f"{self.trial.attempt}-{trainer.current_epoch}").touch()
            if trainer.current_epoch == self.trial.attempt:
                assert self.trial.attempt == 1 or self.trial.checkpoint is not None  # looked at once more
                die("exception" if self.trial.attempt == 2 else "kill")

    def train(trial: Trial) -> Any:
        if trial.attempt == 3 and trial.checkpoint:  # taken, and killed before it was restored
            (trial.folder / "again").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return net(trial, callbacks=[Dies(trial)] if trial.attempt < 3 else []).callback_metrics["val_loss"]

    (record,) = Study(tmp_path / "s", space={"lr": Float(1e-3, 1e-1, log=True)}).run(train, 1, retries=3)
    assert (record.state, record.attempts, record.reason) == ("complete", 4, None)
    assert sorted(p.name for p in record.folder.glob("[12]-*")) == ["1-0", "1-1", "2-1", "2-2"]


def test_a_fold_whose_checkpoint_cannot_be_restored_begins_anew(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        fold = trial.fold(1)
        place = fold.folder / "checkpoints"
        place.mkdir(parents=True, exist_ok=True)
        if trial.attempt == 1:
            torch.save({}, place / "last.ckpt")
        if fold.checkpoint is not None:
            raise KeyError("state_dict")
        return 1.0

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1, retries=1)
    assert (record.state, record.attempts) == ("complete", 2)
