"""The undocumented corners of torch that one file uses: these break when one moves."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hypergrad.torch_internals import (
    dtype_of,
    is_packed,
    raw_step,
    saved_by,
    step_hooks,
    without_gradient_hooks,
)


def test_step_is_hooked_and_raw_step_goes_around_the_hooks() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = torch.optim.SGD([p], lr=0.1)
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    assert getattr(type(optimizer).step, "hooked", False)
    handles = [optimizer.register_step_pre_hook(lambda *_: None), optimizer.register_step_post_hook(lambda *_: None)]
    assert {handle.id for handle in handles} < step_hooks(optimizer)
    assert len(step_hooks(optimizer)) == 4
    everywhere = register_optimizer_step_post_hook(lambda *_: None)
    assert step_hooks(optimizer) - {everywhere.id} < step_hooks(optimizer)
    everywhere.remove()
    raw_step(optimizer)
    assert calls == []
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.9))
    optimizer.step()
    assert calls == ["pre", "post"]


def test_gradient_hooks_rest_and_come_back() -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.register_hook(lambda g: g * 100)
    model.register_full_backward_hook(lambda m, gi, go: tuple(g if g is None else g * 7 for g in gi))
    x = torch.ones(1, 2, requires_grad=True)
    hooked = torch.autograd.grad(model(x).sum(), [model.weight, x])
    assert hooked[0].tolist() == [[100.0, 100.0]]
    torch.testing.assert_close(hooked[1], 7 * model.weight.detach())
    with without_gradient_hooks(model.parameters(), model):
        plain = torch.autograd.grad(model(x).sum(), [model.weight, x])
    assert plain[0].tolist() == [[1.0, 1.0]]
    torch.testing.assert_close(plain[1], model.weight.detach())
    again = torch.autograd.grad(model(x).sum(), [model.weight, x])
    torch.testing.assert_close(again, hooked)


def test_nodes_show_what_they_keep() -> None:
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    relu, clamp = torch.relu(x).grad_fn, x.clamp(0.0).grad_fn
    assert saved_by(relu, "result").tolist() == [0.0, 2.0]
    assert (saved_by(clamp, "min"), saved_by(clamp, "max"), saved_by(clamp, "other", 3)) == (0.0, None, 3)
    assert dtype_of(relu) == torch.float32
    assert dtype_of(x.to(torch.bfloat16).grad_fn) == torch.bfloat16


def test_nodes_show_that_something_is_packed_without_unpacking_it() -> None:
    x, unpacked = torch.tensor([-1.0, 2.0], requires_grad=True), list[torch.Tensor]()

    def unpack(t: torch.Tensor) -> torch.Tensor:
        unpacked.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        packed = torch.relu(x).grad_fn
    assert is_packed(packed)
    assert not is_packed(torch.relu(x).grad_fn)
    assert unpacked == []
