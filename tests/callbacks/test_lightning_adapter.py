"""The private corners of Lightning that one adapter file uses: these break when one moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from hypergrad.callbacks._lightning import to_device, validation_loaders
from tests.callbacks.modules import Net, data, trainer


class Looks(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.loaders = validation_loaders(trainer)
        self.batch = to_device(trainer, pl_module, next(iter(self.loaders[0])), 0)


class Hooks(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1.0, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2.0, batch[1]


def test_loaders_are_there_before_the_first_validation_and_batches_pass_all_hooks(tmp_path: Path) -> None:
    looks, val = Looks(), data(seed=1)
    trainer(tmp_path, callbacks=[looks], num_sanity_val_steps=0, max_epochs=1, precision="64-true").fit(
        Hooks(), data(), val
    )
    assert looks.loaders == [val]
    raw = next(iter(val))[0]
    assert looks.batch[0].dtype == torch.float64
    torch.testing.assert_close(looks.batch[0], (raw.double() + 1.0) * 2.0)


class TwoLoaders(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return super().validation_step(batch, batch_idx)


def test_named_loaders(tmp_path: Path) -> None:
    looks, val = Looks(), {"a": data(seed=1), "b": data(seed=2)}
    trainer(tmp_path, callbacks=[looks], num_sanity_val_steps=0, max_epochs=1).fit(TwoLoaders(), data(), val)
    assert looks.loaders == list(val.values())
