"""Clipping as torch does it, and its Jacobian against autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad import ClippedLoss, Clipping, ConfigurationError, NotDifferentiableError

CASES = [Clipping(0.5), Clipping(100.0), Clipping(0.4, "value"), Clipping(100.0, "value")]


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (4,))]


@pytest.mark.parametrize("clipping", CASES, ids=str)
def test_it_is_what_torch_does(clipping: Clipping) -> None:
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients()]
    for p, g in zip(params, gradients(), strict=True):
        p.grad = g
    if clipping.by == "norm":
        torch.nn.utils.clip_grad_norm_(params, clipping.limit)
    else:
        torch.nn.utils.clip_grad_value_(params, clipping.limit)
    for p, ours in zip(params, clipping.applied(gradients()), strict=True):
        torch.testing.assert_close(p.grad, ours, rtol=1e-15, atol=0)


@pytest.mark.parametrize("clipping", CASES, ids=str)
def test_the_jacobian_is_autograds_and_symmetric(clipping: Clipping) -> None:
    given = gradients()
    sizes = [g.numel() for g in given]

    def flat(vector: torch.Tensor) -> torch.Tensor:
        parts = [part.view_as(g) for part, g in zip(vector.split(sizes), given, strict=True)]
        if clipping.by == "value":
            return torch.cat([p.clamp(-clipping.limit, clipping.limit).reshape(-1) for p in parts])
        total = torch.cat([p.reshape(-1) for p in parts]).norm()
        return vector * (clipping.limit / (total + 1e-6)).clamp(max=1.0)

    expected = torch.autograd.functional.jacobian(flat, torch.cat([g.reshape(-1) for g in given]))
    along = clipping.jacobian(given)
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        parts = [part.view_as(g) for part, g in zip(unit.split(sizes), given, strict=True)]
        columns.append(torch.cat([row.reshape(-1) for row in along(parts) if row is not None]))
    found = torch.stack(columns, 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, found.T, rtol=1e-12, atol=1e-14)


def test_a_gradient_moves_with_the_norm_of_the_others() -> None:
    given = gradients()
    (first, second) = Clipping(0.5).jacobian(given)([torch.ones_like(given[0]), None])
    assert first is not None
    assert second is not None
    assert bool(second.any())
    assert Clipping(0.5, "value").jacobian(given)([torch.ones_like(given[0]), None])[1] is None
    assert Clipping(0.5).jacobian([given[0], None])([None, None])[1] is None


def test_a_loss_whose_gradient_is_another_one_is_found_out() -> None:
    x = torch.ones(3, dtype=torch.float64)
    loss = ClippedLoss(lambda: x.square().sum(), Clipping(1.0))
    raw, _ = loss.gradients([x], Clipping(1.0).applied([2 * x]))
    torch.testing.assert_close(raw[0], 2 * x)
    assert not x.requires_grad
    with pytest.raises(NotDifferentiableError, match="another gradient"):
        loss.gradients([x], [2 * x])


@pytest.mark.parametrize("settings", [{"limit": 0.0}, {"limit": float("nan")}, {"limit": 1.0, "by": "size"}])
def test_mistakes(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"limit|by"):
        Clipping(**settings)
