"""What Lightning does between its hooks and offers no public way to ask for. Nothing else here touches its insides.

Each function says which attribute it uses and why; `tests/callbacks/test_lightning_adapter.py` breaks when one moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


def to_device(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, dataloader_idx: int) -> Any:
    """A validation batch as the validation loop hands it to `validation_step`.

    Uses `LightningModule._on_before_batch_transfer`: it finds the user's hook in the module or in the datamodule.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def unscaled(trainer: pl.Trainer, loss: torch.Tensor) -> torch.Tensor:
    """The loss that `on_before_backward` is given, without the scale of float16; nothing waits for the device.

    Uses `precision_plugin.scaler`, of which only `MixedPrecision` has one.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return loss if scaler is None else loss / scaler.scale(torch.ones_like(loss))


def validation_loaders(trainer: pl.Trainer) -> list[Iterable[Any]]:
    """The Trainer's validation loaders, loaded now if no validation has run yet; empty where there are none.

    Uses `trainer.fit_loop.epoch_loop.val_loop.setup_data()`, which the validation loop itself calls first and which
    does nothing the second time: `trainer.val_dataloaders` is None until then.
    """
    if not trainer.enable_validation:
        return []
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    loaders = trainer.val_dataloaders
    if loaders is None:
        return []
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


@rank_zero_only
def log_scalars(logger: Logger, scalars: Mapping[str, float], step: int) -> None:
    """What `logger.log_metrics` does; for TensorBoard in one event, where each scalar would otherwise be one.

    An event costs the training 80 microseconds, most of them in TensorBoard's own thread under Python's lock.

    Uses `TensorBoardLogger._prefix`, which a user may have given and cannot ask for.
    """
    if type(logger).log_metrics is TensorBoardLogger.log_metrics:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        tensorboard: Any = logger
        experiment = tensorboard.experiment
        writer: Any = experiment.file_writer if type(experiment) is SummaryWriter else None
        if writer is not None:  # as it is after a close, until something is logged again
            prefix = f"{tensorboard._prefix}{tensorboard.LOGGER_JOIN_CHAR}" if tensorboard._prefix else ""
            values = [Summary.Value(tag=prefix + tag, simple_value=number) for tag, number in scalars.items()]
            writer.add_summary(Summary(value=values), step)
            return
    logger.log_metrics(dict(scalars), step=step)
