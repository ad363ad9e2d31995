"""Every logger gets the same scalars, and none is needed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypergrad import Race, Readout
from hypergrad.callbacks import HyperGradient, Update
from tests.callbacks.modules import Net, data, trainer


class Memory(Logger):
    """No more than Lightning asks of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, str, float]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines += [(step, tag, value) for tag, value in metrics.items() if tag.startswith("hypergradient/")]


def _fit(tmp: Path, loggers: Any) -> list[Update]:
    torch.manual_seed(0)
    race = Race(rates=(1e-3, 1e-1), rungs=((0.1, 2), (0.2, 1)), forks=(), least=1)
    pieces = {"race": race, "readout": Readout(checkpoints=3, batches=1)}
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=2, **pieces)
    trainer(tmp, callbacks=[callback], logger=loggers).fit(Net(), data(), data(seed=1))
    return callback.history


def test_all_loggers_get_the_same_scalars(tmp_path: Path) -> None:
    memory = Memory()
    tensorboard, table = (kind(tmp_path, name=kind.__name__, version="") for kind in (TensorBoardLogger, CSVLogger))
    history = _fit(tmp_path, [tensorboard, table, memory])
    lines = {(step, tag): value for step, tag, value in memory.lines}
    assert len(lines) == len(memory.lines)
    tags = {tag for _, tag in lines}
    assert {"hypergradient/lr/value", "hypergradient/weight_decay/snr", "hypergradient/val_loss"} <= tags
    assert {"hypergradient/race/lr_0.001", "hypergradient/readout/averaged"} <= tags
    for update in history:
        assert {tag: lines[update.step, tag] for tag in update.scalars()} == update.scalars()
    with (tmp_path / "CSVLogger" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    written = {(int(row["step"]), tag): float(row[tag]) for row in rows for tag in tags if row[tag]}
    assert written == lines
    events = EventAccumulator(str(tmp_path / "TensorBoardLogger"))
    events.Reload()
    drawn = {(e.step, tag): e.value for tag in tags for e in events.Scalars(tag)}
    assert drawn == {at: pytest.approx(value, rel=1e-6) for at, value in lines.items()}


def test_no_logger_is_needed(tmp_path: Path) -> None:
    assert _fit(tmp_path, False) == _fit(tmp_path, [Memory()])
