"""Puts weight decay where a run's learning rate and length say, for hypergradients to move it from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hypergrad import Timescale, Tuner, decay_rate
from hypergrad.callbacks._attachment import Attachment


def why_no_timescale(optimizers: Sequence[torch.optim.Optimizer], learns_decay: bool) -> str:
    """Why a timescale cannot be translated into weight decay here; empty where it can."""
    if not learns_decay:
        return "weight_decay is not among the hyperparameters"
    if len(optimizers) != 1:
        return f"{len(optimizers)} optimizers"
    if any(decay_rate(optimizers[0], group) is None for group in optimizers[0].param_groups):
        return (
            f"what the weight decay of {type(optimizers[0]).__name__} does to the weights is not proportional to it: "
            "that is known of SGD and of torch's optimizers with decoupled weight decay, such as AdamW"
        )
    return ""


def place_decay(timescale: Timescale, steps: int, attachment: Attachment, tuner: Tuner) -> list[float]:
    """Let weight decay be what the timescale makes of each param group's learning rate; returns the values.

    Groups without weight decay beside such with one are left alone, as always.
    """
    placed: dict[str, float] = {}
    for row in attachment.layout():
        group = attachment.optimizer.param_groups[row.group]
        at_peak = {**group, "lr": peak_lr(group)}
        values = tuner.values(at_peak, row.learned)
        lr = next((values[key] for key, h in row.learned.items() if h.name == "lr"), at_peak["lr"])
        rate = decay_rate(attachment.optimizer, group)
        for key, h in row.learned.items():
            start = h.start(h.read(group))
            if h.name != "weight_decay" or key in placed or start is None or not rate or lr <= 0.0:
                continue
            lower, upper = h.bounds
            placed[key] = min(max(timescale.weight_decay(lr * rate, steps), lower), upper)
            tuner.place(key, h.coordinate.forward(placed[key]) - h.coordinate.forward(start))
    return list(placed.values())


def peak_lr(group: dict[str, Any]) -> float:
    """The largest learning rate that a schedule of torch gives the group, as far as it says."""
    return max(float(group.get(key, 0.0)) for key in ("lr", "initial_lr", "max_lr"))
