"""The derivative of a step along every kind of direction, and along a whole run."""

from __future__ import annotations

import copy

import pytest
import torch

from hypergrad import Online, OptimizerHyperparameter, UnsupportedOptimizerError, hypergradient
from hypergrad.optimizer.rules import ELEMENTWISE, is_linear_in_lr
from hypergrad.optimizer.step import Direction, StateVector, check_optimizer, differentiate_step, step_per_lr
from tests.hypergrad.cells import CELLS, Cell, Problem

_PACKABLE = [c for c in CELLS if c.optimizer in ELEMENTWISE]
# Muon computes in bfloat16 inside, Rprop and the others below have no derivative that a difference could show.
_SMOOTH = [c for c in CELLS if c.optimizer.__name__ not in ("Muon", "Rprop") and c.settings["lr"]]


def _warmed_up(problem: Problem) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = problem.model()
    optimizer = problem.optimizer(model)
    for i, loss in enumerate(problem.train_losses):
        optimizer.zero_grad()
        loss(model).backward()
        if i < problem.steps - 1:
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("cell", _PACKABLE, ids=lambda c: c.name)
@pytest.mark.parametrize("size", [2**20, 5], ids=["packed", "cut"])
def test_one_packed_tensor_gives_what_many_give(cell: Cell, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypergrad.optimizer.packets._ON_CPU", size)
    model, optimizer = _warmed_up(Problem(cell))
    generator = torch.Generator().manual_seed(3)
    params = list(model.parameters())
    direction = Direction(
        hyperparameters={(0, OptimizerHyperparameter("lr")): 1.0},
        params={params[0]: torch.randn(params[0].shape, generator=generator, dtype=torch.float64)},
        grads={p: torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params[1:]},
        state={
            p: {
                k: torch.randn(v.shape, generator=generator, dtype=torch.float64)
                for k, v in optimizer.state[p].items()
                if isinstance(v, torch.Tensor) and v.shape == p.shape
            }
            for p in params[:2]
        },
    )
    packed, apart = (differentiate_step(optimizer, direction, pack=pack) for pack in (None, False))
    for p in params:
        zero = torch.zeros_like(p)
        torch.testing.assert_close(packed.params.get(p, zero), apart.params.get(p, zero), rtol=1e-12, atol=1e-14)
        assert set(packed.state.get(p, {})) >= set(apart.state.get(p, {}))
        for key, value in packed.state.get(p, {}).items():
            other = apart.state.get(p, {}).get(key, torch.zeros_like(value))
            torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_nothing_is_changed(cell: Cell) -> None:
    model, optimizer = _warmed_up(Problem(cell))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    differentiate_step(optimizer, Direction(hyperparameters={(0, OptimizerHyperparameter("lr")): 1.0}))
    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    assert repr(before) == repr(after)
    torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("cell", _SMOOTH, ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_tangents_carried_over_a_run_equal_central_differences(cell: Cell, name: str, double: None) -> None:
    """Z' = d_s Phi Z + d_g Phi H Z + d_lam Phi over the whole run, parameters and optimizer state alike."""
    problem = Problem(cell, steps=6)
    hyperparameter = OptimizerHyperparameter(name)
    model = problem.model()
    optimizer = problem.optimizer(model)
    params = list(model.parameters())
    Z = StateVector()
    for loss in problem.train_losses:
        grads = torch.autograd.grad(loss(model), params, create_graph=True)
        moved = [(g, Z.params[p]) for g, p in zip(grads, params, strict=True) if p in Z.params]
        curvature = [torch.zeros_like(p) for p in params]
        if moved:
            curvature = list(torch.autograd.grad(sum((g * z).sum() for g, z in moved), params))
        for p, g in zip(params, grads, strict=True):
            p.grad = g.detach()
        direction = Direction({(0, hyperparameter): 1.0}, Z.params, dict(zip(params, curvature, strict=True)), Z.state)
        Z = differentiate_step(optimizer, direction)
        optimizer.step()
    gradient = torch.autograd.grad(problem.val_loss(model), params)
    actual = sum((g * Z.params.get(p, torch.zeros_like(p))).sum().item() for g, p in zip(gradient, params, strict=True))

    def loss_at(value: float) -> float:
        model = problem.model()
        optimizer = problem.optimizer(model)
        hyperparameter.write(optimizer.param_groups[0], value)
        for loss in problem.train_losses:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        return problem.val_loss(model).item()

    value = hyperparameter.read(optimizer.param_groups[0])
    h = 1e-4 * (value or 1.0)
    table = [(loss_at(value + h / k) - loss_at(value - h / k)) / (2 * h / k) for k in (1, 2)]
    assert actual == pytest.approx((4 * table[1] - table[0]) / 3, rel=1e-5, abs=1e-9)


def test_refuses_optimizers_that_are_no_map_from_gradient_to_update() -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    for refused, instead in ((torch.optim.LBFGS, "SGD"), (torch.optim.SparseAdam, "sparse=False")):
        with pytest.raises(UnsupportedOptimizerError, match=instead):
            check_optimizer(refused(params))


def test_refuses_a_wrapper_of_another_optimizer() -> None:
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

    with pytest.raises(UnsupportedOptimizerError, match="use SGD itself"):
        check_optimizer(Lookahead(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)))


def test_refuses_sparse_and_complex() -> None:
    direction = Direction(hyperparameters={(0, OptimizerHyperparameter("lr")): 1.0})
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedOptimizerError, match="sparse=False"):
        differentiate_step(torch.optim.SGD(embedding.parameters(), lr=0.1), direction)
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(UnsupportedOptimizerError, match="complex"):
        differentiate_step(torch.optim.SGD([p], lr=0.1), direction)


