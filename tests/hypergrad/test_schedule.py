"""Learned curves: the shape, its derivative, and whole runs under them against central differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hypergrad import (
    Estimator,
    Forward,
    HyperparameterError,
    Implicit,
    Online,
    Schedule,
    Unrolled,
    check,
    hypergradient,
)
from tests.hypergrad.cells import CELLS, Problem

CURVE = Schedule("lr", {1: 0.1, 4: 0.02, 7: 0.05})


def test_linear_in_log_lr_between_knots_and_flat_beyond() -> None:
    values = [CURVE.value(step) for step in range(10)]
    assert values[:2] == pytest.approx([0.1, 0.1])
    assert values[4] == pytest.approx(0.02)
    assert values[2] == pytest.approx(0.1 * 0.2 ** (1 / 3))
    assert values[7:] == pytest.approx([0.05] * 3)
    assert CURVE.values.tolist() == [0.1, 0.02, 0.05]


@pytest.mark.parametrize("name", ["lr", "momentum"])
@pytest.mark.parametrize("step", range(9))
def test_rates_are_derivatives(name: str, step: int) -> None:
    knots = {1: 0.1, 4: 0.02, 7: 0.5}
    rates = Schedule(name, knots).rates(step)
    for j, (at, value) in enumerate(knots.items()):
        ends = [Schedule(name, {**knots, at: value * (1 + sign * 1e-5)}).value(step) for sign in (1, -1)]
        assert rates.get(j, 0.0) == pytest.approx((ends[0] - ends[1]) / (2e-5 * value), rel=1e-6, abs=1e-9)


def test_moves_in_the_coordinate_within_bounds() -> None:
    moved = CURVE.moved([math.log(2.0), 0.0, 100.0])
    assert list(moved.knots) == [1, 4, 7]
    assert moved.values.tolist() == pytest.approx([0.2, 0.02, 10.0])


@pytest.mark.parametrize("estimator", [Forward(), Unrolled(), Unrolled(steps=4)], ids=repr)
@pytest.mark.parametrize(("index", "groups"), [(1, 1), (7, 1), (7, 2)])  # SGD with momentum, AdamW
def test_equals_differences_of_whole_runs(estimator: Estimator, index: int, groups: int, double: None) -> None:
    problem = Problem(CELLS[index], groups=groups, steps=9)

    def run(curve: Schedule) -> Any:
        model = problem.model()
        optimizer = problem.optimizer(model)
        return hypergradient(
            model, optimizer, problem.train_losses, problem.val_loss, [curve, "weight_decay"], estimator
        )

    found = run(CURVE).grads["lr"]
    assert found.shape == (3,)
    expected = []
    for at, value in CURVE.knots.items():
        h = 1e-4 * value
        ends = [run(Schedule("lr", {**CURVE.knots, at: value + sign * h})).value for sign in (1, -1)]
        expected.append((ends[0] - ends[1]) / (2 * h))
    if isinstance(estimator, Unrolled) and estimator.steps == 4:  # steps 5 to 8 depend on the last two knots only
        assert found[0] == 0.0
        assert found[2].item() == pytest.approx(expected[2].item(), rel=0.5)
        return
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-12)


def test_the_optimizer_keeps_its_own_lr(double: None) -> None:
    problem = Problem(CELLS[7])
    model = problem.model()
    optimizer = problem.optimizer(model)
    before = optimizer.param_groups[0]["lr"]
    hypergradient(model, optimizer, problem.train_losses, problem.val_loss, [CURVE], Forward())
    assert optimizer.param_groups[0]["lr"] == before


def test_what_cannot_work_is_refused() -> None:
    for knots in ({0: 0.1}, {0: 0.1, 1.5: 0.1}, {-1: 0.1, 2: 0.1}, {0: 0.1, 5: 0.0}, {0: 0.1, 5: float("nan")}):
        with pytest.raises(HyperparameterError):
            Schedule("lr", knots)  # type: ignore[arg-type]
    problem = Problem(CELLS[7])
    model = problem.model()
    optimizer = problem.optimizer(model)
    for estimator in (Online(), Implicit()):
        with pytest.raises(HyperparameterError, match=r"Forward\(\)"):
            hypergradient(model, optimizer, problem.train_losses, problem.val_loss, [CURVE], estimator)
    with pytest.raises(HyperparameterError, match="check cannot serve"):
        check(model, optimizer, problem.train_losses, problem.val_loss, [CURVE], Forward())
    with pytest.raises(HyperparameterError, match="once"):
        hypergradient(model, optimizer, problem.train_losses, problem.val_loss, [CURVE, "lr"], Forward())
    curve = Schedule("rho", {0: 0.1, 3: 0.2})
    with pytest.raises(HyperparameterError, match="'rho'"):
        hypergradient(model, optimizer, problem.train_losses, problem.val_loss, [curve], Forward())
