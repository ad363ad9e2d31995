"""A second optimizer of the same class on other tensors: what lets us try a step without taking it."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch

from hypergrad.hyperparameter import ParamGroup

# Implementation switches that choose a kernel, never a rule. The single-tensor Python path is the one that
# forward AD can follow; `differentiable` selects it in every torch optimizer.
_SINGLE_TENSOR = {"foreach": False, "fused": False, "capturable": False, "differentiable": True}


# LR schedulers patch `step` on the instance; a GradScaler leaves the other two on fused optimizers.
_NOT_COPIED = frozenset({"step", "grad_scale", "found_inf"})


def shadow(
    optimizer: torch.optim.Optimizer,
    param_groups: list[ParamGroup],
    state: dict[torch.Tensor, dict[str, Any]],
) -> torch.optim.Optimizer:
    """An optimizer with `optimizer`'s class and settings, but these groups and this state, and none of its hooks.

    Nothing of the original is written to: groups and state are used as given; of further attributes, tensors and
    plain containers are copied.
    """
    # copy() goes through torch's own __getstate__/__setstate__, which keeps groups and state and starts with
    # no hooks; third-party optimizers keep further attributes, which __getstate__ leaves out.
    twin = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        if name not in vars(twin) and name not in _NOT_COPIED:
            setattr(twin, name, _private(value))
    twin.param_groups = param_groups
    twin.state = defaultdict(dict, state)
    return twin


def _private(value: Any) -> Any:
    """The value, with tensors and plain containers copied, so that a step on the shadow can change its own."""
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _private(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_private(item) for item in value)
    return value


def single_tensor_group(group: ParamGroup, params: list[torch.Tensor]) -> ParamGroup:
    """A copy of one param group on other tensors, on the single-tensor path that forward AD can follow."""
    settings = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    settings.update({key: value for key, value in _SINGLE_TENSOR.items() if key in settings})
    return {**settings, "params": params}
