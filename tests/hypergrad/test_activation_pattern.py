"""A gradient nearby, taken on the pieces of another point, differs from the gradient there by the Hessian alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hypergrad import ActivationPattern, Exact, FiniteDifference, Forward, NotDifferentiableError, hypergradient

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SHORT = 1e-5

# Of x and of a second tensor, a weight or another x.
FUNCTIONS: dict[str, Function] = {
    "relu": lambda x, w: F.relu(x * w),
    "relu in place": lambda x, w: F.relu_(x * w),
    "leaky_relu": lambda x, w: F.leaky_relu(x, 0.2) * w,
    "leaky_relu in place": lambda x, w: F.leaky_relu_(x * w, 0.2),
    "relu6": lambda x, w: F.relu6(x) * w,
    "hardtanh": lambda x, w: F.hardtanh(x) * w,
    "hardtanh in place": lambda x, w: F.hardtanh_(x * 1) * w,
    "hardswish": lambda x, w: F.hardswish(x) * w,
    "threshold": lambda x, w: F.threshold(x, 0.5, 0.5) * w,
    "softshrink": lambda x, w: F.softshrink(x, 0.5) * w,
    "elu": lambda x, w: F.elu(x, alpha=0.3) * w,
    "selu": lambda x, w: F.selu(x) * w,
    "prelu": lambda x, w: F.prelu(x, w.flatten()[:3] / 4),
    "prelu of one number": lambda x, w: F.prelu(x, w.flatten()[:1] / 4),
    "abs": lambda x, w: x.abs() * w,
    "l1_loss": lambda x, w: F.l1_loss(x, torch.zeros_like(x), reduction="none") * w,
    "clamp": lambda x, w: x.clamp(-0.5, 1.0) * w,
    "clamp from below": lambda x, w: x.clamp(min=0.0) * w,
    "clamp_min": lambda x, w: torch.clamp_min(x, 0.0) * w,
    "clamp_max": lambda x, w: torch.clamp_max(x, 0.5) * w,
    "max_pool1d": lambda x, w: F.max_pool1d((x * w).flatten(1, 2), 3, 2),
    "max_pool2d": lambda x, w: F.max_pool2d(x, 2) * w[..., ::2, ::2],
    "max_pool2d, windows overlap": lambda x, w: F.max_pool2d(x * w, 3, 2, padding=1),
    "max_pool2d without batch": lambda x, w: F.max_pool2d((x * w).flatten(0, 1), 3, 1),
    "max_pool2d, channels last": lambda x, w: F.max_pool2d((x * w).to(memory_format=torch.channels_last), 3, 2),
    "max_pool3d": lambda x, w: F.max_pool3d((x * w).unsqueeze(1), 2, 1),
    "adaptive_max_pool1d": lambda x, w: F.adaptive_max_pool1d((x * w).flatten(1, 2), 5),
    "adaptive_max_pool2d": lambda x, w: F.adaptive_max_pool2d(x * w, 3),
    "adaptive_max_pool3d": lambda x, w: F.adaptive_max_pool3d((x * w).unsqueeze(1), 2),
    "max along a dimension": lambda x, w: (x * w).max(1)[0],
    "max along the last": lambda x, w: (x * w).max(-1)[0],
    "max, dimension kept": lambda x, w: (x * w).max(-2, keepdim=True)[0],
    "min along a dimension": lambda x, w: (x * w).min(2)[0],
    "amax": lambda x, w: (x * w).amax((1, -1)),
    "amin, dimension kept": lambda x, w: (x * w).amin(-1, keepdim=True),
    "topk": lambda x, w: (x * w).topk(3, dim=-1)[0],
    "sort": lambda x, w: (x * w).sort(dim=2)[0] * w,
    "median": lambda x, w: (x * w).median(-1)[0],
    "kthvalue": lambda x, w: (x * w).kthvalue(2, 1)[0],
    "cummax": lambda x, w: (x * w).cummax(-1)[0] * w,
    "maximum": lambda x, w: torch.maximum(x, _close_to(x) * w),
    "minimum of broadcast": lambda x, w: torch.minimum(x * w, w[0, 0]),
    "where": lambda x, w: torch.where(x > 0, x * w, 0.1 * x),
}


def _close_to(x: torch.Tensor) -> torch.Tensor:
    return x.detach().roll(1, -1)


def _problem() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two tensors full of values near ties and kinks, and a direction that leads about one in fifty past them."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(16, 3, 16, 16, dtype=torch.float64, generator=generator)

    x = (2 * normal(2.0)).round() / 2 + normal(30.0 * SHORT)
    w = 1.0 + normal(30.0 * SHORT)
    return [x.requires_grad_(), w.requires_grad_()], [normal(1.0), normal(1.0)]


def _loss(function: Function, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    found = function(inputs[0], inputs[1])
    weights = torch.linspace(0.5, 2.0, found.numel(), dtype=found.dtype).view(found.shape)
    return (weights * found.sin()).sum() + 0.1 * (inputs[0] * inputs[1]).cos().sum()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_the_difference_of_gradients_is_the_hessian_where_elements_switch(name: str) -> None:
    inputs, direction = _problem()

    def gradient(pattern: ActivationPattern | None) -> list[torch.Tensor]:
        value = _loss(FUNCTIONS[name], there)
        assert pattern is None or pattern.hold(value)
        return list(torch.autograd.grad(value, there))

    loss = _loss(FUNCTIONS[name], inputs)
    pattern = ActivationPattern(loss)
    assert pattern.is_whole
    here = torch.autograd.grad(loss, inputs, create_graph=True)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(here, inputs, direction)])
    there = [(x + SHORT * v).detach().requires_grad_() for x, v in zip(inputs, direction, strict=True)]
    off = {}
    for held in (pattern, ActivationPattern.restored(pattern.state_dict(), torch.device("cpu")), None):
        pairs = zip(gradient(held), here, strict=True)
        found = torch.cat([(a - b).flatten() / SHORT for a, b in pairs])
        off[held is not None] = float((found - expected).norm() / expected.norm())
    # The values of those that have switched are their own: a part as small as these are few.
    assert off[True] < 0.3
    assert off[False] > 30.0 * off[True]  # with pieces of its own


def test_hardsigmoid_which_has_no_second_derivative() -> None:
    x, v = (t[0].detach() for t in _problem())
    here, there = x.requires_grad_(), (x + SHORT * v).detach().requires_grad_()
    pattern = ActivationPattern(F.hardsigmoid(here).sum())
    held = F.hardsigmoid(there).sum()
    assert pattern.hold(held)
    (expected,) = torch.autograd.grad(F.hardsigmoid(here).sum(), here)
    (own,) = torch.autograd.grad(F.hardsigmoid(there).sum(), there)
    torch.testing.assert_close(torch.autograd.grad(held, there)[0], expected)  # it is linear on every piece
    assert not torch.allclose(own, expected)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


def _autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(x.flatten(0, -2) @ torch.ones(8, 1, dtype=x.dtype)).to(x.dtype)


@pytest.mark.parametrize(
    "hidden",
    [lambda x: _Doubled.apply(F.relu(x)), lambda x: checkpoint(F.relu, x, use_reentrant=True), _autocast],
    ids=["Function", "reentrant checkpoint", "autocast"],
)
def test_it_is_known_that_a_part_was_not_seen(hidden: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    assert ActivationPattern(F.relu(x).sum()).is_whole
    assert not ActivationPattern(hidden(x).sum()).is_whole


def test_products_in_less_than_full_precision_are_no_whole() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not ActivationPattern(F.relu(x).sum()).is_whole
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_checkpointed_part_is_not_run_again() -> None:
    calls = []

    def part(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return F.relu(x) * x

    x = torch.randn(5, requires_grad=True)
    loss = checkpoint(part, x, use_reentrant=False).sum()
    pattern = ActivationPattern(loss)
    assert not pattern.is_whole
    assert len(calls) == 1
    again = checkpoint(part, x, use_reentrant=False).sum()
    assert pattern.hold(again)  # of nothing
    torch.testing.assert_close(torch.autograd.grad(again, x)[0], (2 * x * (x > 0)).detach())


def test_nothing_is_held_in_another_graph() -> None:
    x = torch.randn(5, requires_grad=True)
    pattern = ActivationPattern(F.relu(x).sum())
    for other in (x.abs(), F.relu(F.relu(x)), x):
        assert not pattern.hold(other.sum())


def test_hooks_of_modules_hide_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model[1].register_full_backward_hook(lambda *_: None)
    assert ActivationPattern(model(torch.randn(2, 3)).sum()).is_whole


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


def test_a_pattern_that_is_kept_takes_a_byte_per_element() -> None:
    x = torch.randn(1000, requires_grad=True)
    pattern = ActivationPattern((F.leaky_relu(F.relu(x), 0.1) * x).sum())
    pattern.shrink()
    held = {kind: tensors[0] for kind, tensors, _ in pattern.state_dict()["pieces"]}
    assert {kind: t.dtype for kind, t in held.items()} == {
        "ReluBackward0": torch.bool,
        "LeakyReluBackward0": torch.float32,  # its slopes
    }
    assert torch.equal(held["ReluBackward0"], x > 0)
