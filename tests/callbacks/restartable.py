"""A training script that a process begins and, after it was killed, another continues; `test_kill.py` runs it."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR

from hypergrad import (
    Exact,
    FiniteDifference,
    Forward,
    Implicit,
    Linear,
    Neumann,
    Online,
    Race,
    Readout,
    Rewind,
    Unrolled,
)
from hypergrad.callbacks import HyperGradient
from tests.callbacks.composition.features import Small
from tests.callbacks.modules import Reseed, Resumable, Scheduled, Stateful, continuing, data, trainer

HYPER = {"lr", "weight_decay"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A module, what the callback is given, how often a checkpoint is written, and the Trainer's other arguments."""

    module: Callable[[], pl.LightningModule]
    callback: Callable[[Any], dict[str, Any]]
    checkpoint: int
    loader: Callable[[], Resumable]
    trainer: dict[str, Any]


def _measured_every(n: int) -> Callable[[Any], dict[str, Any]]:
    return lambda module: {"every_n_steps": n}


def _scheduled() -> Small:
    # BatchNorm, Dropout, a learned penalty and a schedule per step.
    return Small(schedule=lambda optimizer: CosineAnnealingLR(optimizer, 20))


def _real(callback: Callable[[Any], dict[str, Any]], checkpoint: int = 3, epochs: int = 4) -> Setting:
    """Accumulated and clipped gradients, a shuffled loader; 7 batches make an epoch of 4 steps, the last of one."""
    options = {"max_epochs": epochs, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    return Setting(_scheduled, callback, checkpoint, lambda: Resumable(112, shuffle=True), options)


ESTIMATORS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "online": lambda m: {"estimator": Online(), "hyperparameters": ("lr", "weight_decay")},
    "online, in the loss": lambda m: {"estimator": Online(), "hyperparameters": ("lr", m.l2)},
    "forward, exact": lambda m: {"estimator": Forward(curvature=Exact()), "hyperparameters": ("lr", m.l2)},
    "forward, difference": lambda m: {
        "estimator": Forward(0.9, FiniteDifference()),
        "hyperparameters": ("lr", "weight_decay"),
    },
    "unrolled": lambda m: {"estimator": Unrolled(3), "hyperparameters": ("lr", "weight_decay", m.l2)},
    "implicit": lambda m: {"estimator": Implicit(Neumann(terms=3), damping=1.0), "hyperparameters": m.l2},
    "implicit, several batches": lambda m: {
        "estimator": Implicit(Neumann(terms=3), damping=1.0, batches=3),
        "hyperparameters": m.l2,
    },
}
COMPOSITION = {
    "race": Race(rates=(1e-3, 1e-2), rungs=((0.15, 2), (0.35, 1)), forks=(0.5, 2.0), least=1),
    "shape": Linear(),
    "readout": Readout(checkpoints=4, batches=2),
    "rewind": Rewind(),
}
ORDINARY = {"max_epochs": 4}
SETTINGS = {
    "adamw-scheduled": Setting(Scheduled, _measured_every(3), 4, Resumable, ORDINARY),
    "sgd-accumulated": Setting(
        *(lambda: Stateful("SGD", lr=0.1, momentum=0.9, weight_decay=0.01), _measured_every(1), 4, Resumable),
        {**ORDINARY, "accumulate_grad_batches": 2},
    ),
    **{name: _real(lambda m, make=make: {**make(m), "every_n_steps": 2}) for name, make in ESTIMATORS.items()},
    "composition": _real(lambda m: {**COMPOSITION, "every_n_steps": 2}, checkpoint=2),
    "composition, unrolled": _real(lambda m: {**COMPOSITION, "estimator": Unrolled(3), "every_n_steps": 2}, 2),
    "default": _real(lambda m: {}, checkpoint=7, epochs=110),
}


class Line:
    """What connects a training to the test: it says that it waits, and goes on when it is told to."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def pause(self) -> None:
        """Tell the parent that now is the time to kill; without a parent, end."""
        self._connection.send("paused")
        try:
            self._connection.recv()
        except EOFError:
            os._exit(1)


class PauseBeforeBatch(pl.Callback):
    """Pauses once n batches have been trained on."""

    def __init__(self, n: int, line: Line) -> None:
        self.left, self.line = n, line

    def on_train_batch_start(self, *_: Any) -> None:
        if self.left == 0:
            self.line.pause()
        self.left -= 1


def pause_in_save(n: int, line: Line) -> None:
    """Pauses when half of the n-th last.ckpt has been written."""
    write, saves = LocalFileOpener.write, 0

    def write_half(file: LocalFileOpener, content: bytes) -> int:
        nonlocal saves
        saves += Path(file.path).name == "last.ckpt"
        if saves == n:
            write(file, content[: len(content) // 2])
            file.flush()
            line.pause()
        return write(file, content)

    LocalFileOpener.write = write_half


class FirstStep(pl.Callback):
    """Remembers where this process began to train."""

    step = -1

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step = trainer.global_step


def train(name: str, folder: Path, *callbacks: pl.Callback) -> None:
    """Train to the end, from the last checkpoint in the folder if there is one, and leave there what it came to."""
    setting = SETTINGS[name]
    torch.manual_seed(0)
    module, first = setting.module(), FirstStep()
    learned = HyperGradient(val_dataloaders=data(40, 8, seed=2), **setting.callback(module))
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=setting.checkpoint, save_last=True)
    fitted = trainer(
        folder,
        callbacks=[learned, saver, Reseed(), first, *callbacks],
        enable_checkpointing=True,
        **setting.trainer,
    )
    fitted.fit(module, setting.loader(), data(seed=1), **continuing("last"))
    result = {
        "first_step": first.step,
        "weights": module.state_dict(),
        "optimizer": fitted.optimizers[0].state_dict(),
        "hyperparameters": learned.hyperparameters,
        "tensors": learned.tensors,
        "history": [dataclasses.asdict(update) for update in learned.history],
        "race": learned.race,
        "ended_with": None if learned.ended_with is None else dataclasses.astuple(learned.ended_with),
    }
    torch.save(result, folder / "result.pt")


def main(connection: Connection, name: str, folder: Path, before_batch: int | None, in_save: int | None) -> None:
    """Train in a process that pauses where it is told to."""
    signal.alarm(300)  # what hangs must not hang the tests
    torch.set_num_threads(1)
    # Checkpoints are written to a temporary file first, which only a rename on one file system moves at once.
    tempfile.tempdir = str(folder.parent / "temporary")
    line = Line(connection)
    if in_save is not None:
        pause_in_save(in_save, line)
    train(name, folder, *([] if before_batch is None else [PauseBeforeBatch(before_batch, line)]))
