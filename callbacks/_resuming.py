"""Going on from a checkpoint whose settings may have been others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from hypergrad import Controller, Estimator, Tuner
from hypergrad.callbacks._attachment import Attachment
from hypergrad.callbacks._settings import Settings


def kind_of(controller: Controller) -> str:
    """The classes of a controller and of those that it wraps: what can load its state."""
    inner = getattr(controller, "controller", None)
    return f"{type(controller).__name__}({kind_of(inner) if isinstance(inner, Controller) else ''})"


def load_tuner(tuner: Tuner, settings: Settings, state: dict[str, Any]) -> None:
    """What was learned; a controller of another kind begins anew. Says which settings have changed."""
    saved, now = state["settings"], settings.described(tuner.controller)
    changed = [f"{n}={saved[n]}, now {now[n]}" for n in now if n in saved and saved[n] != now[n]]
    if changed:
        rank_zero_warn(f"The checkpoint was written with other settings of HyperGradient: {'; '.join(changed)}.")
    learned = state["tuner"]
    if state["controller"] != kind_of(tuner.controller):
        learned = {**learned, "controller": tuner.controller.state_dict()}
    tuner.load_state_dict(learned)


def load_trackers(
    attachments: Sequence[Attachment], estimator: Estimator, state: dict[str, Any], device: torch.device
) -> None:
    """What the estimator carries from step to step; says so where it cannot go on with that."""
    if state["estimator"] == type(estimator).__name__ and None not in state["trackers"]:
        for attachment, saved in zip(attachments, state["trackers"], strict=False):
            attachment.load_tracker_state(saved, device)
    elif estimator.needs_every_step:
        rank_zero_warn(
            f"{type(estimator).__name__} looks back at steps that the checkpoint does not hold (it was written "
            "with another estimator or by several processes, or batches are not tensors, numbers and strings in "
            "lists, tuples and dictionaries): the run continues, but its hypergradients see only what comes after "
            "the checkpoint."
        )
