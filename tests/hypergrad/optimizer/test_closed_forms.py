"""Closed forms of whole steps against the general derivative, on every flag, over several steps with state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hypergrad import OptimizerHyperparameter
from hypergrad.optimizer import closed_forms
from hypergrad.optimizer.closed_forms import carried
from hypergrad.optimizer.step import Direction, StateVector, differentiate_step

O = torch.optim
_SGD = ("lr", "weight_decay", "momentum", "dampening")
_ADAM = ("lr", "weight_decay", "betas[0]", "betas[1]", "eps")


def _settings() -> Sequence[tuple[type[torch.optim.Optimizer], dict[str, Any], Sequence[str]]]:
    found: list[tuple[type[torch.optim.Optimizer], dict[str, Any], Sequence[str]]] = []
    for momentum, dampening, nesterov, decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.1), (False, True)
    ):
        if nesterov and (momentum == 0.0 or dampening):
            continue
        flags = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "maximize": maximize}
        names = _SGD if momentum else _SGD[:2]
        found.append((O.SGD, {"lr": 0.1, "weight_decay": decay, **flags}, names))
    for kind, decay, maximize, betas in itertools.product(
        (O.Adam, O.AdamW), (0.0, 0.1), (False, True), ((0.9, 0.99), (0.0, 0.5))
    ):
        flags = {"weight_decay": decay, "maximize": maximize, "betas": betas}
        names = _ADAM if betas[0] else tuple(n for n in _ADAM if n != "betas[0]")
        found.append((kind, {"lr": 0.1, "eps": 1e-3, **flags}, names))
    return found


@pytest.mark.parametrize("case", _settings(), ids=lambda c: f"{c[0].__name__} {c[1]}")
def test_equal_to_the_general_derivative(
    case: tuple[type[torch.optim.Optimizer], dict[str, Any], Sequence[str]],
    monkeypatch: pytest.MonkeyPatch,
    double: None,
) -> None:
    kind, settings, names = case
    general = {"calls": 0}

    def counted(*args: Any) -> StateVector:
        general["calls"] += 1
        return differentiate_step(*args)

    monkeypatch.setattr(closed_forms, "differentiate_step", counted)
    for name in names:
        # One parameter is larger than a piece, one has an element without any gradient, one rests in the first step.
        params = [torch.randn(shape) for shape in ((300, 500), (3,), ())]
        optimizer = kind([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], **settings)
        h, tangents, expected = OptimizerHyperparameter(name), StateVector(), StateVector()
        for step in range(4):
            for p in params:
                p.grad = torch.randn(p.shape)
            params[1].grad[0] = 0.0
            if step == 0:
                params[2].grad = None
            grads = {p: torch.randn(p.shape) for p in params if p.grad is not None and step > 0}
            if step > 0:
                grads[params[1]][0] = 0.0
            rates = {(0, h): 1.0, (1, h): -0.3}
            expected = differentiate_step(optimizer, Direction(rates, expected.params, grads, expected.state))
            tangents = carried(optimizer, Direction(rates, tangents.params, grads, tangents.state))
            assert tangents.params.keys() == expected.params.keys()
            for p, t in expected.params.items():
                torch.testing.assert_close(tangents.params[p], t, rtol=1e-10, atol=1e-13)
                for key, value in expected.state.get(p, {}).items():
                    torch.testing.assert_close(tangents.state[p][key], value, rtol=1e-10, atol=1e-13)
            optimizer.step()
    assert general["calls"] == 0


@pytest.mark.parametrize("kind", [O.SGD, O.Adam])
def test_small_tensors_together_are_as_each_alone(
    kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch, double: None
) -> None:
    # Some have state, some tangents of it (where state was reset, too), some one of their own.
    params = [torch.randn(3), torch.randn(2, 2), torch.randn(()), torch.randn(4), torch.randn(1)]
    optimizer = kind([{"params": params}], lr=0.1, **({"momentum": 0.9} if kind is O.SGD else {"eps": 1e-3}))
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    entries = ["momentum_buffer"] if kind is O.SGD else ["exp_avg", "exp_avg_sq"]
    for p in params[2:4]:
        for key in entries:
            del optimizer.state[p][key]
    of_params = {p: torch.randn(p.shape) for p in params[:4]}
    of_state = {p: {key: torch.randn(p.shape) for key in entries} for p in (params[0], params[3])}
    grads = {p: torch.randn(p.shape) for p in params[1:]}

    def found() -> StateVector:
        state = {p: {key: t.clone() for key, t in entry.items()} for p, entry in of_state.items()}
        own = {p: t.clone() for p, t in of_params.items()}
        return carried(optimizer, Direction({(0, OptimizerHyperparameter("lr")): 1.0}, own, grads, state))

    together = found()
    monkeypatch.setattr(closed_forms, "_SMALL", -1)
    alone = found()
    for p in params:
        torch.testing.assert_close(together.params[p], alone.params[p], rtol=1e-12, atol=0)
        assert together.state[p].keys() == alone.state[p].keys()
        for key, value in alone.state[p].items():
            torch.testing.assert_close(together.state[p][key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: O.Adam(p, lr=0.1, amsgrad=True), "lr"),
        (lambda p: O.Adam(p, lr=torch.tensor(0.1)), "betas[0]"),
        (lambda p: O.RMSprop(p, lr=0.1), "lr"),
        (lambda p: type("Mine", (O.SGD,), {})(p, lr=0.1), "lr"),  # may compute something else
    ],
)
def test_everything_else_takes_the_general_way(
    make: Any, name: str, monkeypatch: pytest.MonkeyPatch, double: None
) -> None:
    general = []
    monkeypatch.setattr(closed_forms, "differentiate_step", lambda *args: general.append(args) or StateVector())
    p = torch.randn(3)
    p.grad = torch.randn(3)
    carried(make([p]), Direction({(0, OptimizerHyperparameter(name)): 1.0}))
    assert len(general) == 1


def test_nothing_but_the_tangents_is_written(double: None) -> None:
    p = torch.randn(40, 3)
    p.grad = torch.randn(40, 3)
    optimizer = O.Adam([p], lr=0.1)
    optimizer.step()
    tangents = StateVector({p: torch.randn(40, 3)}, {p: {"exp_avg": torch.randn(40, 3)}})
    # A Hessian product may be the very tensor that it was asked of: H = 1.
    direction = Direction({(0, OptimizerHyperparameter("lr")): 1.0}, tangents.params, tangents.params, tangents.state)
    before = [t.clone() for t in (p, p.grad, *(s for s in optimizer.state[p].values()))]
    expected = differentiate_step(optimizer, direction)
    found = carried(optimizer, direction)
    for was, now in zip(before, (p, p.grad, *optimizer.state[p].values()), strict=True):
        assert torch.equal(was, now)
    torch.testing.assert_close(found.params[p], expected.params[p], rtol=1e-10, atol=1e-13)
    assert found.params[p] is tangents.params[p]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: O.SGD(p, lr=0.1),
        lambda p: O.SGD(p, lr=0.1, momentum=0.9),
        lambda p: O.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: O.Adam(p, lr=0.1),
        lambda p: O.Adam(p, lr=0.1, betas=(0.0, 0.9)),
    ],
)
@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_hessian_products_that_share_memory_with_tangents(make: Any, crossed: bool, steps: int, double: None) -> None:
    first, second = torch.randn(40, 40), torch.randn(40, 40)
    optimizer = make([first, second])
    for step in range(steps + 1):
        first.grad, second.grad = torch.randn(40, 40), torch.randn(40, 40)
        if step < steps:
            optimizer.step()
    tangents = {first: torch.randn(40, 40), second: torch.randn(40, 40)}
    # H = 1 gives back the tangents themselves; the loss (first * second.T).sum() those of the other, turned.
    products = {first: tangents[second].T, second: tangents[first].T} if crossed else dict(tangents)
    direction = Direction({(0, OptimizerHyperparameter("lr")): 1.0}, tangents, products, {})
    expected = differentiate_step(optimizer, direction)
    found = carried(optimizer, direction)
    for p in (first, second):
        torch.testing.assert_close(found.params[p], expected.params[p], rtol=1e-10, atol=1e-13)
        assert found.state.get(p, {}).keys() == expected.state.get(p, {}).keys()
        for key, value in found.state.get(p, {}).items():
            torch.testing.assert_close(value, expected.state[p][key], rtol=1e-10, atol=1e-13)
