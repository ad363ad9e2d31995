"""Tangents of whole steps in closed form, for the rules whose derivative is short: SGD, Adam and AdamW.

Equal to the general derivative of `differentiate_step`, in a fraction of its time, for every flag that is accepted
here; anything else has none and takes the general way. Matched by exact class: a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hypergrad.chunks import pieces, pieces_of
from hypergrad.hyperparameter import ParamGroup
from hypergrad.optimizer.packets import counters_of, gradient_of, stepped_params
from hypergrad.optimizer.step import Direction, StateVector, differentiate_step

Part = torch.Tensor | None  # None stands for zero
Parts = dict[str, Part]


class _Elements:
    """Some elements of one parameter just before a step, along one direction.

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
    for index, (group, rule) in enumerate(zip(groups, rules, strict=True)):
        rates = {name: rate for (i, name), rate in asked.items() if i == index}
        params = stepped_params(group)
        counters = counters_of(optimizer, params)
        for p in params:
            along = {
                "param": direction.params.get(p),
                "grad": direction.grads.get(p),
                **{key: direction.state.get(p, {}).get(key) for key in rule.state},
            }
            if not rates and all(tangent is None for tangent in along.values()):
                continue
            step = counters[p].get("step", 0.0)
            after = _carry(rule, p, gradient_of(p), optimizer.state.get(p, {}), along, group, rates, step)
            if "param" in after:
                result.params[p] = after.pop("param")
            if after:
                result.state[p] = after
    return result


class _Rule:
    """One optimizer's rule: the names of its hyperparameters, the entries of its state, and its derivative."""

    def __init__(self, names: set[str], state: tuple[str, ...], derivative: Callable[[_Elements], Parts]) -> None:
        self.names, self.state, self.derivative = names, state, derivative


def _sgd(at: _Elements) -> Parts:
    group, rate = at.group, at.rates.get
    sign, lr, decay = -1.0 if group["maximize"] else 1.0, group["lr"], group["weight_decay"]
    momentum, damping = group["momentum"], group["dampening"]
    # g = +-grad + wd theta              dg = +-dgrad + wd dtheta + dwd theta
    gradient = _sum((sign, at.grad), (decay, at.param))
    change = _sum((sign, at.along["grad"]), (decay, at.along["param"]), (rate("weight_decay", 0.0), at.param))
    if momentum == 0.0:
        # theta' = theta - lr g          dtheta' = dtheta - lr dg - dlr g
        return {"param": _sum((1.0, at.along["param"]), (-lr, change), (-rate("lr", 0.0), gradient))}
    before = at.state["momentum_buffer"]
    if before is None:
        # b' = g, and no more, on the first step
        buffer, along = gradient, change
    else:
        # b' = m b + (1 - d) g           db' = m db + (1 - d) dg + dm b - dd g
        buffer = _sum((momentum, before), (1.0 - damping, gradient))
        along = _sum(
            (momentum, at.along["momentum_buffer"]),
            (1.0 - damping, change),
            (rate("momentum", 0.0), before),
            (-rate("dampening", 0.0), gradient),
        )
    update, turned = buffer, along
    if group["nesterov"]:
        # u = g + m b'                   du = dg + m db' + dm b'
        update = _sum((1.0, gradient), (momentum, buffer))
        turned = _sum((1.0, change), (momentum, along), (rate("momentum", 0.0), buffer))
    # theta' = theta - lr u              dtheta' = dtheta - lr du - dlr u
    moved = _sum((1.0, at.along["param"]), (-lr, turned), (-rate("lr", 0.0), update))
    return {"param": moved, "momentum_buffer": along}


