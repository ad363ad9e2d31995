"""Parameters that a step may treat as one tensor, with copies of everything that the step reads and writes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hypergrad.errors import UnsupportedOptimizerError
from hypergrad.hyperparameter import ParamGroup
from hypergrad.optimizer.rules import ELEMENTWISE

State = dict[str, Any]
ByParam = Mapping[torch.Tensor, torch.Tensor]
StateByParam = Mapping[torch.Tensor, Mapping[str, torch.Tensor]]

# Elementwise rules need not be stepped all at once: copies of so many elements exist at a time. On the CPU fewer are
# faster, by up to three times; a device's kernels should have enough to do.
_ON_CPU, _ON_DEVICE = 2**20, 2**22

# State that torch keeps as one number per tensor; the names decide only for parameters that are scalars themselves.
_COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})


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


@dataclass
class Packet:
    """Parameters that are stepped as one tensor: a single one in its shape, or several flat, end to end.

    Args:
        group: index of the param group.
        params: the optimizer's own parameters.
        param, grad, state: copies of their values, gradients and states, joined.
        counters: keys of `state` that hold one number for all of them.
        part: which elements of the only parameter these are, flat, where they are not all.
    """

    group: int
    params: list[torch.Tensor]
    param: torch.Tensor
    grad: torch.Tensor
    state: State
    counters: frozenset[str]
    part: slice | None = None

    @classmethod
    def collect(
        cls,
        optimizer: torch.optim.Optimizer,
        group: int,
        params: list[torch.Tensor],
        counters: Mapping[str, float],
        part: slice | None = None,
    ) -> Packet:
        """Copy what a step on `params` would read."""
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
                state[key] = _joined([entry[key] for entry in states], part)
        return cls(
            group=group,
            params=params,
            param=_joined([p.detach() for p in params], part),
            grad=_joined([gradient_of(p) for p in params], part),
            state=state,
            counters=frozenset(counters),
            part=part,
        )

    def state_dict(self, at: Mapping[torch.Tensor, int]) -> dict[str, Any]:
        """Everything in plain containers, parameters by their position."""
        return {
            "group": self.group,
            "params": [at[p] for p in self.params],
            "param": self.param,
            "grad": self.grad,
            "state": dict(self.state),
            "counters": sorted(self.counters),
        }

    @classmethod
    def restored(cls, state: dict[str, Any], params: Sequence[torch.Tensor]) -> Packet:
        """The packet whose `state_dict` this is, of the parameters at those positions."""
        own = [params[i] for i in state["params"]]
        device, counters = own[0].device, frozenset(state["counters"])
        # Counters stay on the host, where they were read to.
        placed = {
            k: v.to(device) if isinstance(v, torch.Tensor) and k not in counters else v
            for k, v in state["state"].items()
        }
        param, grad = state["param"].to(device), state["grad"].to(device)
        if param.dim() == 0:  # older versions wrote a number so
            param, grad = param.reshape(1), grad.reshape(1)
            apart = {k for k, v in placed.items() if isinstance(v, torch.Tensor) and k not in counters}
            placed = {k: v.reshape(1) if k in apart else v for k, v in placed.items()}
        return cls(state["group"], own, param, grad, placed, counters)

    def is_counter(self, key: str, value: torch.Tensor) -> bool:
        """Whether an entry of the state, which the step may just have made, is one number for all parameters."""
        return key in self.counters or _is_counter(key, value, self.params[0])

    def join(self, parts: ByParam) -> torch.Tensor | None:
        """One tensor like `param`; zero for parameters that are absent, None if all of them are."""
        if not any(p in parts for p in self.params):
            return None
        return _joined([parts[p] if p in parts else torch.zeros_like(p) for p in self.params], self.part)

    def join_state(self, parts: StateByParam) -> dict[str, torch.Tensor]:
        """One tensor per entry of the state that occurs in `parts`; of counters, a list of one value per parameter."""
        joined: dict[str, torch.Tensor] = {}
        for key in {key for p in self.params for key in parts.get(p, {})}:
            entries = [parts.get(p, {}).get(key) for p in self.params]
            known = next(entry for entry in entries if entry is not None)
            if self.is_counter(key, known):
                joined[key] = torch.stack([torch.zeros_like(known) if e is None else e for e in entries])
            else:
                joined[key] = _joined(
                    [torch.zeros_like(p) if e is None else e for e, p in zip(entries, self.params, strict=True)],
                    self.part,
                )
        return joined

    def split(self, joined: torch.Tensor) -> list[torch.Tensor]:
        """One tensor per parameter, in its shape, of one like `param`; not of a part."""
        if len(self.params) == 1:
            return [joined.view(self.params[0].shape) if self.params[0].dim() == 0 else joined]
        parts = torch.split(joined, [p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def put(self, joined: torch.Tensor, into: dict[torch.Tensor, torch.Tensor]) -> None:
        """Write a tensor like `param` to the entries of its parameters."""
        if self.part is None:
            into.update(zip(self.params, self.split(joined), strict=True))
            return
        (p,) = self.params
        if p not in into:
            into[p] = torch.zeros_like(p)
        into[p].view(-1)[self.part] = joined


def collect(
    optimizer: torch.optim.Optimizer, groups: Sequence[int] | None = None, *, pack: bool | None = None
) -> list[Packet]:
    """Copies of all that the next step of an optimizer would read.

    Args:
        groups: indices of param groups; None takes them all.
        pack: treat parameters of one dtype and device, with the same kind of state and the same numbers in it, as one
            tensor; None does so where the rule is known to be elementwise.
    """
    return [packet for bundle in bundles(optimizer, groups, pack=pack) for packet in bundle]


def bundles(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[int] | None = None,
    *,
    pack: bool | None = None,
    cut: bool = False,
) -> Iterator[list[Packet]]:
    """The same, one bundle of packets after another: what one bundle becomes does not depend on the others.

    An elementwise rule comes in bundles of some million elements, so that copies of a large model never exist all at
    once; any other rule in one.

    Args:
        cut: let a larger tensor of an elementwise rule come in parts.
    """
    elementwise = type(optimizer) in ELEMENTWISE
    indices = range(len(optimizer.param_groups)) if groups is None else groups
    bundle: list[Packet] = []
    size = 0
    for index in indices:
        params = stepped_params(optimizer.param_groups[index])
        for part, counters in _partition(optimizer, params, elementwise if pack is None else pack):
            elements, most = sum(p.numel() for p in part), _most(part[0])
            if cut and elementwise and elements > most and _is_flat(optimizer, part):
                for start in range(0, elements, most):
                    some = slice(start, min(start + most, elements))
                    yield [Packet.collect(optimizer, index, part, counters, some)]
                continue
            if elementwise and bundle and size + elements > most:
                yield bundle
                bundle, size = [], 0
            bundle.append(Packet.collect(optimizer, index, part, counters))
            size += elements
    if bundle:
        yield bundle


@contextmanager
def exact_counters(packets: Sequence[Packet]) -> Iterator[None]:
    """Step counts that the first step of a run creates are float64 as well, see `Packet.collect`.

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


