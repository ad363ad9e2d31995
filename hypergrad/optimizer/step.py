"""One optimizer step as a differentiable function: s' = Phi(s, g; lam).

Here s are the parameters and the optimizer's state, g the gradients and lam the hyperparameters. The derivative
is taken by forward AD through the optimizer's own, unmodified `step()`: what the class computes is what is
differentiated, whatever its flags.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hypergrad.errors import UnsupportedOptimizerError
from hypergrad.hyperparameter import OptimizerHyperparameter, ParamGroup
from hypergrad.optimizer.dual import TangentMode, dual, dual_level, tangent
from hypergrad.optimizer.rules import ELEMENTWISE, is_linear_in_lr
from hypergrad.optimizer.shadow import shadow, single_tensor_group
from hypergrad.torch_internals import raw_step

State = dict[str, Any]
Tangents = Mapping[torch.Tensor, torch.Tensor]

# State that torch keeps as one number per tensor; the names decide only for parameters that are scalars themselves.
_COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})
# Closures that re-evaluate the loss, and sparse gradients: neither is one map from (s, g) to s'.
_REFUSED = {
    torch.optim.LBFGS: "its step evaluates the loss several times; use SGD, Adam or another first-order optimizer",
    torch.optim.SparseAdam: "its gradients are sparse; use Embedding(sparse=False) with Adam",
}


@dataclass(frozen=True)
class StepTangents:
    """d(s') along one direction: tangents of the updated parameters and of the updated optimizer state.

    A tensor on which the direction has no influence is absent.
    """

    params: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Direction:
    """The direction in which a step is differentiated; what is absent is held constant.

    Args:
        hyperparameters: tangent of each hyperparameter, as `(index of the param group, hyperparameter) -> float`.
        params, grads: tangent of a parameter, or of its gradient, with that parameter as key and its shape.
        state: the same for entries of `optimizer.state[parameter]`.
    """

    hyperparameters: Mapping[tuple[int, OptimizerHyperparameter], float] = field(default_factory=dict)
    params: Tangents = field(default_factory=dict)
    grads: Tangents = field(default_factory=dict)
    state: Mapping[torch.Tensor, Mapping[str, torch.Tensor]] = field(default_factory=dict)


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


def stepped_params(group: ParamGroup) -> list[torch.Tensor]:
    """The parameters of a group that the next step will move: those with a gradient.

    Raises:
        UnsupportedOptimizerError: for sparse gradients and complex parameters.
    """
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        if p.grad.is_sparse:
            raise UnsupportedOptimizerError(
                f"A parameter of shape {tuple(p.shape)} has a sparse gradient, which cannot be differentiated: "
                "use Embedding(sparse=False)."
            )
        if p.is_complex():
            raise UnsupportedOptimizerError(
                f"A parameter of shape {tuple(p.shape)} is complex: store its real and imaginary part instead."
            )
    return params


def differentiate_step(
    optimizer: torch.optim.Optimizer, direction: Direction, *, pack: bool | None = None
) -> StepTangents:
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
    pack = type(optimizer) in ELEMENTWISE if pack is None else pack
    packets = [
        _Packet.collect(optimizer, index, params, counters, direction)
        for index, group in enumerate(optimizer.param_groups)
        for params, counters in _packets(optimizer, stepped_params(group), pack)
    ]
    with dual_level(), torch.no_grad(), TangentMode():
        for packet in packets:
            packet.make_dual()
        groups = [
            _dual_group(optimizer, index, [p.param for p in packets if p.group == index], direction)
            for index in range(len(optimizer.param_groups))
        ]
        twin = shadow(optimizer, groups, {packet.param: packet.state for packet in packets})
        try:
            with _exact_counters(packets):
                raw_step(twin)
        except (UnsupportedOptimizerError, NotImplementedError) as error:
            raise UnsupportedOptimizerError(
                f"The step of {type(optimizer).__name__} cannot be differentiated: {error}."
            ) from error
        result = StepTangents()
        for packet in packets:
            packet.collect_tangents(dict(twin.state[packet.param]), result)
    return result


def step_per_lr(optimizer: torch.optim.Optimizer, groups: Sequence[int]) -> dict[torch.Tensor, torch.Tensor]:
    """d(theta')/d(lr) in the given param groups, for a rule that `is_linear_in_lr`: of one secant, which is exact.

    The optimizer's own step is taken on copies at lr = 2**20, where theta itself is small beside the change: no digits
    cancel, however small the gradient and the learning rate, and no forward AD is needed.
    """
    secant = 2.0**20
    packets = [
        _Packet.collect(optimizer, index, params, counters, Direction())
        for index in groups
        for params, counters in _packets(optimizer, stepped_params(optimizer.param_groups[index]), pack=True)
    ]
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
        result.update(zip(packet.params, _split(change, packet.params), strict=True))
    return result


@dataclass
class _Packet:
    """Parameters that are stepped as one tensor: a single one in its shape, or several flat, end to end."""

    group: int
    params: list[torch.Tensor]
    param: torch.Tensor
    grad: torch.Tensor
    state: State
    param_tangent: torch.Tensor | None
    grad_tangent: torch.Tensor | None
    state_tangent: dict[str, torch.Tensor]

    @classmethod
    def collect(
        cls,
        optimizer: torch.optim.Optimizer,
        group: int,
        params: list[torch.Tensor],
        counters: Mapping[str, float],
        direction: Direction,
    ) -> _Packet:
        states = [optimizer.state.get(p, {}) for p in params]
        state: State = {}
        for key, value in states[0].items():
            if not isinstance(value, torch.Tensor):
                state[key] = copy.deepcopy(value)
            elif key in counters:
                # Counters are float32 in torch, where 1 - beta**step loses half its digits; the real step computes
                # that in Python's float64.
                state[key] = torch.tensor(counters[key], dtype=torch.float64)
            else:
                state[key] = _join([entry[key] for entry in states])
        tangents = [direction.state.get(p, {}) for p in params]
        state_tangent: dict[str, torch.Tensor] = {}
        for key in {key for entry in tangents for key in entry}:
            parts = [t.get(key, torch.zeros_like(s[key])) for t, s in zip(tangents, states, strict=True)]
            counter = _is_counter(key, states[0][key], params[0])
            state_tangent[key] = parts[0] if counter else _join(parts)
        return cls(
            group=group,
            params=params,
            param=_join([p.detach() for p in params]),
            grad=_join([_grad(p) for p in params]),
            state=state,
            param_tangent=_join_tangents(params, direction.params),
            grad_tangent=_join_tangents(params, direction.grads),
            state_tangent=state_tangent,
        )

    def make_dual(self) -> None:
        if self.param_tangent is not None:
            self.param = dual(self.param, self.param_tangent)
        if self.grad_tangent is not None:
            self.grad = dual(self.grad, self.grad_tangent)
        for key, value in self.state_tangent.items():
            self.state[key] = dual(self.state[key], value.to(self.state[key]))
        self.param.grad = self.grad

    def collect_tangents(self, state: State, result: StepTangents) -> None:
        change = tangent(self.param)
        if change is not None:
            result.params.update(zip(self.params, _split(change, self.params), strict=True))
        for key, value in state.items():
            change = tangent(value) if isinstance(value, torch.Tensor) else None
            if change is None:
                continue
            counter = _is_counter(key, value, self.params[0])
            parts = [change] * len(self.params) if counter else _split(change, self.params)
            for p, part in zip(self.params, parts, strict=True):
                result.state.setdefault(p, {})[key] = part


def _dual_group(
    optimizer: torch.optim.Optimizer, index: int, params: list[torch.Tensor], direction: Direction
) -> ParamGroup:
    group = single_tensor_group(optimizer.param_groups[index], params)
    for (at, hyperparameter), rate in direction.hyperparameters.items():
        if at == index:
            value = hyperparameter.read(group) or _instead_of_zero(optimizer, hyperparameter, direction)
            entry = dual(torch.tensor(value, dtype=torch.float64), torch.tensor(rate, dtype=torch.float64))
            hyperparameter.write(group, entry)
    return group


def _instead_of_zero(
    optimizer: torch.optim.Optimizer, hyperparameter: OptimizerHyperparameter, direction: Direction
) -> float:
    only_lr = hyperparameter.name == "lr" and not (direction.params or direction.grads or direction.state)
    if only_lr and is_linear_in_lr(optimizer):
        return 1.0  # the same derivative everywhere, and Adam's differentiable path divides by lr
    # Rules skip a term whose factor is exactly 0 ("if weight_decay != 0"), and with it its derivative: a tiny
    # positive number takes the branch and changes nothing else. Adam divides by lr, also in float32.
    return 1e-20 if hyperparameter.name == "lr" else float(torch.finfo(torch.float64).tiny)


@contextmanager
def _exact_counters(packets: Sequence[_Packet]) -> Iterator[None]:
    """Step counts that the first step of a run creates are float64 as well, see `_Packet.collect`.

    torch gives them the default dtype, and nothing but that chooses it.
    """
    if all(packet.state for packet in packets):
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _packets(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], pack: bool
) -> list[tuple[list[torch.Tensor], dict[str, float]]]:
    """Which parameters can be stepped as one, each with the numbers that its state counts with.

    Packed are those of one dtype and device with the same kind of state and the same numbers in it.
    """
    counters = _counters(optimizer, params)
    if not pack:
        return [([p], counters[p]) for p in params]
    packets: dict[Any, list[torch.Tensor]] = {}
    for p in params:
        state = optimizer.state.get(p, {})
        shapes = tuple((k, v.dtype, v.shape == p.shape) for k, v in state.items() if isinstance(v, torch.Tensor))
        others = tuple((k, v) for k, v in state.items() if not isinstance(v, torch.Tensor))
        kind = (p.dtype, p.device, p.dim() == 0, shapes, others, tuple(counters[p].items()))
        packets.setdefault(kind, []).append(p)
    return [(packet, counters[packet[0]]) for packet in packets.values()]


def _counters(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> dict[torch.Tensor, dict[str, float]]:
    """Every number in a parameter's state that torch keeps in a tensor, such as its step count.

    Those on an accelerator (fused and capturable rules) are read back together: one synchronisation.
    """
    counters: dict[torch.Tensor, dict[str, float]] = {p: {} for p in params}
    remote: list[tuple[torch.Tensor, str, torch.Tensor]] = []
    for p in params:
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, torch.Tensor) or not _is_counter(key, value, p):
                continue
            if value.device.type == "cpu":
                counters[p][key] = value.item()
            else:
                remote.append((p, key, value))
    if remote:
        values = torch.stack([value.to(torch.float64) for _, _, value in remote]).tolist()
        for (p, key, _), number in zip(remote, values, strict=True):
            counters[p][key] = number
    return counters


def _is_counter(key: str, value: torch.Tensor, param: torch.Tensor) -> bool:
    """One number per tensor, such as a step count, rather than one per element."""
    return value.dim() == 0 and value.is_floating_point() and (param.dim() > 0 or key in _COUNTERS)


def _grad(param: torch.Tensor) -> torch.Tensor:
    if param.grad is None:
        raise UnsupportedOptimizerError("A parameter lost its gradient while its step was differentiated.")
    return param.grad.detach()


def _join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A fresh copy: the tensor itself if it is the only one, all of them flat and end to end otherwise."""
    if len(tensors) == 1:
        return tensors[0].detach().clone()
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _join_tangents(params: list[torch.Tensor], tangents: Tangents) -> torch.Tensor | None:
    if not any(p in tangents for p in params):
        return None
    return _join([tangents.get(p, torch.zeros_like(p)) for p in params])


def _split(flat: torch.Tensor, params: list[torch.Tensor]) -> list[torch.Tensor]:
    if len(params) == 1:
        return [flat]
    parts = torch.split(flat, [p.numel() for p in params])
    return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]
