"""`higher` as an independent reference: another library's unrolled steps, where its rules are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import higher
import pytest
import torch
from torch import nn

from hypergrad import Forward, OptimizerHyperparameter, Unrolled, hypergradient

STEPS = 5
# higher adds eps before the bias correction, torch after it: so small, it makes no difference.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.05, betas=(0.9, 0.99), eps=1e-12),
}
# higher's entry of `override` for each hyperparameter.
ENTRIES: dict[str, Callable[[torch.Tensor], tuple[str, Any]]] = {
    "lr": lambda x: ("lr", x),
    "momentum": lambda x: ("momentum", x),
    "betas[0]": lambda x: ("betas", (x, 0.99)),
    "betas[1]": lambda x: ("betas", (0.9, x)),
}
VALUES = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 0.05, "betas[0]": 0.9, "betas[1]": 0.99}}


def _problem() -> tuple[nn.Module, list[Callable[[nn.Module], torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    batches = torch.randn(STEPS + 1, 8, 3)
    return model, [lambda m, x=x: (m(x) - x[:, :2].sin()).square().mean() for x in batches]


def _of_higher(kind: str, name: str) -> float:
    model, (*train, val) = _problem()
    value = torch.tensor(VALUES[kind][name], requires_grad=True)
    key, entry = ENTRIES[name](value)
    optimizer = OPTIMIZERS[kind](model.parameters())
    with higher.innerloop_ctx(model, optimizer, override={key: [entry]}) as (functional, unrolled):
        for loss in train:
            unrolled.step(loss(functional))
        (found,) = torch.autograd.grad(val(functional), value, allow_unused=True, materialize_grads=True)
    return found.item()


def _ours(kind: str, name: str, estimator: Any) -> float:
    model, (*train, val) = _problem()
    optimizer = OPTIMIZERS[kind](model.parameters())
    return hypergradient(model, optimizer, train, val, [name], estimator).grads[name].item()


def _difference(kind: str, name: str) -> float:
    model, (*train, val) = _problem()

    def loss(change: float) -> float:
        clone = copy.deepcopy(model)
        optimizer = OPTIMIZERS[kind](clone.parameters())
        h = OptimizerHyperparameter(name)
        h.write(optimizer.param_groups[0], VALUES[kind][name] + change)
        for one in train:
            optimizer.zero_grad()
            one(clone).backward()
            optimizer.step()
        return val(clone).item()

    return (loss(1e-6) - loss(-1e-6)) / 2e-6


@pytest.mark.parametrize("estimator", [Unrolled(), Forward()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    ("kind", "name"), [("SGD", "lr"), ("SGD", "momentum"), ("Adam", "lr"), ("Adam", "betas[0]")], ids=str
)
def test_agrees_with_higher_where_it_is_right(kind: str, name: str, estimator: Any, double: None) -> None:
    expected = _of_higher(kind, name)
    assert expected != 0.0
    assert _ours(kind, name, estimator) == pytest.approx(expected, rel=1e-8)


# It reads beta2 as a number, of which torch warns.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
def test_higher_loses_the_second_moment_of_adam_and_we_do_not(double: None) -> None:
    difference = _difference("Adam", "betas[1]")
    assert _ours("Adam", "betas[1]", Unrolled()) == pytest.approx(difference, rel=1e-6)
    assert _of_higher("Adam", "betas[1]") != pytest.approx(difference, rel=0.1)
