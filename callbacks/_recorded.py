"""Losses of earlier steps, written into a checkpoint, and evaluated again by the run that continues from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hypergrad import ActivationPattern, ClippedLoss, Clipping, RngState
from hypergrad.callbacks._training import Call, StepLoss, TrainingLoss

_LEAVES = (bool, int, float, str, type(None))


def write_down(loss: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """What it takes to evaluate a loss again: tensors, numbers and strings in plain containers.

    Raises:
        TypeError: where a batch is made of anything else, and for the part of a loss that several processes share.
    """
    clipping = None
    if isinstance(loss, ClippedLoss):
        clipping = [loss.clipping.limit, loss.clipping.by]
        loss = loss.loss
    if not isinstance(loss, StepLoss):
        raise TypeError(f"{loss!r} is no loss of a step.")
    return {
        "calls": [_written(call) for call in loss.calls],
        "accumulated": loss.accumulated,
        "clipping": clipping,
    }


def read_back(state: dict[str, Any], owner: TrainingLoss, device: torch.device) -> StepLoss | ClippedLoss:
    """The loss that was written down, to be evaluated by the `training_step` of this run."""
    loss = StepLoss(owner, [_read(call, device) for call in state["calls"]], state["accumulated"])
    return loss if state["clipping"] is None else ClippedLoss(loss, Clipping(*state["clipping"]))


def _written(call: Call) -> dict[str, Any]:
    # A tensor may be a view into all of the data: only what is seen of it is written.
    parts = {"args": list(call.args), "kwargs": call.kwargs, "buffers": call.buffers, "progress": call.progress}
    plain = {name: _mapped(part, lambda t: t.detach().clone()) for name, part in parts.items()}
    pattern = None if call.pattern is None else call.pattern.state_dict()
    return {**plain, "rng": call.rng.state_dict(), "value": call.value, "pattern": pattern}


def _read(state: dict[str, Any], device: torch.device) -> Call:
    args, kwargs, buffers = (_mapped(state[name], lambda t: t.to(device)) for name in ("args", "kwargs", "buffers"))
    rng, value = RngState.restored(state["rng"]), state["value"].to(device)
    saved = state.get("pattern")  # checkpoints of before have none
    pattern = None if saved is None else ActivationPattern.restored(saved, device)
    return Call(tuple(args), kwargs, rng, buffers, state["progress"], value, pattern)


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if type(value) is torch.Tensor:
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, function) for item in value)
    if type(value) is dict and all(type(key) in _LEAVES for key in value):
        return {key: _mapped(item, function) for key, item in value.items()}
    if type(value) in _LEAVES:
        return value
    raise TypeError(f"{type(value).__name__} does not load with weights_only=True.")
