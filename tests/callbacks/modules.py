"""Small Lightning modules, what resuming needs, and a Trainer for the callback's tests."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from torch.utils.data import DataLoader, TensorDataset

from hypergrad.callbacks import HyperGradient


def data(n: int = 96, batch_size: int = 16, *, seed: int = 0, shuffle: bool = False) -> DataLoader[Any]:
    """A learnable 3-class problem with n items."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    order = torch.Generator().manual_seed(seed + 1)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle, generator=order if shuffle else None)


class Net(pl.LightningModule):
    """The ordinary module: a linear classifier with a hidden layer."""

    def __init__(self, optimizer: str = "AdamW", **settings: Any) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        self.optimizer, self.settings = optimizer, {"lr": 0.01, **settings}

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer)(self.parameters(), **self.settings)


class Stateful(Net):
    """Everything that an extra evaluation could disturb: BatchNorm, Dropout, metrics, lists, random draws."""

    def __init__(self, optimizer: str = "AdamW", **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Dropout(0.3),
            torch.nn.Tanh(),
            torch.nn.Linear(8, 3),
        )
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.others = torchmetrics.MetricCollection([torchmetrics.classification.MulticlassF1Score(3)])
        self.outputs: list[torch.Tensor] = []
        self.calls = 0
        self.log_lines: list[str] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x + 0.1 * torch.randn_like(x))
        loss = torch.nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.others.update(logits, y)
        self.outputs.append(loss.detach())
        self.calls += 1
        self.log("val_loss", loss)
        self.log("val_accuracy", self.accuracy)
        self.log_dict(self.others)
        if self.logger is not None:
            self.logger.experiment.add_scalar("mine", self.calls, self.calls)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.log("val_outputs", torch.stack(self.outputs).sum())
        self.log("val_calls", float(self.calls))
        self.outputs.clear()


class Scheduled(Stateful):
    """With a schedule, BatchNorm, Dropout and a random validation_step."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "weight_decay": 0.05}, {"params": self.net[4].parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Resumable:
    """A training loader that remembers its place, as torchdata's StatefulDataLoader does.

    Args:
        n: how many items it has.
        shuffle: whether every epoch has the batches in an order of its own.
    """

    def __init__(self, n: int = 96, *, shuffle: bool = False) -> None:
        self.batches = list(data(n))
        self.shuffle = shuffle
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        # Lightning reads exactly `len` batches, so that this generator never gets to run past its last one.
        epoch, start = divmod(self.position, len(self))
        order = torch.arange(len(self))
        if self.shuffle:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(epoch))
        for i in order[start:].tolist():
            self.position += 1
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Reseed(pl.Callback):
    """Lightning does not save the global RNG streams; this stands in for users who do."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        torch.manual_seed(1000 + trainer.global_step)


class Saves(pl.Callback):
    """Writes a checkpoint in a hook of its own, at every step, and counts on no order of callbacks."""

    def __init__(self, hook: str, folder: Path) -> None:
        def save(trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

        setattr(self, hook, save)


def continuing(checkpoint: Any) -> dict[str, Any]:
    """What `fit` is given to continue from a checkpoint; Lightning has `weights_only` from 2.6 on."""
    if checkpoint is None or "weights_only" not in inspect.signature(pl.Trainer.fit).parameters:
        return {"ckpt_path": checkpoint}
    return {"ckpt_path": checkpoint, "weights_only": True}


def trainer(tmp: Any = None, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    }
    return pl.Trainer(default_root_dir=tmp, **{**settings, **kwargs})


def fit(module: pl.LightningModule, callback: HyperGradient, tmp: Path, **kwargs: Any) -> pl.Trainer:
    """Train on `data()` with the callback; what the Trainer has measured is on what is returned."""
    fitted = trainer(tmp, callbacks=[callback], **kwargs)
    fitted.fit(module, data(), data(seed=1))
    return fitted
