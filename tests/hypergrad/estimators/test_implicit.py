"""Implicit against closed forms: ridge regression, whose minimum and its derivative are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hypergrad import (
    CG,
    ConfigurationError,
    Curvature,
    Exact,
    FiniteDifference,
    Forward,
    Hyperparameter,
    HyperparameterError,
    Implicit,
    Neumann,
    NotDifferentiableError,
    Nystrom,
    Solver,
    Unrolled,
    hypergradient,
)

SOLVERS = [CG(iterations=100, tolerance=1e-13), Neumann(terms=3000), Nystrom(rank=100)]


class Ridge(nn.Module):
    """L_train = |X w - y|^2 / 2n + sum(lam * w^2) / 2, with one lam for all or one per feature."""

    def __init__(self, lam: torch.Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        self.linear = nn.Linear(6, 1, bias=False)
        self.lam = Hyperparameter(lam)
        truth = draw(6)
        x, self.val_x = draw(20, 6), draw(15, 6)
        self.y, self.val_y = x @ truth + draw(20), self.val_x @ truth + draw(15)
        self.x = x

    def solution(self, lam: torch.Tensor) -> torch.Tensor:
        hessian = self.x.T @ self.x / 20 + torch.diag(lam.expand(6))
        return torch.linalg.solve(hessian, self.x.T @ self.y / 20)

    def outer(self, lam: torch.Tensor) -> torch.Tensor:
        return (self.val_x @ self.solution(lam) - self.val_y).square().mean() / 2

    def train_loss(self) -> torch.Tensor:
        w = self.linear.weight[0]
        return (self.x @ w - self.y).square().mean() / 2 + (self.lam() * w.square()).sum() / 2

    def val_loss(self) -> torch.Tensor:
        return (self.val_x @ self.linear.weight[0] - self.val_y).square().mean() / 2


def _at_minimum(lam: torch.Tensor) -> tuple[Ridge, torch.optim.Optimizer]:
    model = Ridge(lam)
    with torch.no_grad():
        model.linear.weight.copy_(model.solution(lam))
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def _exact(model: Ridge) -> torch.Tensor:
    lam = model.lam.value.clone().requires_grad_()
    return torch.autograd.grad(model.outer(lam), lam)[0]


@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference()], ids=["exact", "difference"])
@pytest.mark.parametrize("solver", SOLVERS[:2], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.full((6,), 0.3)], ids=["one", "per feature"])
def test_ridge_regression(lam: torch.Tensor, solver: Solver, curvature: Curvature, double: None) -> None:
    model, sgd = _at_minimum(lam.double())
    result = hypergradient(
        model, sgd, [Ridge.train_loss], Ridge.val_loss, [model.lam], Implicit(solver, curvature=curvature)
    )
    tolerance = 1e-8 if isinstance(curvature, Exact) else 1e-5
    torch.testing.assert_close(result.grads["lam"], _exact(model), rtol=tolerance, atol=tolerance * 1e-3)
    if isinstance(curvature, Exact):
        assert result.residual is not None
        assert result.residual < 1e-8
    assert result.status == "ok" or isinstance(curvature, FiniteDifference)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_damping_is_that_of_a_damped_closed_form(solver: Solver, double: None) -> None:
    model, sgd = _at_minimum(torch.full((6,), 0.3))
    result = hypergradient(model, sgd, [Ridge.train_loss], Ridge.val_loss, [model.lam], Implicit(solver, damping=0.05))
    w = model.linear.weight[0].detach()
    hessian = model.x.T @ model.x / 20 + torch.diag(model.lam.value) + 0.05 * torch.eye(6)
    gradient = model.val_x.T @ (model.val_x @ w - model.val_y) / 15
    expected = -w * torch.linalg.solve(hessian, gradient)  # d2L/dw dlam is diag(w)
    torch.testing.assert_close(result.grads["lam"], expected, rtol=1e-8, atol=1e-11)
    assert result.status == "ok"


def test_the_best_ridge_penalty_is_found(double: None) -> None:
    lam = torch.tensor(0.3)
    for _ in range(60):  # Newton on log lam would do; plain descent shows that the sign and size are right
        model, sgd = _at_minimum(lam)
        h = hypergradient(model, sgd, [Ridge.train_loss], Ridge.val_loss, [model.lam], Implicit(SOLVERS[0])).grads[
            "lam"
        ]
        lam = (lam.log() - 10.0 * h * lam).exp()
    grid = torch.logspace(-4, 2, 2001)
    best = grid[torch.stack([model.outer(g) for g in grid]).argmin()]
    assert lam.item() == pytest.approx(best.item(), rel=0.01)


@pytest.mark.parametrize("estimator", [Forward(), Unrolled()], ids=["Forward", "Unrolled"])
def test_forward_and_unrolled_reach_it_at_convergence(estimator: Forward | Unrolled, double: None) -> None:
    model = Ridge(torch.tensor(0.3))
    nn.init.zeros_(model.linear.weight)
    sgd = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.5)
    result = hypergradient(model, sgd, [Ridge.train_loss] * 150, Ridge.val_loss, [model.lam], estimator)
    assert result.grads["lam"].item() == pytest.approx(_exact(model).item(), rel=1e-4)


def test_the_hessian_of_several_batches_is_that_of_their_mean(double: None) -> None:
    model, sgd = _at_minimum(torch.full((6,), 0.3))
    halves = [
        lambda m, rows=rows: (
            (m.x[rows] @ m.linear.weight[0] - m.y[rows]).square().mean() / 2
            + (m.lam() * m.linear.weight[0].square()).sum() / 2
        )
        for rows in (slice(0, 10), slice(10, 20))
    ]
    result = hypergradient(model, sgd, halves, Ridge.val_loss, [model.lam], Implicit(SOLVERS[0], batches=2))
    torch.testing.assert_close(result.grads["lam"], _exact(model), rtol=1e-8, atol=1e-11)


def test_the_direct_term_counts(double: None) -> None:
    model, sgd = _at_minimum(torch.tensor(0.3))
    loss = lambda m: m.val_loss() + 5.0 * m.lam()
    result = hypergradient(model, sgd, [Ridge.train_loss], loss, [model.lam], Implicit(SOLVERS[0]))
    assert result.grads["lam"].item() == pytest.approx(_exact(model).item() + 5.0, rel=1e-9)


def _saddle(m: Ridge) -> torch.Tensor:
    signs = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    return (signs * m.linear.weight[0].square()).sum() / 2 + (m.lam() * m.linear.weight[0]).sum()


def test_indefinite_curvature_is_reported(double: None) -> None:
    model = Ridge(torch.full((6,), 0.3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    result = hypergradient(model, sgd, [_saddle], Ridge.val_loss, [model.lam], Implicit(CG()))
    assert "negative curvature" in result.status
    assert "raise `damping`" in result.status
    assert result.grads["lam"].isfinite().all()
    series = hypergradient(model, sgd, [_saddle], Ridge.val_loss, [model.lam], Implicit(Neumann(terms=100)))
    assert "diverges" in series.status
    damped = hypergradient(model, sgd, [_saddle], Ridge.val_loss, [model.lam], Implicit(CG(), damping=1.5))
    assert damped.status == "ok"


def test_a_scale_that_is_too_large_is_reported(double: None) -> None:
    model, sgd = _at_minimum(torch.full((6,), 0.3))
    result = hypergradient(
        model, sgd, [Ridge.train_loss], Ridge.val_loss, [model.lam], Implicit(Neumann(terms=200, scale=5.0))
    )
    assert "must be below 2 / the largest eigenvalue" in result.status


def test_what_it_cannot_serve_is_refused(double: None) -> None:
    model, sgd = _at_minimum(torch.tensor(0.3))
    run = lambda names, estimator: hypergradient(model, sgd, [Ridge.train_loss], Ridge.val_loss, names, estimator)
    with pytest.raises(HyperparameterError, match=r"cannot serve lr.*Forward\(\)"):
        run(["lr", model.lam], Implicit())
    with pytest.raises(HyperparameterError):
        run(["lr"], Implicit())
    with pytest.raises(ConfigurationError, match="positive damping"):
        run([model.lam], Implicit(Nystrom()))
    for bad in ({"damping": -1.0}, {"batches": 0}, {"solver": "cg"}, {"curvature": None}):
        with pytest.raises(ConfigurationError):
            Implicit(**bad)  # type: ignore[arg-type]
    for make in (lambda: CG(iterations=0), lambda: Neumann(terms=0), lambda: Neumann(scale=-1.0), lambda: Nystrom(0)):
        with pytest.raises(ConfigurationError):
            make()
    with pytest.raises(NotDifferentiableError):
        hypergradient(model, sgd, [lambda m: m.train_loss().detach()], Ridge.val_loss, [model.lam], Implicit())


def test_a_gradient_of_exactly_0_is_no_dead_unit(double: None) -> None:
    model, sgd = _at_minimum(torch.full((6,), 0.25))
    target = model.linear.weight.detach().clone()
    # Least at target - (sum(lam) - 1.5) / 2, where no digit of the gradient is left.
    loss = lambda m: (m.linear.weight - target).square().sum() + (m.lam().sum() - 1.5) * m.linear.weight.sum()
    curvature = FiniteDifference()
    result = hypergradient(
        model, sgd, [loss], lambda m: m.linear.weight.sum(), [model.lam], Implicit(CG(), curvature=curvature)
    )
    torch.testing.assert_close(result.grads["lam"], torch.full((6,), -3.0), rtol=1e-5, atol=0)
