"""Coordinates: the inverse undoes the map, slopes are derivatives, and tensors get what numbers get."""

from __future__ import annotations

import pytest
import torch

from hypergrad import Identity, Log, Logit, Softplus, Transform

DOMAINS: list[tuple[Transform, list[float]]] = [
    (Log(), [1e-8, 0.3, 7.0]),
    (Logit(), [1e-6, 0.3, 0.999]),
    (Softplus(), [1e-8, 0.3, 50.0]),
    (Identity(), [-3.0, 0.0, 7.0]),
]


@pytest.mark.parametrize(("transform", "values"), DOMAINS, ids=lambda x: type(x).__name__)
def test_numbers_and_tensors(transform: Transform, values: list[float], double: None) -> None:
    x = torch.tensor(values)
    u = transform.forward(x)
    torch.testing.assert_close(transform.inverse(u), x)
    torch.testing.assert_close(u, torch.tensor([transform.forward(v) for v in values]))
    torch.testing.assert_close(transform.slope(x), torch.tensor([transform.slope(v) for v in values]))
    position = u.clone().requires_grad_()
    (slope,) = torch.autograd.grad(transform.inverse(position).sum(), position)
    torch.testing.assert_close(transform.slope(x), slope, rtol=1e-6, atol=1e-12)
    for far in (-800.0, 800.0):
        if not isinstance(transform, (Log, Identity)):
            assert transform.inverse(far) == pytest.approx(transform.inverse(torch.tensor(far)).item())
