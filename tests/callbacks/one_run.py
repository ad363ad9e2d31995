"""A fit of 120 steps in which only the pieces that a test names take part."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from hypergrad import Hold
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Reseed, Resumable, data, trainer

EPOCHS = 20  # of 6 steps


def tuner(**kwargs: Any) -> HyperGradient:
    """What is not named is not there."""
    return HyperGradient(val_dataloaders=data(seed=2), **{"controller": Hold(), "every_n_steps": 10**6, **kwargs})


def seeded(module: pl.LightningModule) -> pl.LightningModule:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    return module


def fit(module: pl.LightningModule, callback: HyperGradient | None, **kwargs: Any) -> pl.Trainer:
    callbacks = [Reseed(), *([callback] if callback else []), *kwargs.pop("callbacks", [])]
    fitted = trainer(None, callbacks=callbacks, max_epochs=EPOCHS, **kwargs)
    fitted.fit(seeded(module), Resumable(), data(seed=1), ckpt_path=kwargs.get("ckpt_path"))
    return fitted


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            trainer.should_stop = True
