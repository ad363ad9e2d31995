"""The gradient of a validation loss, or a clear word on why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hypergrad.errors import NotDifferentiableError
from hypergrad.torch_internals import without_gradient_hooks


def gradient(
    loss: torch.Tensor,
    params: Sequence[torch.Tensor],
    module: torch.nn.Module | None = None,
    *,
    scale: float = 1.0,
    any_of: bool = False,
) -> tuple[torch.Tensor, ...]:
    """d(loss)/d(params), zero where the loss does not depend on a parameter; `.grad` is not touched.

    Hooks on parameters and on the module that change gradients (clamping, scaling) do not run: they belong to the
    training step, and the validation loss does not know of them.

    Args:
        loss: a scalar with a graph.
        params: tensors that require a gradient.
        module: whose backward hooks are to be left out as well.
        scale: the loss is multiplied by it and the gradient divided: keeps float16 from underflow.
        any_of: the loss must depend on one of them at least.

    Raises:
        NotDifferentiableError: if the graph holds a reentrant checkpoint, through which no such gradient flows, or
            leads to none of the parameters that it must depend on.
    """
    _refuse_reentrant_checkpoints(loss)
    with without_gradient_hooks(params, module):
        scaled = loss if scale == 1.0 else scale * loss
        gradients = torch.autograd.grad(scaled, list(params), allow_unused=True)
    if any_of and params and all(g is None for g in gradients):
        raise NotDifferentiableError(
            "The validation loss depends on none of the parameters that the optimizer trains: is it that of a copy of "
            "the model, such as an average of its weights? Evaluate the model that is trained."
        )
    found = (torch.zeros_like(p) if g is None else g.detach() for p, g in zip(params, gradients, strict=True))
    return tuple(g if scale == 1.0 else g / scale for g in found)


def _refuse_reentrant_checkpoints(loss: torch.Tensor) -> None:
    # Parameters used inside a reentrant checkpoint are no inputs of its node: autograd.grad would miss their part.
    if passes_through([loss], {"CheckpointFunctionBackward"}):
        raise NotDifferentiableError(
            "The validation loss goes through a reentrant activation checkpoint, which hides parameters from "
            "autograd: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def passes_through(tensors: Sequence[torch.Tensor], names: set[str]) -> str | None:
    """The name of a node, one of these, in the graph that leads to any of the tensors; None if there is none."""
    return next((name for name in kinds(tensors).values() if name in names), None)


def kinds(tensors: Sequence[torch.Tensor]) -> dict[type, str]:
    """Every kind of node in the graph that leads to any of the tensors: its class and its name.

    Each of torch's own has a class; those of extensions in C++ share one, and are found under one name.
    """
    found: dict[type, str] = {}
    for node in nodes(tensors):
        if type(node) not in found:  # to ask a node for its name takes longer than all the rest
            found[type(node)] = node.name()
    return found


def nodes(tensors: Sequence[torch.Tensor]) -> Iterator[Any]:
    """Every node of the graph that leads to any of the tensors, once, in an order that only the graph decides."""
    queue = list(dict.fromkeys(t.grad_fn for t in tensors if t.grad_fn is not None))
    seen = set(queue)
    while queue:
        node = queue.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                queue.append(parent)


@contextmanager
def requiring_grad(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside the block all of them require a gradient: hyperparameters, and parameters that are frozen for a while."""
    asked = [t for t in tensors if not t.requires_grad]
    try:
        for t in asked:
            t.requires_grad_(True)
        yield
    finally:
        for t in asked:
            t.requires_grad_(False)


@contextmanager
def moved(
    tensors: Sequence[torch.Tensor], directions: Sequence[torch.Tensor], length: torch.Tensor | float
) -> Iterator[None]:
    """Inside the block each stands `length` times its direction further, in place; bit for bit as before afterwards."""
    before = [t.detach().clone() for t in tensors]
    try:
        with torch.no_grad():
            for t, direction in zip(tensors, directions, strict=True):
                t.addcmul_(direction, torch.as_tensor(length).to(t))
        yield
    finally:
        with torch.no_grad():
            for t, old in zip(tensors, before, strict=True):
                t.copy_(old)