def _partition(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], pack: bool
) -> list[tuple[list[torch.Tensor], dict[str, float]]]:
    counters = counters_of(optimizer, params)
    if not pack:
        return [([p], counters[p]) for p in params]
    packets: dict[Any, list[torch.Tensor]] = {}
    sizes: dict[Any, int] = {}
    for p in params:
        state = optimizer.state.get(p, {})
        shapes = tuple((k, v.dtype, v.shape == p.shape) for k, v in state.items() if isinstance(v, torch.Tensor))
        others = tuple((k, v) for k, v in state.items() if not isinstance(v, torch.Tensor))
        kind = (p.dtype, p.device, p.dim() == 0, shapes, others, tuple(counters[p].items()))
        if p.numel() > _most(p):
            packets[kind, p] = [p]
            continue
        sizes[kind] = sizes.get(kind, 0) + p.numel()
        packets.setdefault((kind, sizes[kind] // _most(p)), []).append(p)
    return [(packet, counters[packet[0]]) for packet in packets.values()]


def counters_of(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> dict[torch.Tensor, dict[str, float]]:
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


def gradient_of(param: torch.Tensor) -> torch.Tensor:
    """The gradient that a step would take."""
    if param.grad is None:
        raise UnsupportedOptimizerError("A parameter lost its gradient while its step was differentiated.")
    return param.grad.detach()


def _most(param: torch.Tensor) -> int:
    """How many elements may be copied at a time."""
    return _ON_CPU if param.device.type == "cpu" else _ON_DEVICE


def _is_flat(optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor]) -> bool:
    """Whether this is one parameter whose values, gradient and state can be read in parts without a copy of all."""
    if len(params) != 1:
        return False
    (p,) = params
    entries = [v for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor) and v.dim() > 0]
    return all(t.is_contiguous() and t.shape == p.shape for t in (p, gradient_of(p), *entries))


def _joined(tensors: Sequence[torch.Tensor], part: slice | None = None) -> torch.Tensor:
    """A fresh copy: the tensor itself, or a part of it, if it is the only one, otherwise all of them end to end.

    A number comes as a vector of one element: without a dimension it would take the dtype of the hyperparameters.
    """
    if len(tensors) == 1:
        only = tensors[0].detach()
        if part is not None or only.dim() == 0:
            only = only.reshape(-1)[part or slice(None)]
        return only.clone()
    return torch.cat([t.detach().reshape(-1) for t in tensors])
