"""What several ranks have found, as one: they must decide alike."""

from __future__ import annotations

from collections.abc import Sequence

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


def mean_rows(
    trainer: pl.Trainer, rows: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """The mean over ranks of each row, in one transfer; None where no rank has one.

    Args:
        like: a tensor of the shape of each row, which a rank may lack.
    """
    if trainer.world_size == 1 or not rows:
        return list(rows)
    present = [row if row is not None else torch.zeros_like(t) for row, t in zip(rows, like, strict=True)]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in present) else torch.float32
    had = torch.tensor([float(row is not None) for row in rows], dtype=wide, device=present[0].device)
    packed = mean(trainer, torch.cat([had, *(t.detach().reshape(-1).to(wide) for t in present)]))
    anywhere = (packed[: len(rows)] > 0.0).tolist()
    parts = torch.split(packed[len(rows) :], [t.numel() for t in present])
    return [part.view(t.shape).to(t) if some else None for part, t, some in zip(parts, present, anywhere, strict=True)]


def anyone(trainer: pl.Trainer, happened: bool) -> bool:
    """Whether it has happened on any rank."""
    return float(mean(trainer, torch.tensor(float(happened)))) > 0.0


def fewest(trainer: pl.Trainer, batches: int | None) -> int | None:
    """The smallest number of batches that a rank has, where it is known."""
    if trainer.world_size == 1:
        return batches
    number = torch.tensor(_UNKNOWN if batches is None else batches, device=trainer.strategy.root_device)
    least = int(trainer.strategy.reduce(number, reduce_op="min"))
    return None if least == _UNKNOWN else least
