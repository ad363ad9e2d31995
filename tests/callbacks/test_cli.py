"""LightningCLI builds the callback from a YAML file and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningCLI

from hypergrad import Cautious, Descent, Forward, Race
from hypergrad.callbacks import EarlyStopping, HyperGradient
from tests.callbacks.modules import Net, data

pytest.importorskip("jsonargparse")


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return data()

    def val_dataloader(self) -> Any:
        return data(seed=1)


class Plain(Net):
    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__(lr=lr)


QUIET = [
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
]


def _run(arguments: list[str], tmp: Path) -> pl.Trainer:
    options = {"default_root_dir": str(tmp)}
    cli = LightningCLI(
        Plain, Data, args=["fit", *QUIET, *arguments], save_config_callback=None, trainer_defaults=options
    )
    return cli.trainer


def _of(trainer: pl.Trainer, kind: type) -> Any:
    (found,) = [c for c in trainer.callbacks if type(c) is kind]  # type: ignore[attr-defined]
    return found


@pytest.mark.filterwarnings("ignore")
def test_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["--trainer.callbacks+=hypergrad.callbacks.HyperGradient", "--trainer.callbacks.every_n_steps=3"]
    callback = _of(_run([*arguments, "--model.lr=1e-4"], tmp_path), HyperGradient)
    assert len(callback.history) == 4
    assert set(callback.hyperparameters) == {"lr", "weight_decay"}


YAML = """
trainer:
  callbacks:
    - class_path: hypergrad.callbacks.HyperGradient
      init_args:
        hyperparameters: [lr, "betas[0]"]
        every_n_steps: 2
        estimator:
          class_path: hypergrad.Forward
          init_args:
            decay: 0.9
            curvature: {class_path: hypergrad.FiniteDifference}
        controller:
          class_path: hypergrad.Cautious
          init_args:
            controller: {class_path: hypergrad.Descent, init_args: {rate: 0.1}}
            free: 3
        race:
          class_path: hypergrad.Race
          init_args: {rates: [0.001, 0.01], rungs: [[0.25, 2], [0.5, 1]], least: 1}
    - class_path: hypergrad.callbacks.EarlyStopping
      init_args:
        monitor: val_loss
        criterion: {class_path: hypergrad.callbacks.Patience, init_args: {epochs: 5}}
"""


@pytest.mark.filterwarnings("ignore")
def test_from_a_file_with_everything_nested(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML)
    trainer = _run([f"--config={config}"], tmp_path)
    callback = _of(trainer, HyperGradient)
    assert set(callback.hyperparameters) == {"lr", "betas[0]"}
    settings = callback._settings
    assert isinstance(settings.estimator, Forward)
    assert settings.estimator.decay == 0.9
    assert isinstance(settings.controller, Cautious)
    assert isinstance(settings.controller.controller, Descent)
    assert settings.controller.controller.rate == 0.1
    assert isinstance(settings.wishes.race, Race)
    assert callback.race is not None
    _of(trainer, EarlyStopping)
