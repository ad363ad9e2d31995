"""Tangents of whole steps in closed form, for the rules whose derivative is short: SGD, Adam and AdamW.

Equal to the general derivative of `differentiate_step`, in a fraction of its time, for every flag that is accepted
here; anything else has none and takes the general way. Matched by exact class: a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hypergrad.chunks import pieces, pieces_of
from hypergrad.hyperparameter import ParamGroup
from hypergrad.optimizer.packets import counters_of, gradient_of, stepped_params
from hypergrad.optimizer.step import Direction, StateVector, differentiate_step

Part = torch.Tensor | None  # None stands for zero
Parts = dict[str, Part]

# Tensors of up to so many elements are taken together, until there are enough: to call a kernel takes longer than it.
_SMALL, _ENOUGH = 2**13, 2**16


class _Elements:
    """Some elements of a parameter, or of several, just before a step, along one direction.

    Args:
        param, grad, state: what the step reads; state is absent on the first step.
        along: their tangents, with `"param"` and `"grad"` beside the entries of the state.
        group: the settings, as numbers.
        rates: tangent of each hyperparameter by name; absent is zero.
        step: how many steps were taken before.
    """

    def __init__(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        state: Parts,
        along: Parts,
        group: ParamGroup,
        rates: Mapping[str, float],
        step: float,
    ) -> None:
        self.param, self.grad, self.state, self.along = param, grad, state, along
        self.group, self.rates, self.step = group, rates, step


def carried(optimizer: torch.optim.Optimizer, direction: Direction) -> StateVector:
    """`differentiate_step`, in closed form where there is one.

    Tangents in `direction.params` and `direction.state` may be overwritten: of a closed form, the result is in them.
    """
    groups = optimizer.param_groups
    asked = {(index, h.name): rate for (index, h), rate in direction.hyperparameters.items()}
    rules = [rule for rule in (_rule_of(optimizer, group) for group in groups) if rule is not None]
    if len(rules) < len(groups) or not all(name in rules[index].names for index, name in asked):
        return differentiate_step(optimizer, direction)
    result = StateVector()
    # A Hessian product may be the very tangent that it was asked of, or another parameter's, which are overwritten.
    overwritten = {_storage(t) for t in direction.params.values()}
    grads = {p: t.clone() if _storage(t) in overwritten else t for p, t in direction.grads.items()}
    for index, (group, rule) in enumerate(zip(groups, rules, strict=True)):
        rates = {name: rate for (i, name), rate in asked.items() if i == index}
        params = stepped_params(group)
        counters = counters_of(optimizer, params)
        asked_of: dict[torch.Tensor, _Elements] = {}
        for p in params:
            along = {
                "param": direction.params.get(p),
                "grad": grads.get(p),
                **{key: direction.state.get(p, {}).get(key) for key in rule.state},
            }
            if not rates and all(tangent is None for tangent in along.values()):
                continue
            state, step = optimizer.state.get(p, {}), counters[p].get("step", 0.0)
            known = {key: state.get(key) for key in rule.state}
            asked_of[p] = _Elements(p.detach(), gradient_of(p), known, along, group, rates, step)
        for together in _bundles(asked_of):
            after = _carry(rule, _joined([asked_of[p] for p in together]))
            for p, tangents in zip(together, _parts(after, together), strict=True):
                if "param" in tangents:
                    result.params[p] = tangents.pop("param")
                if tangents:
                    result.state[p] = tangents
    return result


class _Rule:
    """One optimizer's rule: the names of its hyperparameters, the entries of its state, and its derivative."""

    def __init__(self, names: set[str], state: tuple[str, ...], derivative: Callable[[_Elements], Parts]) -> None:
        self.names, self.state, self.derivative = names, state, derivative


def _sgd(at: _Elements) -> Parts:
    group, rate, along = at.group, at.rates.get, at.along
    sign, lr, decay = -1.0 if group["maximize"] else 1.0, group["lr"], group["weight_decay"]
    momentum, damping = group["momentum"], group["dampening"]
    # g = +-grad + wd theta              dg = +-dgrad + wd dtheta + dwd theta
    gradient = _sum((sign, at.grad), (decay, at.param))
    change = _sum((sign, along["grad"]), (decay, along["param"]), (rate("weight_decay", 0.0), at.param))
    if momentum == 0.0:
        # theta' = theta - lr g          dtheta' = dtheta - lr dg - dlr g
        terms = (1.0, along["param"]), (-lr, change), (-rate("lr", 0.0), gradient)
        return {"param": _sum(*terms, into=along["param"])}
    before = at.state["momentum_buffer"]
    if before is None:
        # b' = g, and no more, on the first step
        buffer, turned = gradient, change
    else:
        # b' = m b + (1 - d) g           db' = m db + (1 - d) dg + dm b - dd g
        buffer = _sum((1.0 - damping, gradient), (momentum, before))
        turned = _sum(
            (1.0 - damping, change),
            (momentum, along["momentum_buffer"]),
            (rate("momentum", 0.0), before),
            (-rate("dampening", 0.0), gradient),
            into=along["momentum_buffer"],
        )
    after, update = turned, buffer
    if group["nesterov"]:
        # u = g + m b'                   du = dg + m db' + dm b'
        update = _sum((1.0, gradient), (momentum, buffer))
        turned = _sum((1.0, change), (momentum, after), (rate("momentum", 0.0), buffer))
    # theta' = theta - lr u              dtheta' = dtheta - lr du - dlr u
    moved = _sum((1.0, along["param"]), (-lr, turned), (-rate("lr", 0.0), update), into=along["param"])
    return {"param": moved, "momentum_buffer": after}


