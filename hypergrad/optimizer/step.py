"""One optimizer step as a differentiable function: s' = Phi(s, g; lam).

Here s are the parameters and the optimizer's state, g the gradients and lam the hyperparameters. The derivative is
taken through the optimizer's own, unmodified `step()`, along a direction (forward AD) or back from one (reverse AD):
what the class computes is what is differentiated, whatever its flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors

from hypergrad.errors import UnsupportedOptimizerError
from hypergrad.hyperparameter import OptimizerHyperparameter, ParamGroup
from hypergrad.optimizer.differentiable import DifferentiableMode, dual, dual_level, tangent
from hypergrad.optimizer.packets import (
    ByParam,
    Packet,
    StateByParam,
    bundles,
    collect,
    exact_counters,
)
from hypergrad.optimizer.rules import is_linear_in_lr
from hypergrad.optimizer.shadow import shadow, single_tensor_group
from hypergrad.torch_internals import raw_step

# A hyperparameter of one param group, by the group's index.
Coordinate = tuple[int, OptimizerHyperparameter]

_TINY_LR = 1e-20

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


@dataclass(frozen=True)
class Cotangents:
    """What a cotangent of s' is worth in terms of what the step was made from.

    Args:
        before: cotangent of s, the parameters and state before the step.
        grads: cotangent of each gradient, by parameter.
        hyperparameters: cotangent of each hyperparameter: a number, shape `()`.
    """

    before: StateVector
    grads: dict[torch.Tensor, torch.Tensor]
    hyperparameters: dict[Coordinate, torch.Tensor]


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
    for packets in bundles(optimizer, pack=pack):
        _differentiate(optimizer, packets, direction, result)
    return result


def _differentiate(
    optimizer: torch.optim.Optimizer, packets: Sequence[Packet], direction: Direction, result: StateVector
) -> None:
    lr_alone = not (direction.params or direction.grads or direction.state)
    with dual_level(), torch.no_grad(), DifferentiableMode():
        for packet in packets:
            _make_dual(packet, direction)
        groups = _groups(optimizer.param_groups, packets)
        _without_zero_lr(groups)
        for (index, h), rate in direction.hyperparameters.items():
            value = h.read(optimizer.param_groups[index]) or _instead_of_zero(optimizer, h, lr_alone)
            h.write(groups[index], dual(_number(value), _number(rate)))
        twin = shadow(optimizer, groups, {packet.param: packet.state for packet in packets})
        _take(twin, packets)
        for packet in packets:
            _collect_tangents(packet, twin, result)


class RecordedStep:
    """The step that an optimizer is about to take, kept with all that it reads, to be differentiated backwards later.

    Holds one copy of the parameters, of their gradients and of the optimizer's state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, pack: bool | None = None) -> None:
        check_optimizer(optimizer)
        self._optimizer = optimizer
        self._packets = collect(optimizer, pack=pack)
        self._settings = _groups(optimizer.param_groups, [])
        moved = {p for packet in self._packets for p in packet.params}
        self._still = {p: p.detach().clone() for p in _params(optimizer) if p not in moved}

    def state_dict(self) -> dict[str, Any]:
        """Everything that it holds, parameters by their position in the optimizer."""
        at = {p: i for i, p in enumerate(_params(self._optimizer))}
        return {
            "packets": [packet.state_dict(at) for packet in self._packets],
            "settings": [{k: v for k, v in group.items() if k != "params"} for group in self._settings],
            "still": {at[p]: t for p, t in self._still.items()},
        }

    @classmethod
    def restored(cls, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> RecordedStep:
        """The step whose `state_dict` this is, of an optimizer of the same structure."""
        step, params = cls.__new__(cls), _params(optimizer)
        step._optimizer = optimizer
        step._packets = [Packet.restored(saved, params) for saved in state["packets"]]
        step._settings = [{**group, "params": []} for group in state["settings"]]
        step._still = {params[i]: t.to(params[i].device) for i, t in state["still"].items()}
        return step

    @property
    def moved(self) -> list[torch.Tensor]:
        """The parameters that the step moves."""
        return [p for packet in self._packets for p in packet.params]

    @property
    def gradients(self) -> dict[torch.Tensor, torch.Tensor]:
        """The gradients that the step was taken with."""
        return {
            p: part
            for packet in self._packets
            for p, part in zip(packet.params, packet.split(packet.grad), strict=True)
        }

    @property
    def values(self) -> dict[torch.Tensor, torch.Tensor]:
        """All parameters of the optimizer as they were before the step."""
        then = dict(self._still)
        for packet in self._packets:
            then.update(zip(packet.params, packet.split(packet.param), strict=True))
        return then

    @staticmethod
    @contextmanager
    def parameters_at(then: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[None]:
        """Parameters have these values, inside the block."""
        now = {p: p.detach().clone() for p in then}
        try:
            _write(then)
            yield
        finally:
            _write(now)

    def pull_back(self, after: StateVector, coordinates: Iterable[Coordinate]) -> Cotangents:
        """The vector-Jacobian product of the step, by reverse AD through the optimizer's own `step()`.

        Args:
            after: cotangent of the parameters and state after the step.
            coordinates: the hyperparameters whose cotangents are asked for.

        Raises:
            UnsupportedOptimizerError: where the optimizer's step leaves torch's differentiable operations.
        """
        packets = [_leaf(packet) for packet in self._packets]
        leaves = [(p.param, p.grad, dict(p.state)) for p in packets]
        numbers: dict[Coordinate, torch.Tensor] = {}
        for index, h in coordinates:
            value = h.read(self._settings[index]) or _instead_of_zero(self._optimizer, h, False)
            numbers[index, h] = _number(value).requires_grad_()
        inputs = [t for param, grad, state in leaves for t in (param, grad, *_tensors(state).values())]
        inputs += numbers.values()
        with torch.enable_grad(), allow_mutation_on_saved_tensors():
            with DifferentiableMode() as mode:
                for packet in packets:  # a step writes in place, which leaves do not allow
                    packet.param, grad = packet.param.clone(), packet.grad.clone()
                    packet.state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in packet.state.items()}
                    packet.param.grad = grad
                groups = _groups(self._settings, packets)
                _without_zero_lr(groups)
                for (index, h), number in numbers.items():
                    h.write(groups[index], number.clone())
                twin = shadow(self._optimizer, groups, {packet.param: packet.state for packet in packets})
                _take(twin, packets)
            outputs, weights = _weighted(packets, twin, after, mode)
            found: Iterator[torch.Tensor | None] = iter([None] * len(inputs))
            if outputs:
                found = iter(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))
        result = Cotangents(StateVector(), {}, {})
        for packet, (_, _, state) in zip(packets, leaves, strict=True):
            for target in (result.before.params, result.grads):
                change = next(found)
                if change is not None:
                    target.update(zip(packet.params, packet.split(change), strict=True))
            for key in _tensors(state):
                change = next(found)
                if change is None:
                    continue
                # One number for all: they sum up when they are read again, so the first parameter has it.
                parts = [change] if packet.is_counter(key, change) else packet.split(change)
                for p, part in zip(packet.params, parts, strict=False):
                    result.before.state.setdefault(p, {})[key] = part
        for coordinate, change in zip(numbers, found, strict=True):
            result.hyperparameters[coordinate] = torch.zeros(()) if change is None else change
        return result


