"""A second optimizer of the same class on other tensors: what lets us try a step without taking it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from hypergrad.errors import UnsupportedOptimizerError
from hypergrad.hyperparameter import OptimizerHyperparameter, ParamGroup
from hypergrad.optimizer.packets import Packet, exact_counters
from hypergrad.optimizer.rules import is_linear_in_lr
from hypergrad.torch_internals import raw_step

# Implementation switches that choose a kernel, never a rule. The single-tensor Python path is the one that
# forward AD can follow; `differentiable` selects it in every torch optimizer.
_SINGLE_TENSOR = {"foreach": False, "fused": False, "capturable": False, "differentiable": True}
# In place of an lr of 0, by which Adam's differentiable path divides.
_TINY_LR = 1e-20

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


def groups_of(param_groups: Sequence[ParamGroup], packets: Sequence[Packet]) -> list[ParamGroup]:
    """The settings of each param group, with the packets of that group for its parameters."""
    return [
        single_tensor_group(group, [packet.param for packet in packets if packet.group == index])
        for index, group in enumerate(param_groups)
    ]


def without_zero_lr(groups: Sequence[ParamGroup]) -> None:
    """Adam's differentiable path divides by lr, which a schedule may set to 0: a tiny one moves nothing either."""
    for group in groups:
        if isinstance(group.get("lr"), (int, float)) and group["lr"] == 0.0:
            group["lr"] = _TINY_LR


def take(twin: torch.optim.Optimizer, packets: Sequence[Packet]) -> None:
    """The step of a shadow.

    Raises:
        UnsupportedOptimizerError: where it leaves torch's differentiable operations.
    """
    try:
        with exact_counters(packets):
            raw_step(twin)
    except (UnsupportedOptimizerError, NotImplementedError) as error:
        raise UnsupportedOptimizerError(
            f"The step of {type(twin).__name__} cannot be differentiated: {error}."
        ) from error


def as_number(value: float) -> torch.Tensor:
    """A setting as what it is differentiated as."""
    return torch.tensor(value, dtype=torch.float64)


def instead_of_zero(optimizer: torch.optim.Optimizer, hyperparameter: OptimizerHyperparameter, lr_alone: bool) -> float:
    """The value at which to differentiate with respect to a hyperparameter that is 0.

    Args:
        lr_alone: whether nothing but hyperparameters has a tangent.
    """
    if hyperparameter.name == "lr" and lr_alone and is_linear_in_lr(optimizer):
        return 1.0  # the same derivative everywhere, and Adam's differentiable path divides by lr
    # Rules skip a term whose factor is exactly 0 ("if weight_decay != 0"), and with it its derivative: a tiny
    # positive number takes the branch and changes nothing else. Adam divides by lr, also in float32.
    return _TINY_LR if hyperparameter.name == "lr" else float(torch.finfo(torch.float64).tiny)