def _adam(at: _Elements) -> Parts:
    group, rate, along = at.group, at.rates.get, at.along
    (beta1, beta2), eps, lr, decay = group["betas"], group["eps"], group["lr"], group["weight_decay"]
    dlr, ddecay, deps = rate("lr", 0.0), rate("weight_decay", 0.0), rate("eps", 0.0)
    dbeta1, dbeta2, t = rate("betas[0]", 0.0), rate("betas[1]", 0.0), at.step + 1.0
    sign, decoupled = -1.0 if group["maximize"] else 1.0, bool(group["decoupled_weight_decay"])
    l2, dl2 = (0.0, 0.0) if decoupled else (decay, ddecay)
    m, v = at.state["exp_avg"], at.state["exp_avg_sq"]
    # g = +-grad + wd theta              dg = +-dgrad + wd dtheta + dwd theta
    gradient = _sum((sign, at.grad), (l2, at.param))
    change = _sum((sign, along["grad"]), (l2, along["param"]), (dl2, at.param))
    # m' = b1 m + (1 - b1) g             dm' = b1 dm + (1 - b1) dg + db1 (m - g)
    first = gradient * (1.0 - beta1) if m is None else torch.lerp(m, gradient, 1.0 - beta1)
    dfirst = along["exp_avg"]
    if dfirst is not None and change is not None:
        dfirst = dfirst.lerp_(change, 1.0 - beta1)
    else:
        dfirst = _sum((beta1, dfirst), (1.0 - beta1, change), into=dfirst)
    dfirst = _sum((1.0, dfirst), (dbeta1, m), (-dbeta1, gradient), into=along["exp_avg"])
    # v' = b2 v + (1 - b2) g^2           dv' = b2 dv + 2 (1 - b2) g dg + db2 (v - g^2)
    second = _plus_product(_sum((beta2, v)), gradient, gradient, 1.0 - beta2)
    dsecond = _sum((beta2, along["exp_avg_sq"]), (dbeta2, v), into=along["exp_avg_sq"])
    dsecond = _plus_product(dsecond, gradient, gradient, -dbeta2, into=along["exp_avg_sq"])
    dsecond = _plus_product(dsecond, gradient, change, 2.0 * (1.0 - beta2), into=along["exp_avg_sq"])
    # c = 1 - b^t                        dc = -t b^(t-1) db
    c1, c2 = 1.0 - beta1**t, 1.0 - beta2**t
    dc1, dc2 = -t * beta1 ** (t - 1.0) * dbeta1, -t * beta2 ** (t - 1.0) * dbeta2
    # s = sqrt(v'), e = sqrt(c2)         2 s ds = dv', and 2 e d(s / e) = (dv' - v' dc2 / c2) / s; both 0 where v' is,
    # and dv' with it
    dsquare = _sum((1.0, dsecond), (-dc2 / c2, second))
    root = second.sqrt_().clamp_min_(torch.finfo(second.dtype).tiny ** 0.5)
    # u = e m' / (s + e eps)             (s + e eps) du = e (dm' - m' dc1 / c1 - u (d(s / e) + deps)), both over c1;
    # `update` is u / e
    e = c2**0.5
    below = root + e * eps
    update = first / below
    turned = _sum((1.0, dfirst), (-dc1 / c1, first), (-e * deps, update))
    if dsquare is not None:
        turned = _plus_quotient(turned, update * dsquare, root, -0.5)
    # theta' = (1 - lr wd) theta - lr u  dtheta' = (1 - lr wd) dtheta - (dlr wd + lr dwd) theta - lr du - dlr u
    keep, dkeep = (1.0 - lr * decay, -dlr * decay - lr * ddecay) if decoupled else (1.0, 0.0)
    moved = _sum((keep, along["param"]), (dkeep, at.param), (-dlr * e / c1, update), into=along["param"])
    moved = _plus_quotient(moved, turned, below, -lr * e / c1, into=along["param"])
    return {"param": moved, "exp_avg": dfirst, "exp_avg_sq": dsecond}


_SGD = _Rule({"lr", "weight_decay", "momentum", "dampening"}, ("momentum_buffer",), _sgd)
_ADAM = _Rule({"lr", "weight_decay", "betas[0]", "betas[1]", "eps"}, ("exp_avg", "exp_avg_sq"), _adam)
_RULES: dict[type[torch.optim.Optimizer], _Rule] = {
    torch.optim.SGD: _SGD,
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}