def step_per_lr(optimizer: torch.optim.Optimizer, groups: Sequence[int]) -> dict[torch.Tensor, torch.Tensor]:
    """d(theta')/d(lr) in the given param groups, for a rule that `is_linear_in_lr`: of one secant, which is exact.

    The optimizer's own step is taken on copies at lr = 2**20, where theta itself is small beside the change: no digits
    cancel, however small the gradient and the learning rate, and no forward AD is needed.
    """
    secant = 2.0**20
    packets = collect(optimizer, groups, pack=True)
    plain = {"lr": secant, "differentiable": False}
    copies = [
        single_tensor_group(optimizer.param_groups[index], [p.param for p in packets if p.group == index]) | plain
        for index in groups
    ]
    before = [packet.param.clone() for packet in packets]
    for packet in packets:
        packet.param.grad = packet.grad
    with torch.no_grad():
        raw_step(shadow(optimizer, copies, {packet.param: packet.state for packet in packets}))
    result: dict[torch.Tensor, torch.Tensor] = {}
    for packet, old in zip(packets, before, strict=True):
        change = packet.param.sub_(old).div_(secant)
        result.update(zip(packet.params, packet.split(change), strict=True))
    return result


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _groups(param_groups: Sequence[ParamGroup], packets: Sequence[Packet]) -> list[ParamGroup]:
    return [
        single_tensor_group(group, [packet.param for packet in packets if packet.group == index])
        for index, group in enumerate(param_groups)
    ]