def test_parameters_with_different_step_counts_are_not_packed_together() -> None:
    late, early = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([late, early], lr=0.1)
    early.grad = torch.ones(3)
    optimizer.step()
    late.grad = torch.full((3,), 0.5)
    direction = Direction(hyperparameters={(0, OptimizerHyperparameter("betas[1]")): 1.0})
    packed, apart = (differentiate_step(optimizer, direction, pack=pack) for pack in (True, False))
    for p in (late, early):
        torch.testing.assert_close(packed.params[p], apart.params[p])


@pytest.mark.parametrize(
    "cell", [c for c in _PACKABLE if "lr" in c.accepted and c.settings["lr"]], ids=lambda c: c.name
)
@pytest.mark.parametrize(("groups", "size"), [(1, 2**20), (2, 2**20), (2, 5)], ids=["one", "two", "cut"])
def test_one_secant_gives_the_derivative_of_rules_that_are_linear_in_lr(
    cell: Cell, groups: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypergrad.optimizer.packets._ON_CPU", size)
    problem = Problem(cell, groups=groups)
    _, optimizer = _warmed_up(problem)
    assert is_linear_in_lr(optimizer)
    lr = OptimizerHyperparameter("lr")
    general = differentiate_step(optimizer, Direction({(i, lr): 1.0 for i in range(groups)})).params
    secant = step_per_lr(optimizer, range(groups))
    assert secant.keys() == general.keys()
    for p in general:
        torch.testing.assert_close(secant[p], general[p], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("cell", [c for c in CELLS if c.optimizer.__name__ != "Muon"], ids=lambda c: c.name)
def test_a_parameter_that_is_a_number_has_the_dtype_of_its_own(cell: Cell) -> None:
    # Hyperparameters are float64 numbers, and so would be what torch computes of them and of a float32 one.
    found = []
    for dtype in (torch.float32, torch.float64):
        params = [torch.nn.Parameter(torch.tensor(v, dtype=dtype)) for v in (0.7, [0.3, -0.2])]
        optimizer = cell.optimizer(params, **cell.settings)
        for gradient in (0.5, -0.4, 0.3):
            for p in params:
                p.grad = torch.full_like(p, gradient)
            optimizer.step()
        result = differentiate_step(optimizer, Direction({(0, OptimizerHyperparameter(cell.accepted[0])): 1.0}))
        assert all(t.shape == p.shape and t.dtype == dtype for p, t in result.params.items())
        found.append([result.params[p].double() for p in params])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("closed_forms", [True, False])
def test_a_parameter_without_elements_changes_nothing(kind: type[torch.optim.Optimizer], closed_forms: bool) -> None:
    def measured(*more: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        weight = torch.nn.Parameter(torch.tensor([0.3, -0.2]))
        module = torch.nn.ParameterList([*more, weight])
        optimizer = kind(module.parameters(), lr=0.1)  # type: ignore[call-arg]
        loss = lambda m: sum((p - 1.0).square().sum() for p in m.parameters())
        return hypergradient(module, optimizer, [loss] * 3, loss, ["lr", "weight_decay"], Online(closed_forms)).grads

    alone = measured()
    for name, value in measured(torch.nn.Parameter(torch.empty(0))).items():
        torch.testing.assert_close(value, alone[name])