def _rule_of(optimizer: torch.optim.Optimizer, group: ParamGroup) -> _Rule | None:
    rule = _RULES.get(type(optimizer))
    if rule is None or group.get("amsgrad") or (rule is _ADAM and "decoupled_weight_decay" not in group):
        return None
    numbers = [group[name.partition("[")[0]] for name in rule.names]
    flat = [x for number in numbers for x in (number if isinstance(number, (tuple, list)) else (number,))]
    if not all(isinstance(x, (int, float)) for x in flat):
        return None
    wide = all(p.dtype in (torch.float32, torch.float64) and p.is_contiguous() for p in group["params"])
    return rule if wide else None


def _bundles(elements: Mapping[torch.Tensor, _Elements]) -> Iterator[list[torch.Tensor]]:
    """Parameters whose steps are computed as one: small ones that are alike in all but their numbers."""
    bundles: dict[Any, list[torch.Tensor]] = {}
    sizes: dict[Any, int] = {}
    for p, at in elements.items():
        if p.numel() > _SMALL:
            yield [p]
            continue
        absent = [part is None for part in (*at.state.values(), *at.along.values())]
        kind = (p.dtype, p.device, at.step, len(at.along), *absent)
        bundles.setdefault(kind, []).append(p)
        sizes[kind] = sizes.get(kind, 0) + p.numel()
        if sizes[kind] > _ENOUGH:
            del sizes[kind]
            yield bundles.pop(kind)
    yield from bundles.values()


def _joined(parts: Sequence[_Elements]) -> _Elements:
    """Those of all parts, end to end."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def flat(tensors: Sequence[Part]) -> Part:
        present = [t.reshape(-1) for t in tensors if t is not None]
        return torch.cat(present) if present else None

    param, grad = torch.cat([p.param.reshape(-1) for p in parts]), torch.cat([p.grad.reshape(-1) for p in parts])
    state = {key: flat([p.state[key] for p in parts]) for key in first.state}
    along = {key: flat([p.along[key] for p in parts]) for key in first.along}
    return _Elements(param, grad, state, along, first.group, first.rates, first.step)


def _parts(after: Mapping[str, torch.Tensor], params: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The tangents of each parameter, in its shape."""
    if len(params) == 1:
        return [dict(after)]
    sizes = [p.numel() for p in params]
    parts: list[dict[str, torch.Tensor]] = [{} for _ in params]
    for key, flat in after.items():
        for p, part, tangent in zip(params, parts, torch.split(flat, sizes), strict=True):
            part[key] = tangent.view(p.shape)
    return parts


def _carry(rule: _Rule, at: _Elements) -> dict[str, torch.Tensor]:
    """The tangents after a step, by key; those before it are overwritten."""
    count = pieces_of(at.param)
    result: dict[str, torch.Tensor] = {}
    targets: dict[str, list[Any]] = {}
    values, grads = pieces(at.param, count), pieces(at.grad, count)
    entries = {key: _pieces(t, count) for key, t in at.state.items()}
    moving = {key: _pieces(t, count) for key, t in at.along.items()}
    for i, (value, slope) in enumerate(zip(values, grads, strict=True)):
        known = {key: parts[i] for key, parts in entries.items()}
        before = {key: parts[i] for key, parts in moving.items()}
        after = rule.derivative(_Elements(value, slope, known, before, at.group, at.rates, at.step))
        for key, tangent in after.items():
            if tangent is None:
                continue
            if key not in result:
                old = at.along[key]
                if old is not None and old.is_contiguous():
                    result[key], targets[key] = old, moving[key]
                else:
                    result[key] = torch.empty_like(at.param)
                    targets[key] = _pieces(result[key], count)
            if tangent is not targets[key][i]:
                targets[key][i].copy_(tangent)
    return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _pieces(tensor: torch.Tensor | None, count: int) -> list[Any]:
    return [None] * count if tensor is None else list(pieces(tensor, count))


def _sum(*terms: tuple[float, Part], into: Part = None) -> Any:
    """The sum of factors times tensors, or None where every term is zero; fastest if the first factor is 1.

    Not to be written to, for it may be one of the tensors; only `into`, if it is one of them, is overwritten.
    """
    total: Part = None
    own = False
    for factor, tensor in terms:
        if tensor is None or factor == 0.0:
            continue
        if total is None and (factor == 1.0 or tensor is into):
            total, own = tensor if factor == 1.0 else tensor.mul_(factor), tensor is into
        elif total is None:
            total, own = tensor * factor, True
        else:
            total, own = (
                torch.add(total, tensor, alpha=factor, out=total if own else tensor if tensor is into else None),
                True,
            )
    return total


def _plus_product(total: Part, a: Part, b: Part, factor: float, into: Part = None) -> Any:
    """The same for one more term, a product of two tensors."""
    if a is None or b is None or factor == 0.0:
        return total
    if total is None:
        return (a * b).mul_(factor)
    return torch.addcmul(total, a, b, value=factor, out=total if total is into else None)


def _plus_quotient(total: Part, a: Part, b: torch.Tensor, factor: float, into: Part = None) -> Any:
    """The same for one more term, a quotient of two tensors."""
    if a is None or factor == 0.0:
        return total
    if total is None:
        return (a / b).mul_(factor)
    return torch.addcdiv(total, a, b, value=factor, out=total if total is into else None)