def _without_zero_lr(groups: Sequence[ParamGroup]) -> None:
    """Adam's differentiable path divides by lr, which a schedule may set to 0: a tiny one moves nothing either."""
    for group in groups:
        if isinstance(group.get("lr"), (int, float)) and group["lr"] == 0.0:
            group["lr"] = _TINY_LR


def _take(twin: torch.optim.Optimizer, packets: Sequence[Packet]) -> None:
    try:
        with exact_counters(packets):
            raw_step(twin)
    except (UnsupportedOptimizerError, NotImplementedError) as error:
        raise UnsupportedOptimizerError(
            f"The step of {type(twin).__name__} cannot be differentiated: {error}."
        ) from error


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
        result.params.update(zip(packet.params, packet.split(change), strict=True))
    for key, value in twin.state[packet.param].items():
        change = tangent(value) if isinstance(value, torch.Tensor) else None
        if change is None:
            continue
        counter = packet.is_counter(key, value)
        parts = [change] * len(packet.params) if counter else packet.split(change)
        for p, part in zip(packet.params, parts, strict=True):
            result.state.setdefault(p, {})[key] = part


def _leaf(packet: Packet) -> Packet:
    return Packet(
        packet.group,
        packet.params,
        packet.param.detach().requires_grad_(),
        packet.grad.detach().requires_grad_(),
        {
            key: value.detach().requires_grad_()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "step"  # counts, and no more
            else value
            for key, value in packet.state.items()
        },
        packet.counters,
    )


def _tensors(state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.requires_grad}


def _weighted(
    packets: Sequence[Packet], twin: torch.optim.Optimizer, after: StateVector, mode: DifferentiableMode
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every number after the step that something depends on and that counts, with its cotangent."""
    outputs: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    for packet in packets:
        state = _tensors({key: mode.inside(value) for key, value in twin.state[packet.param].items()})
        cotangents = packet.join_state(after.state)
        pairs = [(mode.inside(packet.param), packet.join(after.params))]
        for key, value in state.items():
            cotangent = cotangents.get(key)
            if cotangent is not None and packet.is_counter(key, value):
                cotangent = cotangent.sum()
            pairs.append((value, cotangent))
        for value, cotangent in pairs:
            if cotangent is not None and value.requires_grad:
                outputs.append(value)
                weights.append(cotangent.to(value))
    return outputs, weights


def _write(values: Mapping[torch.Tensor, torch.Tensor]) -> None:
    with torch.no_grad():
        for p, value in values.items():
            p.copy_(value)


def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _instead_of_zero(
    optimizer: torch.optim.Optimizer, hyperparameter: OptimizerHyperparameter, lr_alone: bool
) -> float:
    if hyperparameter.name == "lr" and lr_alone and is_linear_in_lr(optimizer):
        return 1.0  # the same derivative everywhere, and Adam's differentiable path divides by lr
    # Rules skip a term whose factor is exactly 0 ("if weight_decay != 0"), and with it its derivative: a tiny
    # positive number takes the branch and changes nothing else. Adam divides by lr, also in float32.
    return _TINY_LR if hyperparameter.name == "lr" else float(torch.finfo(torch.float64).tiny)
