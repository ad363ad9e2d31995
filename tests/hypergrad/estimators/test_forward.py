"""Forward against float64 central differences of whole runs, on every cell of the matrix and every kind of layer."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hypergrad import (
    ConfigurationError,
    Curvature,
    Exact,
    FiniteDifference,
    Forward,
    HypergradError,
    NotDifferentiableError,
    Online,
    OptimizerHyperparameter,
    UnsupportedOptimizerError,
    hypergradient,
    resolve,
)
from tests.hypergrad.cells import ACCEPTED, CELLS, Cell, Problem, ids
from tests.hypergrad.layers import MODELS, assert_layers_are_differentiated

CARRIED = [(cell, name) for cell, name in ACCEPTED if cell.carried]
NOT_CARRIED = [(cell, name) for cell, name in ACCEPTED if not cell.carried]


def _measured(problem: Problem, name: str, estimator: Forward | Online) -> torch.Tensor:
    model = problem.model()
    return hypergradient(
        model, problem.optimizer(model), problem.train_losses, problem.val_loss, [name], estimator
    ).grads[name]


@pytest.mark.parametrize(("cell", "name"), CARRIED, ids=ids(CARRIED))
def test_equals_central_differences_of_the_whole_run(cell: Cell, name: str, double: None) -> None:
    problem = Problem(cell, steps=10)
    expected = problem.run_difference(name)
    assert expected != 0.0
    exact = _measured(problem, name, Forward()).item()
    assert exact == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert _measured(problem, name, Forward(curvature=FiniteDifference(1e-8))).item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    "cell", [c for c in CELLS if c.carried and c.optimizer is not torch.optim.Adafactor], ids=lambda c: c.name
)
def test_weights_that_never_have_a_gradient_cost_no_digit(cell: Cell, double: None) -> None:
    # Rows of an embedding that no batch has: their second moments stay 0, where a square root has no derivative.
    full, seen = nn.Embedding(5, 3), nn.Embedding(2, 3)
    with torch.no_grad():
        seen.weight.copy_(full.weight[:2])
    losses = [lambda m, i=i: (m.weight[:2].sin() * (1 + i)).square().sum() for i in range(4)]
    for name in cell.accepted:
        if name == "weight_decay" and not cell.settings.get("weight_decay"):
            continue  # at exactly 0 the derivative of an unused weight's step is 1 / eps, or does not exist
        found = [
            hypergradient(m, cell.optimizer([m.weight], **cell.settings), losses, losses[0], [name], Forward())
            for m in (full, seen)
        ]
        assert found[0].grads[name].isfinite()
        torch.testing.assert_close(found[0].grads[name], found[1].grads[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("cell", "name"), NOT_CARRIED, ids=ids(NOT_CARRIED))
def test_refuses_what_it_cannot_carry(cell: Cell, name: str) -> None:
    optimizer = Problem(cell).optimizer(Problem(cell).model())
    with pytest.raises(UnsupportedOptimizerError, match=r"Use Online\(\)"):
        Forward().track(optimizer, resolve(optimizer, [name]))


@pytest.mark.parametrize("index", [1, 7])  # SGD with momentum, AdamW
def test_each_param_group_has_its_own_hypergradient(index: int, double: None) -> None:
    problem = Problem(CELLS[index], groups=2, steps=6)
    expected = torch.tensor([problem.run_difference("lr", group) for group in range(2)])
    torch.testing.assert_close(_measured(problem, "lr", Forward()), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("index", [1, 7])
def test_without_memory_it_is_online_and_without_a_past_too(index: int, double: None) -> None:
    problem = Problem(CELLS[index])
    for name in ("lr", "weight_decay"):
        online = _measured(problem, name, Online())
        torch.testing.assert_close(_measured(problem, name, Forward(decay=0.0)), online, rtol=1e-10, atol=0.0)
        assert not torch.isclose(_measured(problem, name, Forward()), online, rtol=1e-2)
        one = Problem(CELLS[index], steps=1)
        torch.testing.assert_close(_measured(one, name, Forward()), _measured(one, name, Online()), rtol=1e-8, atol=0)


def test_decay_weighs_a_step_by_its_age_where_the_loss_is_linear(double: None) -> None:
    # Plain SGD on a linear loss: theta_T = theta_0 - lr * T, so each of T steps adds -1, weighed by decay ** age.
    model = nn.Linear(1, 1, bias=False)
    loss = lambda m: m.weight.sum()
    for curvature in (Exact(), FiniteDifference(), None):
        result = hypergradient(
            model, torch.optim.SGD(model.parameters(), lr=0.1), [loss] * 4, loss, ["lr"], Forward(0.5, curvature)
        )
        assert result.grads["lr"].item() == pytest.approx(-(1 + 0.5 + 0.25 + 0.125), rel=1e-12)


def test_a_quadratic_whose_best_learning_rate_is_known(double: None) -> None:
    # theta_T = (1 - lr)^T theta_0: the loss of T steps is smallest at lr = 1, where its hypergradient vanishes.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    loss = lambda m: 0.5 * m.weight.square().sum()
    for lr in (0.3, 1.0, 1.7):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        result = hypergradient(model, optimizer, [loss] * 5, loss, ["lr"], Forward())
        assert result.grads["lr"].item() == pytest.approx(-5 * 4.0 * (1 - lr) ** 9, rel=1e-12, abs=1e-12)
        # No curvature: every gradient is taken to stay as it was.
        free = hypergradient(model, optimizer, [loss] * 2, loss, ["lr"], Forward(curvature=None))
        a = 1 - lr
        assert free.grads["lr"].item() == pytest.approx(-4.0 * a * a * (1 + a), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference(1e-8)], ids=["exact", "difference"])
@pytest.mark.parametrize("kind", MODELS)
def test_ordinary_layers(kind: str, curvature: Curvature, double: None) -> None:
    # There is no past at first. Exact goes back through the step's own graph, and looks twice at the loss before.
    again = 2 if isinstance(curvature, Exact) else 4
    assert_layers_are_differentiated(kind, Forward(curvature=curvature), evaluations=5 + again + 1)


def test_a_parameter_that_rests_keeps_its_tangent(double: None) -> None:
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    x = torch.tensor([[1.0, -2.0]])
    first, both = lambda m: m[0](x).square().sum(), lambda m: (m[0](x) + m[1](x)).square().sum()
    runs = [both, first, both, first]

    def loss(lr: float) -> float:
        clone = copy.deepcopy(model)
        optimizer = torch.optim.Adam(clone.parameters(), lr=lr)
        for one in runs:
            optimizer.zero_grad()
            one(clone).backward()
            optimizer.step()
        return both(clone).item()

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    result = hypergradient(model, optimizer, runs, both, ["lr"], Forward())
    assert result.grads["lr"].item() == pytest.approx((loss(0.01 + 1e-6) - loss(0.01 - 1e-6)) / 2e-6, rel=1e-6)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference()], ids=["exact", "difference"])
def test_memory_does_not_grow_with_the_horizon(curvature: Curvature) -> None:
    model = nn.Linear(1000, 1000)  # 4 MB
    x, megabytes = torch.randn(4, 1000), []

    def loss(m: nn.Module) -> torch.Tensor:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        return m(x).square().mean()

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    hypergradient(model, optimizer, [loss] * 60, loss, ["lr"], Forward(curvature=curvature))
    third = len(megabytes) // 3
    assert max(megabytes[-third:]) - max(megabytes[:third]) < 40.0  # one copy a step would be 80


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2.0 * g


@pytest.mark.parametrize("kind", ["once", "compiled"])
def test_a_loss_without_a_second_derivative_names_the_way_out(kind: str, double: None) -> None:
    model = nn.Linear(2, 1)
    compiled = torch.compile(model, backend="aot_eager")
    if kind == "once":  # autograd itself would go round it in silence
        loss = lambda m: _Once.apply(m(torch.ones(1, 2))).square().sum()
    else:
        loss = lambda m: compiled(torch.ones(1, 2)).square().sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NotDifferentiableError, match=r"curvature=FiniteDifference\(\)"):
        hypergradient(model, optimizer, [loss] * 2, loss, ["lr"], Forward())
    result = hypergradient(model, optimizer, [loss] * 2, loss, ["lr"], Forward(curvature=FiniteDifference()))
    assert math.isfinite(result.grads["lr"].item())


def test_parameters_are_put_back_when_an_extra_evaluation_raises(double: None) -> None:
    model = nn.Linear(2, 1)
    weight, calls = model.weight.detach().clone(), []

    def loss(m: nn.Module) -> torch.Tensor:
        calls.append(m.weight.detach().clone())
        if len(calls) == 3:  # the perturbed evaluation of the second step
            raise RuntimeError("out of memory")
        return m(torch.ones(1, 2)).square().sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="out of memory"):
        hypergradient(model, optimizer, [loss] * 2, loss, ["lr"], Forward(curvature=FiniteDifference()))
    assert not torch.equal(calls[1], calls[2])
    assert torch.equal(model.weight, weight)


def test_overflow_is_reported() -> None:
    # Chaotic: each step multiplies a small change by 1 - lr * 1e4 / 2 about, while tanh keeps the loss bounded.
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    loss = lambda m: torch.cos(100 * m.weight).sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = hypergradient(model, optimizer, [loss] * 30, loss, ["lr"], Forward())
    assert math.isfinite(result.value)
    assert "Forward(decay=0.9)" in result.status
    assert hypergradient(model, optimizer, [loss] * 3, loss, ["lr"], Forward()).status == "ok"
    flat = lambda m: m.weight.sum() * float("inf")
    assert "the training itself diverges" in hypergradient(model, optimizer, [flat], flat, ["lr"]).status


def test_bad_settings() -> None:
    with pytest.raises(ConfigurationError, match="decay"):
        Forward(decay=1.5)
    with pytest.raises(ConfigurationError, match="curvature"):
        Forward(curvature="exact")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="step"):
        FiniteDifference(step=0.0)


def test_a_tracker_says_what_it_misses(double: None) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = Forward().track(optimizer, [OptimizerHyperparameter("lr")])
    with pytest.raises(HypergradError, match=r"before_step\(\)"):
        tracker.contract({})
    model(torch.ones(1, 2)).sum().backward()
    tracker.before_step()
    optimizer.step()
    with pytest.raises(HypergradError, match="training loss"):
        tracker.before_step()