def _adam(at: _Elements) -> Parts:
    group, rate = at.group, at.rates.get
    (beta1, beta2), eps, lr, decay = group["betas"], group["eps"], group["lr"], group["weight_decay"]
    dlr, ddecay, deps = rate("lr", 0.0), rate("weight_decay", 0.0), rate("eps", 0.0)
    dbeta1, dbeta2, t = rate("betas[0]", 0.0), rate("betas[1]", 0.0), at.step + 1.0
    sign, decoupled = -1.0 if group["maximize"] else 1.0, bool(group["decoupled_weight_decay"])
    l2, dl2 = (0.0, 0.0) if decoupled else (decay, ddecay)
    # g = +-grad + wd theta              dg = +-dgrad + wd dtheta + dwd theta
    gradient = _sum((sign, at.grad), (l2, at.param))
    change = _sum((sign, at.along["grad"]), (l2, at.along["param"]), (dl2, at.param))
    square = gradient * gradient
    # m' = b1 m + (1 - b1) g             dm' = b1 dm + (1 - b1) dg + db1 (m - g)
    first = _sum((beta1, at.state["exp_avg"]), (1.0 - beta1, gradient))
    dfirst = _sum(
        (beta1, at.along["exp_avg"]), (1.0 - beta1, change), (dbeta1, at.state["exp_avg"]), (-dbeta1, gradient)
    )
    # v' = b2 v + (1 - b2) g^2           dv' = b2 dv + 2 (1 - b2) g dg + db2 (v - g^2)
    second = _sum((beta2, at.state["exp_avg_sq"]), (1.0 - beta2, square))
    dsecond = _sum((beta2, at.along["exp_avg_sq"]), (dbeta2, at.state["exp_avg_sq"]), (-dbeta2, square))
    if change is not None:
        gradient.mul_(change)
        dsecond = (
            gradient.mul_(2.0 * (1.0 - beta2)) if dsecond is None else dsecond.add_(gradient, alpha=2.0 * (1.0 - beta2))
        )
    # c = 1 - b^t                        dc = -t b^(t-1) db
    c1, c2 = 1.0 - beta1**t, 1.0 - beta2**t
    dc1, dc2 = -t * beta1 ** (t - 1.0) * dbeta1, -t * beta2 ** (t - 1.0) * dbeta2
    # r = sqrt(v' / c2)                  dr = (dv' / c2 - v' dc2 / c2^2) / (2 r), and 0 where r is
    root = (second / c2).sqrt_()
    droot = _sum((0.5 / c2, dsecond), (-0.5 * dc2 / c2**2, second))
    if droot is not None:
        droot.div_(root).masked_fill_(root == 0.0, 0.0)
        if deps:
            droot.add_(deps)
    elif deps:
        droot = torch.full_like(root, deps)
    # u = m' / (c1 (r + eps))            du = (dm' / c1 - m' dc1 / c1^2 - u (dr + deps)) / (r + eps)
    bottom = root.add_(eps)
    update = first.div(bottom).div_(c1)
    dupdate = _sum((1.0 / c1, dfirst), (-dc1 / c1**2, first))
    if droot is not None:
        dupdate = droot.mul_(update).neg_() if dupdate is None else dupdate.addcmul_(update, droot, value=-1.0)
    if dupdate is not None:
        dupdate.div_(bottom)
    # theta' = (1 - lr wd) theta - lr u  dtheta' = (1 - lr wd) dtheta - (dlr wd + lr dwd) theta - lr du - dlr u
    keep, dkeep = (1.0 - lr * decay, -dlr * decay - lr * ddecay) if decoupled else (1.0, 0.0)
    moved = _sum((keep, at.along["param"]), (dkeep, at.param), (-lr, dupdate), (-dlr, update))
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


def _carry(
    rule: _Rule,
    param: torch.Tensor,
    grad: torch.Tensor,
    state: Mapping[str, Any],
    along: Parts,
    group: ParamGroup,
    rates: Mapping[str, float],
    step: float,
) -> dict[str, torch.Tensor]:
    """The tangents after a step, by key; those before it are overwritten."""
    count = pieces_of(param)
    result: dict[str, torch.Tensor] = {}
    targets: dict[str, list[torch.Tensor]] = {}
    values, grads = pieces(param.detach(), count), pieces(grad, count)
    entries = {key: _pieces(state.get(key), count) for key in rule.state}
    moving = {key: _pieces(t, count) for key, t in along.items()}
    for i, (value, slope) in enumerate(zip(values, grads, strict=True)):
        known = {key: parts[i] for key, parts in entries.items()}
        before = {key: parts[i] for key, parts in moving.items()}
        after = rule.derivative(_Elements(value, slope, known, before, group, rates, step))
        for key, tangent in after.items():
            if tangent is None:
                continue
            if key not in result:
                old = along[key]
                result[key] = old if old is not None and old.is_contiguous() else torch.empty_like(param)
                targets[key] = pieces(result[key], count)
            targets[key][i].copy_(tangent)
    return result


def _pieces(tensor: torch.Tensor | None, count: int) -> list[Part]:
    return [None] * count if tensor is None else list(pieces(tensor, count))


def _sum(*terms: tuple[float, Part]) -> Any:
    """A fresh tensor, or None where every term is zero."""
    total: Part = None
    for factor, tensor in terms:
        if tensor is None or factor == 0.0:
            continue
        total = tensor * factor if total is None else total.add_(tensor, alpha=factor)
    return total
