"""What several ranks have found, as one: they must decide alike."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

_UNKNOWN = 2**31 - 1


def mean(trainer: pl.Trainer, values: torch.Tensor) -> torch.Tensor:
    """The mean over ranks."""
    if trainer.world_size == 1:
        return values
    found: torch.Tensor = trainer.strategy.reduce(  # in place
        values.to(trainer.strategy.root_device, copy=True), reduce_op="mean"
    )
    return found


def fewest(trainer: pl.Trainer, batches: int | None) -> int | None:
    """The smallest number of batches that a rank has, where it is known."""
    if trainer.world_size == 1:
        return batches
    number = torch.tensor(_UNKNOWN if batches is None else batches, device=trainer.strategy.root_device)
    least = int(trainer.strategy.reduce(number, reduce_op="min"))
    return None if least == _UNKNOWN else least
