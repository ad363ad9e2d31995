"""What the callback costs on two processes, beside what it costs on one.

Two ranks on gloo, one thread each, and one process: fits of a small transformer with and without hypergradients, in
turns. Timed are the training steps of a fit from its tenth on; the figure is the median over rounds of tuned over
plain. Needs two free cores.
Run: .venv/bin/python examples/benchmarks/ddp.py
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from overhead import Classifier, Transformer, callbacks, text
from torch.utils.data import DataLoader, TensorDataset

BATCH = 16


class Clock(L.Callback):
    """Seconds of the steps after the first ten."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 10:
            self.began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.began


def seconds(devices: int, data: TensorDataset, steps: int, every_n_steps: int | None) -> float:
    clock = Clock()
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[clock, *callbacks(DataLoader(data, BATCH), every_n_steps)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(Classifier(Transformer(64, 2, 64)), DataLoader(data, BATCH, shuffle=True, drop_last=True))
    return clock.seconds


def measure(devices: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    data = text(65)
    rows = []
    for round_ in range(arguments.rounds + 1):
        pair = (None, arguments.every) if round_ % 2 else (arguments.every, None)
        rows.append({n: seconds(devices, data, arguments.steps, n) for n in pair})
    if int(os.environ.get("LOCAL_RANK", "0")):
        return
    ratios = [row[arguments.every] / row[None] for row in rows[1:]]
    plain = statistics.median(row[None] for row in rows[1:]) / (arguments.steps - 10)
    print(
        f"{devices} process{'es' if devices > 1 else ''}: plain step {1e3 * plain:.2f} ms, every {arguments.every}: "
        f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="repeats after one warm-up (default 15)")
    parser.add_argument("--steps", type=int, default=110, help="steps of each fit (default 110)")
    parser.add_argument("--every", type=int, default=5, help="every_n_steps (default 5)")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.devices:
        measure(arguments.devices, arguments)
        return
    # In a folder of its own: ranks are started by running the script again.
    with tempfile.TemporaryDirectory() as folder:
        for devices in (1, 2):
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                f"--devices={devices}",
                f"--steps={arguments.steps}",
            ]
            command += [f"--rounds={arguments.rounds}", f"--every={arguments.every}"]
            subprocess.run(command, cwd=folder, stderr=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main()
