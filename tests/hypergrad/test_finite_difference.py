"""Differences of gradients against exact products: in networks with kinks, and where gradients are zero or noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hypergrad import Exact, FiniteDifference, Forward, NotDifferentiableError, hypergradient


def _network(kind: str, dtype: torch.dtype) -> tuple[nn.Module, list[Callable[[nn.Module], torch.Tensor]]]:
    torch.manual_seed(0)
    if kind == "perceptron":
        model, shape = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()), (16,)
    else:
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2), nn.Flatten())
        shape = (1, 13, 13)
    model.append(nn.Linear(64 if kind == "perceptron" else 200, 5)).to(dtype)
    batches = [(torch.randn(64, *shape, dtype=dtype), torch.randint(0, 5, (64,))) for _ in range(11)]
    return model, [lambda m, x=x, y=y: F.cross_entropy(m(x), y) for x, y in batches]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.float64, 1e-5)], ids=str)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("kind", ["perceptron", "convolutional"])
def test_a_difference_is_right_in_networks_with_kinks(
    kind: str, optimizer: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, losses = _network(kind, dtype)
    settings = {"lr": 0.05, "momentum": 0.9} if optimizer == "SGD" else {"lr": 3e-3}
    stepping = getattr(torch.optim, optimizer)(model.parameters(), **settings)
    expected, found = (
        hypergradient(model, stepping, losses[:-1], losses[-1], ["lr"], Forward(curvature=c)).grads["lr"].item()
        for c in (Exact(), FiniteDifference())
    )
    assert found == pytest.approx(expected, rel=tolerance)


def test_a_gradient_of_zero_may_change() -> None:
    # The last layer begins at zero: so do the gradients of the first, and not their derivatives.
    model, losses = _network("perceptron", torch.float64)
    model[1] = nn.LeakyReLU(0.1)  # whose slope is a number that float32 does not have
    nn.init.zeros_(model[-1].weight)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected, found = (
        hypergradient(model, sgd, losses[:4], losses[-1], ["lr"], Forward(curvature=c)).grads["lr"].item()
        for c in (Exact(), FiniteDifference())
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_raises_near_by_leaves_parameters_as_they_were() -> None:
    model, losses = _network("perceptron", torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def fails(m: nn.Module) -> torch.Tensor:
        calls.append(m)
        if len(calls) == 2:
            raise NotDifferentiableError("in the middle of an extra evaluation")
        return losses[0](m)

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NotDifferentiableError, match="in the middle"):
        hypergradient(model, sgd, [losses[0], fails], losses[1], ["lr"], Forward(curvature=FiniteDifference()))
    for p, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, then)


def _compared(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: Sequence[Callable[[Any], torch.Tensor]]
) -> tuple[float, float]:
    exact, difference = (
        hypergradient(model, optimizer, losses[:-1], losses[-1], ["lr"], Forward(curvature=c)).grads["lr"].item()
        for c in (Exact(), FiniteDifference())
    )
    return exact, difference


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_a_bias_whose_gradient_is_but_rounding_stays_out(kind: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(32) if kind == "batch" else nn.MultiheadAttention(16, 2, batch_first=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.out = nn.Linear(16, 32 if kind == "batch" else 16), norm, nn.Linear(32, 5)
            self.out = nn.Linear(32 if kind == "batch" else 16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner(x)
            if kind == "batch":
                return self.out(self.norm(h).tanh())
            h = h.view(8, 8, 16)  # the bias of a key adds the same to all that the softmax sees
            return self.out(self.norm(h, h, h, need_weights=False)[0].reshape(64, 16))

    model = Model()
    batches = [(torch.randn(64, 16), torch.randint(0, 5, (64,))) for _ in range(16)]
    losses = [lambda m, x=x, y=y: F.cross_entropy(m(x), y) for x, y in batches]
    exact, difference = _compared(model, torch.optim.Adam(model.parameters(), lr=3e-3), losses)
    assert difference == pytest.approx(exact, rel=1e-2)


def test_a_part_in_float32_makes_the_steps_of_a_double_network_longer() -> None:
    model, losses = _network("perceptron", torch.float64)
    losses = [lambda m, loss=loss: loss(lambda x: m(x).float()) for loss in losses]
    exact, difference = _compared(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), losses)
    assert difference == pytest.approx(exact, rel=1e-2)


def test_routing_that_changes_is_let_go() -> None:
    torch.manual_seed(0)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
            self.out = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gates = self.router(x).softmax(-1)
            parts = x.new_zeros(len(x), 16)
            for i, expert in enumerate(self.experts):
                mine = gates.argmax(-1) == i
                parts = parts.masked_scatter(mine[:, None], gates[mine, i, None] * F.relu(expert(x[mine])))
            return self.out(parts)

    model = Routed()
    batches = [(torch.randn(256, 8), torch.randint(0, 3, (256,))) for _ in range(9)]
    losses = [lambda m, x=x, y=y: F.cross_entropy(m(x), y) for x, y in batches]
    exact, difference = _compared(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), losses)
    assert math.isfinite(exact)
    assert math.isfinite(difference)  # it jumps, which no difference survives; but it runs


def test_a_minimum_has_its_curvature() -> None:
    torch.manual_seed(0)
    x, y = 0.05 * torch.randn(200, 8, dtype=torch.float64), torch.randint(0, 2, (200,)).double()
    w, c = torch.zeros(8, dtype=torch.float64, requires_grad=True), torch.ones((), dtype=torch.float64)
    c.requires_grad_()

    def loss() -> torch.Tensor:
        return c * F.binary_cross_entropy_with_logits(x @ w, y)

    newton = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        newton.zero_grad()
        value = loss()
        value.backward()
        return value

    newton.step(closure)
    # In float32 what is left of the gradient is of the size of rounding.
    x, y = x.float(), y.float()
    w, c = w.detach().float().requires_grad_(), torch.ones((), requires_grad=True)
    v = [torch.ones(8), None]
    with Exact().at_minimum(loss, [w, c], [None, None]) as product:
        expected = product(v)[0]
    with FiniteDifference().at_minimum(loss, [w, c], [None, None]) as product:
        found = product(v)[0]
    assert float((found - expected).norm() / expected.norm()) < 0.02
