"""A second optimizer of the same class leaves the first one alone."""

from __future__ import annotations

from typing import Any

import torch

from hypergrad.optimizer.shadow import shadow, single_tensor_group
from hypergrad.torch_internals import raw_step


def _optimizer() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return p, torch.optim.SGD([p], lr=0.1)


def test_raw_step_goes_around_a_scheduler_that_patched_the_instance() -> None:
    _, optimizer = _optimizer()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" in vars(optimizer)
    other = torch.ones(2)
    other.grad = torch.ones(2)
    twin = shadow(optimizer, [single_tensor_group(optimizer.param_groups[0], [other])], {})
    with torch.no_grad():
        raw_step(twin)
    torch.testing.assert_close(other, torch.full((2,), 0.9))


def test_a_shadow_has_no_hooks_and_keeps_foreign_attributes() -> None:
    p, optimizer = _optimizer()
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.tokens = ["a"]  # type: ignore[attr-defined]
    other = torch.zeros(2)
    other.grad = torch.ones(2)
    twin = shadow(optimizer, [single_tensor_group(optimizer.param_groups[0], [other])], {})
    with torch.no_grad():
        twin.step()
    twin.tokens.append("b")  # type: ignore[attr-defined]
    assert calls == []
    assert optimizer.tokens == ["a"]  # type: ignore[attr-defined]
    torch.testing.assert_close(p.detach(), torch.ones(2))
    torch.testing.assert_close(other, torch.full((2,), -0.1))
