"""A step that was recorded, to be differentiated backwards later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors

from hypergrad.optimizer.differentiable import DifferentiableMode
from hypergrad.optimizer.packets import Packet, collect
from hypergrad.optimizer.shadow import (
    as_number,
    groups_of,
    instead_of_zero,
    shadow,
    take,
    without_zero_lr,
)
from hypergrad.optimizer.step import Coordinate, StateVector, check_optimizer


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


class RecordedStep:
    """The step that an optimizer is about to take, kept with all that it reads, to be differentiated backwards later.

    Holds one copy of the parameters, of their gradients and of the optimizer's state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, pack: bool | None = None) -> None:
        check_optimizer(optimizer)
        self._optimizer = optimizer
        self._packets = collect(optimizer, pack=pack)
        self._settings = groups_of(optimizer.param_groups, [])
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
            value = h.read(self._settings[index]) or instead_of_zero(self._optimizer, h, False)
            numbers[index, h] = as_number(value).requires_grad_()
        inputs = [t for param, grad, state in leaves for t in (param, grad, *_tensors(state).values())]
        inputs += numbers.values()
        with torch.enable_grad(), allow_mutation_on_saved_tensors():
            with DifferentiableMode() as mode:
                for packet in packets:  # a step writes in place, which leaves do not allow
                    packet.param, grad = packet.param.clone(), packet.grad.clone()
                    packet.state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in packet.state.items()}
                    packet.param.grad = grad
                groups = groups_of(self._settings, packets)
                without_zero_lr(groups)
                for (index, h), number in numbers.items():
                    h.write(groups[index], number.clone())
                twin = shadow(self._optimizer, groups, {packet.param: packet.state for packet in packets})
                take(twin, packets)
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


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


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
