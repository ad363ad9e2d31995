"""What TensorBoard shows, and the history that it is written from."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypergrad.callbacks import HyperGradient, Update
from hypergrad.callbacks._history import Stopwatch, pack, unpack
from tests.callbacks.modules import Net, data, trainer


class Groups(Net):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "name": "trunk"}, {"params": self.net[2].parameters()}]
        return torch.optim.AdamW(groups, lr=0.01)


def test_one_chart_for_each_hyperparameter_and_group(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=2)
    fitted = trainer(tmp_path, callbacks=[callback], logger=logger, log_every_n_steps=4)
    fitted.fit(Groups(), data(), data(seed=1))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    mine = {tag for tag in events.Tags()["scalars"] if tag.startswith("hypergradient/")}
    columns = ("value", "hypergradient", "cosine", "snr")
    expected = {
        f"hypergradient/{n}/{g}/{c}" for n in ("lr", "weight_decay") for g in ("trunk", "group_1") for c in columns
    }
    assert mine == {*expected, "hypergradient/val_loss"}
    by_step = {u.step: u for u in callback.history}
    written = events.Scalars("hypergradient/lr/trunk/value")
    assert [e.step for e in written] == [2, 6, 10, 14, 18]
    assert [e.value for e in written] == pytest.approx([by_step[e.step].values["lr/trunk"] for e in written])


def test_the_progress_bar_shows_the_current_lr(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fitted = trainer(tmp_path, callbacks=[callback], enable_progress_bar=True, log_every_n_steps=50)
    fitted.fit(Net(), data(), data(seed=1))
    assert fitted.progress_bar_metrics["hypergradient/lr"] == pytest.approx(callback.hyperparameters["lr"])
    assert callback.hyperparameters["lr"] != pytest.approx(callback.history[-1].values["lr"])  # that of the next step


def test_history_survives_packing() -> None:
    history = [
        Update(1, 0.5, {"lr": 0.1}, {"lr": -1.0}, {"lr": 0.2}, {"lr": 0.0}),
        Update(2, math.inf, {"lr": 0.1}, {"lr": math.inf}, skipped="non-finite validation loss"),
        Update(3, 0.4, {"lr": 0.1, "lr/a:b": 0.2}, {"lr": 1e-300, "lr/a:b": -0.0}),
    ]
    assert unpack(pack(history)) == history
    assert unpack(pack([])) == []


def test_numbers_that_are_not_finite_are_not_drawn() -> None:
    update = Update(2, math.nan, {"lr": 0.1}, {"lr": math.inf})
    assert update.scalars() == {"hypergradient/lr/value": 0.1}


def test_stopwatch_adds_up_and_forgets_what_was_never_stopped() -> None:
    watch = Stopwatch(torch.device("cpu"), seconds=1.0)
    watch.stop()
    watch.start()
    watch.start()
    with watch.running():
        pass
    watch.stop()
    assert 1.0 < watch.seconds < 1.5


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("ends", ["by itself", "by an exception"])
def test_the_last_value_is_written_however_the_fit_ends(ends: str, tmp_path: Path) -> None:
    class Fails(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            if ends != "by itself" and self.trainer.global_step == 15:
                raise RuntimeError("as asked for")

    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=2)
    fitted = trainer(tmp_path, callbacks=[callback], logger=logger, log_every_n_steps=50)
    with contextlib.suppress(RuntimeError):
        fitted.fit(Fails(), data(), data(seed=1))
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    last = callback.history[-1]
    assert last.step == (18 if ends == "by itself" else 14)
    written = events.Scalars("hypergradient/lr/value")
    assert [e.step for e in written] == [2, last.step]
    assert written[-1].value == pytest.approx(last.values["lr"])
