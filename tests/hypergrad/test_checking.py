"""`check` confirms what is right, and finds what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hypergrad import (
    ConfigurationError,
    Contraction,
    Estimator,
    FiniteDifference,
    Forward,
    Online,
    Tracker,
    check,
)
from hypergrad.curvature import Evaluation
from tests.hypergrad.cells import CELLS, Problem


@pytest.mark.parametrize("estimator", [Online(), Forward(), Forward(curvature=FiniteDifference()), None])
@pytest.mark.parametrize("groups", [1, 2])
def test_confirms_the_estimators(estimator: Estimator | None, groups: int, double: None) -> None:
    problem = Problem(CELLS[7], groups=groups, steps=4)
    model = problem.model()
    optimizer = problem.optimizer(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    result = check(model, optimizer, problem.train_losses, problem.val_loss, ["lr", "betas[0]"], estimator)
    assert result.ok, str(result)
    assert [row.name for row in result.rows][:groups] == (["lr"] if groups == 1 else ["lr, group 0", "lr, group 1"])
    assert "agrees" in str(result)
    assert not optimizer.state
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])


class _Wrong(Estimator):
    """Off by a constant factor."""

    def track(self, optimizer: torch.optim.Optimizer, hyperparameters: Sequence[Any], tensors: Any = None) -> Tracker:
        inner = Online().track(optimizer, hyperparameters)

        class Doubled(Tracker):
            @property
            def params(self) -> Sequence[torch.Tensor]:
                return inner.params

            def before_step(self, loss: Evaluation | None = None) -> None:
                inner.before_step(loss)

            def after_step(self) -> None:
                inner.after_step()

            def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
                found = inner.contract(gradients)
                return replace(found, hypergradients={k: 1.1 * v for k, v in found.hypergradients.items()})

        return Doubled()


def test_finds_a_wrong_derivative(double: None) -> None:
    problem = Problem(CELLS[7], steps=3)
    model = problem.model()
    result = check(model, problem.optimizer(model), problem.train_losses, problem.val_loss, ["lr"], _Wrong())
    assert [row.verdict for row in result.rows] == ["disagrees"]
    assert not result.ok


def test_noise_is_inconclusive() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    train = lambda m: m.weight.sum()
    noise = lambda m: m.weight.sum() * 1e-9 + torch.sin(1e7 * m.weight.detach()).sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert [row.verdict for row in check(model, optimizer, [train], noise, ["lr"]).rows] == ["inconclusive"]


def test_says_what_cannot_be_confirmed() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda m: m.weight.square().sum()
    for estimator in (Forward(decay=0.5), Forward(curvature=None)):
        with pytest.raises(ConfigurationError, match=r"Check Forward\(decay=1\.0\)"):
            check(model, optimizer, [loss], loss, ["lr"], estimator)


def test_a_difference_below_the_last_digit_of_the_loss_says_nothing() -> None:
    # In float32 what eps does is lost in a loss of about 1000: every difference is exactly 0, and agrees with the next.
    weight = torch.nn.Parameter(torch.ones(3))
    module = torch.nn.ParameterList([weight])
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    loss = lambda m: (m[0] - torch.arange(3.0)).square().sum() + 1000.0
    (row,) = check(module, optimizer, [loss] * 3, loss, ["eps"], Forward()).rows
    assert row.difference == 0.0 != row.estimate
    assert row.uncertainty > abs(row.estimate)
    assert row.verdict == "inconclusive"
