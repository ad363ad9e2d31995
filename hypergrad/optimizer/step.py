"""One optimizer step as a differentiable function: s' = Phi(s, g; lam).

Here s are the parameters and the optimizer's state, g the gradients and lam the hyperparameters. The derivative is
taken through the optimizer's own, unmodified `step()`: what the class computes is what is differentiated, whatever its
flags. Here along a direction, by forward AD; `recorded` goes back from one, by reverse AD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hypergrad.errors import UnsupportedOptimizerError
from hypergrad.hyperparameter import OptimizerHyperparameter
from hypergrad.optimizer.differentiable import DifferentiableMode, dual, dual_level, tangent
from hypergrad.optimizer.packets import (
    ByParam,
    Packet,
    StateByParam,
    bundles,
)
from hypergrad.optimizer.shadow import (
    as_number,
    groups_of,
    instead_of_zero,
    shadow,
    single_tensor_group,
    take,
    without_zero_lr,
)
from hypergrad.torch_internals import raw_step

# A hyperparameter of one param group, by the group's index.
Coordinate = tuple[int, OptimizerHyperparameter]

# Closures that re-evaluate the loss, and sparse gradients: neither is one map from (s, g) to s'.
_REFUSED = {
    torch.optim.LBFGS: "its step evaluates the loss several times; use SGD, Adam or another first-order optimizer",
    torch.optim.SparseAdam: "its gradients are sparse; use Embedding(sparse=False) with Adam",
}


@dataclass(frozen=True)
class StateVector:
    """One real number for every number in s: a tangent of it, or a cotangent. What is absent is zero.

    Args:
        params: by parameter, in its shape.
        state: the same for entries of `optimizer.state[parameter]`.
    """

    params: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Direction:
    """The direction in which a step is differentiated; what is absent is held constant.

    Args:
        hyperparameters: tangent of each hyperparameter.
        params, grads: tangent of a parameter, or of its gradient, with that parameter as key and its shape.
        state: the same for entries of `optimizer.state[parameter]`.
    """

    hyperparameters: Mapping[Coordinate, float] = field(default_factory=dict)
    params: ByParam = field(default_factory=dict)
    grads: ByParam = field(default_factory=dict)
    state: StateByParam = field(default_factory=dict)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what no estimator can differentiate.

    Raises:
        UnsupportedOptimizerError: for LBFGS, SparseAdam and wrappers of optimizers, naming what to use instead.
    """
    for refused, reason in _REFUSED.items():
        if isinstance(optimizer, refused):
            raise UnsupportedOptimizerError(f"{type(optimizer).__name__} cannot be differentiated: {reason}.")
    for name, value in vars(optimizer).items():
        if isinstance(value, torch.optim.Optimizer):
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} steps another optimizer, its attribute {name!r}, which cannot be tried "
                f"without moving the parameters: use {type(value).__name__} itself."
            )


def differentiate_step(
    optimizer: torch.optim.Optimizer, direction: Direction, *, pack: bool | None = None
) -> StateVector:
    """Tangents of the step that `optimizer.step()` would take now, with the gradients that are in `.grad`.

    Nothing is changed: the step is taken by a shadow of the optimizer on copies.

    Args:
        optimizer: any optimizer made of differentiable torch operations, before its step.
        direction: what to differentiate with respect to.
        pack: treat all tensors of a group as one; None does so where the rule is known to be elementwise.

    Returns:
        The tangents, each with the shape of its tensor. Exact up to rounding.

    Raises:
        UnsupportedOptimizerError: where the optimizer's step leaves torch's differentiable operations.
    """
    check_optimizer(optimizer)
    result = StateVector()
    for packets in bundles(optimizer, pack=pack, cut=pack is None):
        _differentiate(optimizer, packets, direction, result)
    return result


def _differentiate(
    optimizer: torch.optim.Optimizer, packets: Sequence[Packet], direction: Direction, result: StateVector
) -> None:
    lr_alone = not (direction.params or direction.grads or direction.state)
    with dual_level(), torch.no_grad(), DifferentiableMode():
        for packet in packets:
            _make_dual(packet, direction)
        groups = groups_of(optimizer.param_groups, packets)
        without_zero_lr(groups)
        for (index, h), rate in direction.hyperparameters.items():
            value = h.read(optimizer.param_groups[index]) or instead_of_zero(optimizer, h, lr_alone)
            h.write(groups[index], dual(as_number(value), as_number(rate)))
        twin = shadow(optimizer, groups, {packet.param: packet.state for packet in packets})
        take(twin, packets)
        for packet in packets:
            _collect_tangents(packet, twin, result)


def step_per_lr(optimizer: torch.optim.Optimizer, groups: Sequence[int]) -> dict[torch.Tensor, torch.Tensor]:
    """d(theta')/d(lr) in the given param groups, for a rule that `is_linear_in_lr`: of one secant, which is exact.

    The optimizer's own step is taken on copies at lr = 2**20, where theta itself is small beside the change: no digits
    cancel, however small the gradient and the learning rate, and no forward AD is needed.
    """
    secant = 2.0**20
    plain = {"lr": secant, "differentiable": False}
    result: dict[torch.Tensor, torch.Tensor] = {}
    for packets in bundles(optimizer, groups, pack=True, cut=True):
        copies = [
            single_tensor_group(optimizer.param_groups[index], [p.param for p in packets if p.group == index]) | plain
            for index in groups
        ]
        before = [packet.param.clone() for packet in packets]
        for packet in packets:
            packet.param.grad = packet.grad
        with torch.no_grad():
            raw_step(shadow(optimizer, copies, {packet.param: packet.state for packet in packets}))
        for packet, old in zip(packets, before, strict=True):
            packet.put(packet.param.sub_(old).div_(secant), result)
    return result


def _make_dual(packet: Packet, direction: Direction) -> None:
    param, grad = packet.join(direction.params), packet.join(direction.grads)
    if param is not None:
        packet.param = dual(packet.param, param)
    if grad is not None:
        packet.grad = dual(packet.grad, grad)
    for key, value in packet.join_state(direction.state).items():
        # Counters of one packet are equal, and so are their tangents.
        own = value[0] if packet.is_counter(key, packet.state[key]) else value
        packet.state[key] = dual(packet.state[key], own.to(packet.state[key]))
    packet.param.grad = packet.grad


def _collect_tangents(packet: Packet, twin: torch.optim.Optimizer, result: StateVector) -> None:
    change = tangent(packet.param)
    if change is not None:
        packet.put(change, result.params)
    for key, value in twin.state[packet.param].items():
        change = tangent(value) if isinstance(value, torch.Tensor) else None
        if change is None:
            continue
        known = {p: result.state.get(p, {}) for p in packet.params}
        entries = {p: entry[key] for p, entry in known.items() if key in entry}
        if packet.is_counter(key, value):
            entries.update(dict.fromkeys(packet.params, change))
        else:
            packet.put(change, entries)
        for p in packet.params:
            result.state.setdefault(p, {})[key] = entries[p]
