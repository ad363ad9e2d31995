"""What autograd differentiates wrongly a second time is refused by `Exact`; the rest is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, one_hot

from hypergrad import (
    CG,
    Curvature,
    Estimator,
    Exact,
    FiniteDifference,
    Forward,
    Hyperparameter,
    Implicit,
    NotDifferentiableError,
    Online,
    Unrolled,
    hypergradient,
    second_derivatives,
)

TARGETS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
NOISE = torch.randn(8, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
INPUT = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    second_derivatives._passed.clear()


class FusedLoss(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in forward, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        p = z.softmax(-1)
        ctx.save_for_backward((p - one_hot(TARGETS, 3)) / len(TARGETS))
        return -p.gather(1, TARGETS[:, None]).log().mean()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return g * ctx.saved_tensors[0]


class OnceLoss(FusedLoss):
    """The same from what was saved, but marked: autograd drops the graph without a word, for g is a constant."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(z)
        return cross_entropy(z, TARGETS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (z,) = ctx.saved_tensors
        return g * (z.softmax(-1) - one_hot(TARGETS, 3)) / len(TARGETS)


class RightLoss(OnceLoss):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (z,) = ctx.saved_tensors
        return g * (z.softmax(-1) - one_hot(TARGETS, 3)) / len(TARGETS)


class Kernel(torch.autograd.Function):
    """Linear, and blind to the graph of the gradient that it is given, as a kernel is that only sees memory."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        return 2.0 * z

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return 2.0 * g.detach()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return -g


class Units(torch.autograd.Function):
    """A ReLU that keeps its mask: its second derivative is 0 where it has one."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        ctx.mask = (z > 0).to(z)
        return z * ctx.mask

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return g * ctx.mask


def _loss(function: type[torch.autograd.Function]) -> Any:
    def loss(model: nn.Module) -> torch.Tensor:
        z = model(INPUT)
        if function in (FusedLoss, OnceLoss, RightLoss):
            return function.apply(z)
        return cross_entropy(function.apply(z), TARGETS)

    return loss


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _lr(function: type[torch.autograd.Function], estimator: Estimator) -> float:
    model, loss = _model(), _loss(function)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hypergradient(model, optimizer, [loss] * 6, loss, ["lr"], estimator).grads["lr"].item()


def _difference(function: type[torch.autograd.Function]) -> float:
    def ends_at(lr: float) -> float:
        model, loss = _model(), _loss(function)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        for _ in range(6):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        return float(loss(model).item())

    return (ends_at(0.1 + 1e-5) - ends_at(0.1 - 1e-5)) / 2e-5


@pytest.mark.parametrize("estimator", [Forward(), Unrolled()], ids=["forward", "unrolled"])
@pytest.mark.parametrize("function", [FusedLoss, OnceLoss, Kernel])
def test_a_function_that_autograd_cannot_follow_is_refused(
    function: type[torch.autograd.Function], estimator: Estimator
) -> None:
    for _ in range(2):  # once refused, it is not trusted the next time
        with pytest.raises(NotDifferentiableError, match=rf"goes through {function.__name__}.*FiniteDifference\(\)"):
            _lr(function, estimator)


@pytest.mark.parametrize("function", [FusedLoss, OnceLoss, Kernel])
def test_the_way_out_that_it_names_is_right(function: type[torch.autograd.Function]) -> None:
    found = _lr(function, Forward(curvature=FiniteDifference()))
    assert found == pytest.approx(_difference(function), rel=1e-5)


@pytest.mark.parametrize("estimator", [Forward(), Unrolled()], ids=["forward", "unrolled"])
@pytest.mark.parametrize("function", [RightLoss, Units])
def test_a_function_that_it_can_follow_is_differentiated(
    function: type[torch.autograd.Function], estimator: Estimator
) -> None:
    assert _lr(function, estimator) == pytest.approx(_difference(function), rel=1e-6)


def test_fused_weight_norm_is_refused() -> None:
    direction = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    size = nn.Parameter(torch.ones(3, 1, dtype=torch.float64))
    loss = lambda _: cross_entropy(INPUT @ torch._weight_norm(direction, size, 0).T, TARGETS)
    optimizer = torch.optim.SGD([direction, size], lr=0.1)
    with pytest.raises(NotDifferentiableError, match=r"fused weight_norm.*FiniteDifference\(\)"):
        hypergradient(nn.Module(), optimizer, [loss] * 2, loss, ["lr"], Forward())


def own_target(model: nn.Module) -> torch.Tensor:
    """Two views, one of them a target, as in learning without negatives."""
    one, other = model(INPUT), model(INPUT + 0.3 * NOISE)
    return (one - other.detach()).square().mean() + (one.square().mean() - 1).square()


def balanced(model: nn.Module) -> torch.Tensor:
    """Two losses, each divided by its own size."""
    one, other = model(INPUT).square().mean(), (model(NOISE) - 1).square().mean()
    return one / one.detach() + other / other.detach()


def turned_round(model: nn.Module) -> torch.Tensor:
    return cross_entropy(Reversed.apply(model[:2](INPUT)) @ model[2].weight.T, TARGETS)


def honest(model: nn.Module) -> torch.Tensor:
    return cross_entropy(model(INPUT), TARGETS)


@pytest.mark.parametrize("estimator", [Forward(), Unrolled()], ids=["forward", "unrolled"])
@pytest.mark.parametrize("loss", [own_target, balanced, turned_round])
def test_a_gradient_that_is_no_derivative_of_its_loss_is_refused(loss: Any, estimator: Estimator) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(NotDifferentiableError, match=r"not the derivative of its loss.*FiniteDifference\(\)"):
        hypergradient(model, optimizer, [loss] * 3, honest, ["lr"], estimator)


@pytest.mark.parametrize("loss", [own_target, balanced, turned_round])
def test_a_difference_takes_such_a_gradient_as_it_is(loss: Any) -> None:
    def run(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = _model()
        return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def ends_at(lr: float) -> float:
        model, optimizer = run(lr)
        for _ in range(6):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        return float(honest(model).item())

    model, optimizer = run(0.02)
    found = hypergradient(model, optimizer, [loss] * 6, honest, ["lr"], Forward(curvature=FiniteDifference(1e-8)))
    expected = (ends_at(0.02 + 1e-6) - ends_at(0.02 - 1e-6)) / 2e-6
    assert found.grads["lr"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("estimator", [Online(), Unrolled(steps=1), Forward(decay=0.0)], ids=["online", "one", "fades"])
def test_one_step_with_a_hyperparameter_in_such_a_loss_needs_no_hessian(estimator: Estimator) -> None:
    def run(weight: float) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = _model()
        model.register_module("weight", Hyperparameter(torch.tensor(weight, dtype=torch.float64)))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return model, optimizer, lambda m: own_target(m[:3]) + m.weight() * honest(m[:3])

    def ends_at(weight: float) -> float:
        model, optimizer, loss = run(weight)
        loss(model).backward()
        optimizer.step()
        return float(honest(model[:3]).item())

    model, optimizer, loss = run(0.5)
    found = hypergradient(model, optimizer, [loss], lambda m: honest(m[:3]), [model.weight], estimator)
    expected = (ends_at(0.5 + 1e-5) - ends_at(0.5 - 1e-5)) / 2e-5
    assert found.grads["weight"].item() == pytest.approx(expected, rel=1e-7)


def test_a_hook_that_changes_a_gradient_of_a_parameter_is_no_reason() -> None:
    model = _model()
    model[0].weight.register_hook(lambda g: 3.0 * g)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hypergradient(model, optimizer, [honest] * 3, honest, ["lr"], Forward())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "rounded"])
def test_rounding_is_no_reason(kind: str) -> None:
    """Losses of few digits, or that go in steps: whether their gradient is right cannot be seen, and they pass."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.randn(128, 20), torch.randint(0, 10, (128,))

    def loss(m: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "bfloat16"):
            value = cross_entropy(m(x), y)
        return value if kind != "rounded" else value + ((value * 1e3).round() / 1e3 - value).detach()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        hypergradient(model, optimizer, [loss] * 2, loss, ["lr"], Forward())


def test_a_batch_that_is_fitted_is_no_reason() -> None:
    # Of a gradient of 8e-10 a cross entropy in float32 shows nothing: it is exactly 0, and stays so.
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[10.5], [-10.5]]))
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = lambda m: cross_entropy(m(torch.ones(4, 1)), torch.zeros(4, dtype=torch.long))
    value = loss(model)
    value.backward()
    assert value.item() == 0.0 < model.weight.grad.norm().item()
    hypergradient(model, adam, [loss] * 3, loss, ["lr"], Forward())


def test_what_was_moved_is_put_back_and_draws_no_random_number() -> None:
    model, loss = _model(), _loss(RightLoss)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = torch.get_rng_state()
    hypergradient(model, optimizer, [loss] * 2, loss, ["lr"], Forward())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference()], ids=["exact", "difference"])
def test_implicit_differentiation_refuses_it_too(curvature: Curvature) -> None:
    model, val = _model(), _loss(FusedLoss)
    model.register_module("penalty", penalty := Hyperparameter(0.1).double())
    weights = [p for p in model.parameters() if p.requires_grad]
    net = model[:3]
    train = lambda m: val(net) + m.penalty() * sum(p.square().sum() for p in weights)
    optimizer, estimator = torch.optim.SGD(weights, lr=0.1), Implicit(CG(), damping=1.0, curvature=curvature)
    if curvature == Exact():
        with pytest.raises(NotDifferentiableError, match="goes through FusedLoss"):
            hypergradient(model, optimizer, [train], lambda _: val(net), [penalty], estimator)
    else:
        found = hypergradient(model, optimizer, [train], lambda _: val(net), [penalty], estimator)
        assert found.grads["penalty"].item() != 0.0
