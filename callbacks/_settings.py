"""What the user asked for, and what it means for the Trainer at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from torch.utils.data import Dataset

from hypergrad import (
    ConfigurationError,
    Controller,
    Estimator,
    Hyperparameter,
    Implicit,
    OptimizerHyperparameter,
    loss_hyperparameters,
)
from hypergrad.callbacks._lightning import validation_loaders
from hypergrad.callbacks._plan import Wishes

Name = str | OptimizerHyperparameter | Hyperparameter


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see `HyperGradient`."""

    hyperparameters: tuple[str | OptimizerHyperparameter | Hyperparameter, ...] | None
    estimator: Estimator
    monitor: str
    mode: Literal["min", "max"]
    val_dataloaders: Iterable[Any] | None
    every_n_steps: int | None
    controller: Controller | None
    seed: int
    wishes: Wishes

    @property
    def sign(self) -> float:
        """What turns the monitored value into an objective to be made smaller."""
        return 1.0 if self.mode == "min" else -1.0

    @property
    def of_optimizers(self) -> list[str | OptimizerHyperparameter]:
        """Those in the param groups; by default learning rate and weight decay, where the estimator can serve them."""
        if self.hyperparameters is None:
            return [] if isinstance(self.estimator, Implicit) else ["lr", "weight_decay"]
        return [h for h in self.hyperparameters if not isinstance(h, Hyperparameter)]

    def described(self, controller: Controller) -> dict[str, str]:
        """What decides how a run goes on, in words: to be compared with a checkpoint's."""
        settings = {name: getattr(self, name) for name in ("estimator", "monitor", "mode", "every_n_steps", "seed")}
        settings |= {"controller": controller, **vars(self.wishes)}
        # An object without a repr of its own has its address in it, which is another one in each process.
        return {name: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)) for name, value in settings.items()}

    def in_loss(self, module: pl.LightningModule) -> Mapping[str, Hyperparameter]:
        """Those in the loss, by path in the module; by default all that it has."""
        chosen = self.hyperparameters
        return loss_hyperparameters(
            module, None if chosen is None else [h for h in chosen if isinstance(h, Hyperparameter)]
        )


def names_of(hyperparameters: Sequence[str | OptimizerHyperparameter]) -> list[str]:
    """What each is called."""
    return [h if isinstance(h, str) else h.name for h in hyperparameters]


def hyper_validation_data(trainer: pl.Trainer, settings: Settings) -> tuple[Iterable[Any], int, bool]:
    """The loader to tune on, its index among the Trainer's, and whether the Trainer has several."""
    if settings.val_dataloaders is not None:
        return settings.val_dataloaders, 0, False
    loaders = validation_loaders(trainer)
    if not loaders:
        raise ConfigurationError(
            "There is no validation data to tune hyperparameters on: the Trainer has none (or limit_val_batches=0). "
            "Give the module a val_dataloader, or pass HyperGradient(val_dataloaders=...)."
        )
    _, _, suffix = settings.monitor.partition("/dataloader_idx_")
    if len(loaders) > 1 and not (suffix.isdigit() and int(suffix) < len(loaders)):
        raise ConfigurationError(
            f"The Trainer has {len(loaders)} validation loaders and monitor={settings.monitor!r} does not say which: "
            f"use monitor='{settings.monitor}/dataloader_idx_0', or pass HyperGradient(val_dataloaders=...)."
        )
    rank_zero_info(
        f"HyperGradient tunes on the Trainer's validation data: {settings.monitor!r} is no longer held out. Pass "
        "val_dataloaders= a split of its own (hypergrad.split makes one) to keep it so."
    )
    index = int(suffix) if suffix else 0
    return loaders[index], index, len(loaders) > 1


def batches_of(loader: Iterable[Any]) -> int | None:
    """How many batches there are, where that is known."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_disjoint(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    owner: dict[torch.Tensor, int] = {}
    for i, optimizer in enumerate(optimizers):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if owner.setdefault(p, i) != i:
                raise ConfigurationError(
                    f"A parameter of shape {tuple(p.shape)} is stepped by optimizers {owner[p]} and {i}: its change "
                    "has no single learning rate. Give each parameter to one optimizer."
                )


def as_tuple(hyperparameters: Name | Sequence[Name] | None) -> tuple[Name, ...] | None:
    """The hyperparameters that were named; None for the default ones."""
    if hyperparameters is None:
        return None
    if isinstance(hyperparameters, (str, OptimizerHyperparameter, Hyperparameter)):
        return (hyperparameters,)
    return tuple(hyperparameters)


def check_loader(loader: Any) -> None:
    """Refuse what is no loader that can be read again and again."""
    kind = type(loader).__name__
    if isinstance(loader, Dataset):
        raise ConfigurationError(
            f"`val_dataloaders` must be a DataLoader, but got the dataset itself ({kind}): pass "
            "DataLoader(dataset, batch_size=...)."
        )
    if isinstance(loader, (list, tuple, dict, CombinedLoader)):
        raise ConfigurationError(
            f"`val_dataloaders` must be one DataLoader, but got a {kind}: join the datasets with "
            "torch.utils.data.ConcatDataset, or pass the one that hyperparameters are to be tuned on."
        )
    if not isinstance(loader, Iterable):
        raise ConfigurationError(f"`val_dataloaders` must be a DataLoader, but got {loader!r}, which is not iterable.")
    if isinstance(loader, Iterator):
        raise ConfigurationError(
            f"`val_dataloaders` must be a DataLoader, but got {kind}, which can be read only once: pass the loader "
            "itself, not iter(loader)."
        )
