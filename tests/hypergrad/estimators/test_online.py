"""Online against float64 central differences, on every cell of the matrix."""

from __future__ import annotations

import pytest
import torch

from hypergrad import HypergradError, NotDifferentiableError, Online, OptimizerHyperparameter, hypergradient, resolve
from hypergrad.hyperparameter import available
from tests.hypergrad.cells import ACCEPTED, CELLS, REFUSED, Cell, Problem, ids


@pytest.mark.parametrize(("cell", "name"), ACCEPTED, ids=ids(ACCEPTED))
def test_equals_central_differences(cell: Cell, name: str) -> None:
    problem = Problem(cell)
    model = problem.model()
    result = hypergradient(model, problem.optimizer(model), problem.train_losses, problem.val_loss, [name])
    expected = problem.last_step_difference(name)
    assert result.grads[name].shape == ()
    assert result.grads[name].item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert expected != 0.0


@pytest.mark.parametrize(("cell", "name"), REFUSED, ids=ids(REFUSED))
def test_refuses_what_it_cannot_get_right(cell: Cell, name: str) -> None:
    problem = Problem(cell)
    model = problem.model()
    optimizer = problem.optimizer(model)
    with pytest.raises(cell.refused[name], match="Leave"):
        Online().track(optimizer, resolve(optimizer, [name]))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_no_cell_is_left_out(cell: Cell) -> None:
    optimizer = Problem(cell).optimizer(Problem(cell).model())
    if cell.settings["lr"] > 0.0:
        assert set(available(optimizer.param_groups[0])) == {*cell.accepted, *cell.refused}


@pytest.mark.parametrize(("cell", "name"), ACCEPTED, ids=ids(ACCEPTED))
def test_closed_forms_equal_the_general_derivative(cell: Cell, name: str) -> None:
    problem = Problem(cell)
    model = problem.model()
    results = [
        hypergradient(
            model, problem.optimizer(model), problem.train_losses, problem.val_loss, [name], Online(closed_forms=closed)
        )
        for closed in (True, False)
    ]
    torch.testing.assert_close(results[0].grads, results[1].grads, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(results[0].cosines, results[1].cosines, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("cell", [c for c in CELLS if "lr" in c.accepted and c.settings["lr"]], ids=lambda c: c.name)
def test_each_param_group_has_its_own_hypergradient(cell: Cell) -> None:
    problem = Problem(cell, groups=2)
    model = problem.model()
    result = hypergradient(model, problem.optimizer(model), problem.train_losses, problem.val_loss, ["lr"])
    expected = torch.tensor([problem.last_step_difference("lr", group) for group in range(2)])
    torch.testing.assert_close(result.grads["lr"], expected.double(), rtol=1e-6, atol=1e-12)


def test_closed_forms_in_float32_agree_from_the_smallest_lr_that_uses_them() -> None:
    for lr in (1.3e-4, 1e-2):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        x = torch.randn(32, 64)
        loss = lambda m: m(x).square().mean()
        grads = [
            hypergradient(model, torch.optim.AdamW(model.parameters(), lr=lr), [loss], loss, ["lr"], Online(closed))
            .grads["lr"]
            .item()
            for closed in (True, False)
        ]
        assert grads[0] == pytest.approx(grads[1], rel=1e-3)


def test_below_that_lr_the_general_derivative_is_used() -> None:
    # At lr = 1e-9 a step in float32 mostly rounds to nothing: (theta' - theta) / lr would be 0 or garbage.
    model = torch.nn.Linear(64, 64)
    x = torch.randn(32, 64)
    loss = lambda m: m(x).square().mean()
    single = hypergradient(model, torch.optim.AdamW(model.parameters(), lr=1e-9), [loss], loss, ["lr"]).grads["lr"]
    model.double()
    x = x.double()
    exact = hypergradient(model, torch.optim.AdamW(model.parameters(), lr=1e-9), [loss], loss, ["lr"]).grads["lr"]
    assert single.item() == pytest.approx(exact.item(), rel=1e-4)


def test_small_gradients_in_float32_lose_no_digits() -> None:
    # SGD's step is lr times the gradient: 1e-9 here, far below what theta' - theta can show.
    for scale in (1e-3, 1e-6):
        model = torch.nn.Linear(64, 64)
        loss = lambda m, x: scale * m(x).square().mean()
        results = []
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            one = lambda m, x=x: loss(m, x)
            results.append(hypergradient(model, optimizer, [one], one, ["lr"]))
        assert results[0].grads["lr"].item() == pytest.approx(results[1].grads["lr"].item(), rel=1e-4)


def test_groups_without_parameters_and_models_without_gradients(double: None) -> None:
    model = torch.nn.Linear(2, 1)
    loss = lambda m: m(torch.ones(1, 2)).square().sum()
    optimizer = torch.optim.SGD([{"params": []}, {"params": model.parameters()}], lr=0.1)
    result = hypergradient(model, optimizer, [loss], loss, ["lr"])
    assert result.grads["lr"][0] == 0.0 != result.grads["lr"][1]
    foreign = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(NotDifferentiableError, match="hold the parameters of this model"):
        hypergradient(model, foreign, [loss], loss, ["lr"])


def test_half_precision_parameters() -> None:
    model = torch.nn.Linear(64, 64)
    x = torch.randn(32, 64)
    exact = hypergradient(
        model.double(), torch.optim.AdamW(model.parameters()), [_square(x.double())], _square(x.double()), ["lr"]
    )
    model.bfloat16()
    half = hypergradient(
        model, torch.optim.AdamW(model.parameters()), [_square(x.bfloat16())], _square(x.bfloat16()), ["lr"]
    )
    assert half.grads["lr"].item() == pytest.approx(exact.grads["lr"].item(), rel=0.05)


def test_a_scalar_parameter_and_one_without_a_gradient(double: None) -> None:
    scale, unused = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.ones(3))
    model = torch.nn.ParameterList([scale, unused])
    loss = lambda m: (m[0] - 2.0).square()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = hypergradient(model, optimizer, [loss], loss, ["lr"])
    # theta' = theta - lr * 2 (theta - 2) = 0.8;  dL/dlr = 2 (theta' - 2) * -2 (theta - 2) = -7.2
    assert result.grads["lr"].item() == pytest.approx(-7.2, rel=1e-12)


def test_a_group_that_did_not_move_has_zeros(double: None) -> None:
    used, idle = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    model = torch.nn.ModuleList([used, idle])
    optimizer = torch.optim.Adam([{"params": idle.parameters()}, {"params": used.parameters()}], lr=0.1)
    loss = lambda m: m[0](torch.ones(1, 2)).square().sum()
    result = hypergradient(model, optimizer, [loss], loss, ["lr", "weight_decay"])
    assert result.grads["lr"][0] == 0.0
    assert result.grads["lr"][1] != 0.0
    assert torch.isfinite(result.cosines["weight_decay"]).all()


def test_contract_before_any_step_says_what_to_do() -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    tracker = Online().track(optimizer, [OptimizerHyperparameter("lr")])
    with pytest.raises(HypergradError, match="before_step"):
        tracker.contract({})


def _square(x: torch.Tensor):  # type: ignore[no-untyped-def]
    return lambda model: model(x).float().square().mean()
