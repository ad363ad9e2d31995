"""A training script that the same command starts and, after it was killed, continues; `test_kill.py` runs it.

It begins once it has read a line, so that a successor can load its libraries before its turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint

from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Reseed, Resumable, Scheduled, Stateful, data, trainer

# By name: the module, how many batches make a step, and how many steps lie between two hypergradients.
SETTINGS = {
    "adamw-scheduled": (Scheduled, 1, 3),
    "sgd-accumulated": (lambda: Stateful("SGD", lr=0.1, momentum=0.9, weight_decay=0.01), 2, 1),
}


def wait() -> None:
    """Go on when the parent writes a line; without a parent, end."""
    if not sys.stdin.readline():
        os._exit(1)


def pause() -> None:
    """Tell the parent that now is the time to kill."""
    print("paused", flush=True)
    wait()


class PauseBeforeBatch(pl.Callback):
    """Pauses once n batches have been trained on."""

    def __init__(self, n: int) -> None:
        self.left = n

    def on_train_batch_start(self, *_: Any) -> None:
        if self.left == 0:
            pause()
        self.left -= 1


def pause_in_save(n: int) -> None:
    """Pauses when half of the n-th last.ckpt has been written."""
    write, saves = LocalFileOpener.write, 0

    def write_half(file: LocalFileOpener, content: bytes) -> int:
        nonlocal saves
        saves += Path(file.path).name == "last.ckpt"
        if saves == n:
            write(file, content[: len(content) // 2])
            file.flush()
            pause()
        return write(file, content)

    LocalFileOpener.write = write_half


class FirstStep(pl.Callback):
    """Remembers where this process began to train."""

    step = -1

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step = trainer.global_step


def train(setting: str, folder: Path, *callbacks: pl.Callback) -> None:
    """Train to the end, from the last checkpoint in the folder if there is one, and leave there what it came to."""
    make, batches_per_step, every_n_steps = SETTINGS[setting]
    torch.manual_seed(0)
    module, first = make(), FirstStep()
    learned = HyperGradient(val_dataloaders=data(40, 8, seed=2), every_n_steps=every_n_steps)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_last=True)
    fitted = trainer(
        folder,
        callbacks=[learned, saver, Reseed(), first, *callbacks],
        max_epochs=4,
        enable_checkpointing=True,
        accumulate_grad_batches=batches_per_step,
    )
    fitted.fit(module, Resumable(), data(seed=1), ckpt_path="last", weights_only=True)
    result = {
        "first_step": first.step,
        "weights": module.state_dict(),
        "optimizer": fitted.optimizers[0].state_dict(),
        "hyperparameters": learned.hyperparameters,
        "history": [dataclasses.asdict(update) for update in learned.history],
    }
    torch.save(result, folder / "result.pt")


def main() -> None:
    """Train in one folder after another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--pause-before-batch", type=int)
    parser.add_argument("--pause-in-save", type=int)
    options = parser.parse_args()
    signal.alarm(300)  # what hangs must not hang the tests
    wait()
    callbacks = [] if options.pause_before_batch is None else [PauseBeforeBatch(options.pause_before_batch)]
    if options.pause_in_save is not None:
        pause_in_save(options.pause_in_save)
    for folder in options.folders:
        train(options.setting, folder, *callbacks)


if __name__ == "__main__":
    main()
