"""One number for all, per param group or per tensor: by central differences of whole runs in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hypergrad import (
    Estimator,
    Exact,
    Forward,
    HyperparameterError,
    Online,
    OptimizerHyperparameter,
    Unrolled,
    check,
    hypergradient,
    rejoin_groups,
    split_groups,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5),  # no closed form of its tangents
}
ESTIMATORS: dict[str, Estimator] = {"Online": Online(), "Forward": Forward(), "Unrolled": Unrolled()}
STEPS = 5


def _model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _loss(step: int) -> Callable[[nn.Module], torch.Tensor]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return lambda m: (m(x) - x[:, :2].sin()).square().mean()


TRAIN, VAL = [_loss(i) for i in range(STEPS)], _loss(STEPS)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.03}]


def _per_tensor(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS[kind](_groups(model))
    tensors = [{**g, "params": [p]} for g in optimizer.param_groups for p in g["params"]]
    return type(optimizer)(tensors)


def _run(kind: str, name: str, first: int, change: Callable[[int, float], float]) -> float:
    """The validation loss when the value of tensor i is `change(i, value)` from a step on."""
    model = _model()
    optimizer, h = _per_tensor(kind, model), OptimizerHyperparameter(name)
    for step, loss in enumerate(TRAIN):
        optimizer.zero_grad()
        loss(model).backward()
        if step == first:
            for i, group in enumerate(optimizer.param_groups):
                h.write(group, change(i, h.read(group)))
        optimizer.step()
    return VAL(model).item()


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_central_differences(estimator: str, kind: str, name: str, double: None) -> None:
    if (kind, name) == ("RMSprop", "weight_decay"):
        name = "alpha"
    first = STEPS - 1 if estimator == "Online" else 0

    def found(per: Any) -> Any:
        model = _model()
        optimizer = OPTIMIZERS[kind](_groups(model))
        before = [dict(g) for g in optimizer.param_groups]
        h = OptimizerHyperparameter(name, per=per)
        result = hypergradient(model, optimizer, TRAIN, VAL, [h], ESTIMATORS[estimator])
        assert [dict(g) for g in optimizer.param_groups] == before
        return result

    h = OptimizerHyperparameter(name)
    values = [h.read(g) for g in _per_tensor(kind, _model()).param_groups]
    tensors = []
    for t, value in enumerate(values):
        e = 1e-6 * min(value, 1.0 - value)
        ends = [_run(kind, name, first, lambda i, v, s=s, t=t, e=e: v + s * e * (i == t)) for s in (1, -1)]
        tensors.append((ends[0] - ends[1]) / (2 * e))
    per_tensor = found("tensor")
    assert per_tensor.grads[name].shape == (4,)
    torch.testing.assert_close(per_tensor.grads[name], torch.tensor(tensors), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        per_tensor.slopes[name], per_tensor.grads[name] * h.coordinate.slope(torch.tensor(values)), rtol=1e-9, atol=0.0
    )
    # All move by the same step in the coordinate, counted in units of the first group's value.
    coordinate, e = h.coordinate, 1e-6
    ends = [
        _run(kind, name, first, lambda i, v, s=s: coordinate.inverse(coordinate.forward(v) + s * e)) for s in (1, -1)
    ]
    shared, slope = found("shared"), (ends[0] - ends[1]) / (2 * e)
    assert shared.grads[name].shape == ()
    assert shared.slopes[name].item() == pytest.approx(slope, rel=1e-5)
    assert shared.grads[name].item() == pytest.approx(slope / coordinate.slope(values[0]), rel=1e-5)
    groups = found("group").grads[name]
    torch.testing.assert_close(
        groups, torch.stack([per_tensor.grads[name][:1].sum(), per_tensor.grads[name][1:].sum()]), rtol=1e-8, atol=0.0
    )
    if estimator == "Forward":  # one direction, not one per group
        assert shared.products == STEPS - 1
        assert per_tensor.products == 4 * (STEPS - 1)
    if estimator != "Unrolled":
        assert -1.0 <= shared.cosines[name].item() <= 1.0
        assert per_tensor.cosines[name].shape == (4,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scopes_side_by_side(estimator: str, double: None) -> None:
    def found(*names: OptimizerHyperparameter) -> dict[str, torch.Tensor]:
        model = _model()
        optimizer = OPTIMIZERS["AdamW"](_groups(model))
        return hypergradient(model, optimizer, TRAIN, VAL, names, ESTIMATORS[estimator]).grads

    names = (
        OptimizerHyperparameter("lr", per="tensor"),
        OptimizerHyperparameter("weight_decay", per="shared"),
        OptimizerHyperparameter("betas[0]"),
    )
    together = found(*names)
    assert [together[h.name].shape for h in names] == [(4,), (), (2,)]
    for h in names:
        torch.testing.assert_close(together[h.name], found(h)[h.name], rtol=1e-9, atol=1e-14)


def test_a_group_that_is_at_0_does_not_move_with_the_others(double: None) -> None:
    # Biases without decay: they stay out, also where they come first.
    model = _model()
    params = list(model.parameters())
    groups = [{"params": params[1:2], "weight_decay": 0.0}, {"params": params[:1] + params[2:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    h = OptimizerHyperparameter("weight_decay")
    both = hypergradient(model, optimizer, TRAIN, VAL, [h], Forward()).grads["weight_decay"]
    shared = OptimizerHyperparameter("weight_decay", per="shared")
    one = hypergradient(model, optimizer, TRAIN, VAL, [shared], Forward())
    assert both[0] != 0.0
    assert one.grads["weight_decay"].item() == pytest.approx(both[1].item(), rel=1e-10)
    assert one.slopes["weight_decay"].item() == pytest.approx(0.1 * both[1].item(), rel=1e-10)


def test_check_confirms_every_scope(double: None) -> None:
    model = _model()
    optimizer = OPTIMIZERS["SGD"](_groups(model))
    names = [OptimizerHyperparameter("lr", per="tensor"), OptimizerHyperparameter("weight_decay", per="shared")]
    found = check(model, optimizer, TRAIN[:3], VAL, names, Forward(curvature=Exact()))
    assert found.ok
    assert [r.name for r in found.rows] == [*(f"lr, tensor {i}" for i in range(4)), "weight_decay"]


def test_groups_come_back_as_they_were_with_what_the_step_wrote() -> None:
    model = _model()
    optimizer = OPTIMIZERS["SGD"](_groups(model))
    optimizer.param_groups[1]["k"] = 0
    groups = list(optimizer.param_groups)
    lists = [g["params"] for g in groups]
    saved = split_groups(optimizer)
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1, 1, 1]
    for group in optimizer.param_groups:
        group["lr"] = 7.0
        if "k" in group:
            group["k"] += 1  # a counter, as some optimizers keep it
    rejoin_groups(optimizer, saved, {"lr"})
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert all(g["params"] is params for g, params in zip(groups, lists, strict=True))
    assert [g["lr"] for g in groups] == [0.1, 0.03]
    assert groups[1]["k"] == 1


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(HyperparameterError, match="'group', 'shared' or 'tensor'"):
        OptimizerHyperparameter("lr", per="layer")  # type: ignore[arg-type]
