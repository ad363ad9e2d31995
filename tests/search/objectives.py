"""Small trainings for the tests of studies; imported by name in the workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from hypergrad.search import Trial
from hypergrad.search.execution.server import ForkServer
from tests.callbacks.modules import Net, data


def square(trial: Trial) -> float:
    return float((trial.params["x"] - 1.0) ** 2)


def curve(trial: Trial, steps: int = 4) -> float:
    """Reports (x - 1)^2 + 1/step at each step."""
    value = (trial.params["x"] - 1.0) ** 2
    for step in range(1, steps + 1):
        if not trial.report(value + 1 / step, step):
            break
    return float(value)


def attempts_before(trial: Trial) -> int:
    """How often the trial was started before, counted by the trial itself in its own folder."""
    marks = trial.folder / "marks"
    marks.mkdir(exist_ok=True)
    count = len(list(marks.iterdir()))
    (marks / f"{count}-{os.getpid()}").touch()
    return count


def die(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exception":
        raise ValueError("as asked for")
    if how == "exit":
        os._exit(3)
    if how == "hang":
        time.sleep(600)
    if how == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def net(trial: Trial, epochs: int = 4, **options: Any) -> pl.Trainer:
    """A real fit of a tiny network with the trial's learning rate, continued where there is a checkpoint."""
    trainer = trial.trainer(max_epochs=epochs, accelerator="cpu", log_every_n_steps=1, **options)
    trainer.fit(Net(lr=trial.params["lr"]), data(), data(seed=1), ckpt_path=trial.checkpoint)
    return trainer


def fit(trial: Trial) -> Any:
    return net(trial).callback_metrics["val_loss"]


def kept_server() -> ForkServer:
    """The one that the next study will use."""
    server = ForkServer.take()
    server.give_back()
    return server


class DieAfterEpoch(pl.Callback):
    """On the first attempt only."""

    def __init__(self, trial: Trial, epoch: int) -> None:
        self.active, self.epoch = trial.attempt == 1, epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Path(trainer.default_root_dir, f"epoch-{trainer.current_epoch}-{os.getpid()}").touch()
        if self.active and trainer.current_epoch == self.epoch:
            die("kill")
