"""The one file that uses what torch does not document.

`tests/hypergrad/test_torch_internals.py` breaks when one of these attributes moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def raw_step(optimizer: torch.optim.Optimizer, *closure: Any) -> None:
    """Run the optimizer's own `step()` without per-instance, global or profiling hooks.

    Uses `step.hooked` and `step.__wrapped__`: torch wraps the method in one that runs the hooks.
    """
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer, *closure)


def step_hooks(optimizer: torch.optim.Optimizer) -> set[int]:
    """The hooks that run before or after the optimizer's steps, global ones too, by the `id` of their handles.

    Uses `Optimizer._optimizer_step_pre_hooks`, `torch.optim.optimizer._global_optimizer_pre_hooks` and the same for
    `post`: hooks can be registered, not asked for.
    """
    of_all = {*_global_optimizer_pre_hooks, *_global_optimizer_post_hooks}
    return of_all | {*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks}


def grad_mode_switch() -> Any:
    """The function through which `torch.no_grad()` and its like switch gradients, as a TorchFunctionMode sees it.

    Uses `torch._C._set_grad_enabled`: a step that is decorated with `torch.no_grad()` leaves no other way in.
    """
    return torch._C._set_grad_enabled


@contextmanager
def without_gradient_hooks(tensors: Iterable[torch.Tensor], module: torch.nn.Module | None = None) -> Iterator[None]:
    """Differentiate the loss itself: hooks that change gradients on their way belong to training.

    Uses `Tensor._backward_hooks`, `Module._backward_hooks` and `Module._backward_pre_hooks`: there is no public way
    to suspend hooks that somebody else registered.
    """
    hooked = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    modules = [m for m in module.modules() if m._backward_hooks or m._backward_pre_hooks] if module is not None else []
    saved = [(m, m._backward_hooks, m._backward_pre_hooks) for m in modules]
    try:
        for tensor, _ in hooked:
            tensor._backward_hooks = None
        for m, hooks, pre_hooks in saved:
            m._backward_hooks, m._backward_pre_hooks = type(hooks)(), type(pre_hooks)()
        yield
    finally:
        for tensor, tensor_hooks in hooked:
            tensor._backward_hooks = tensor_hooks
        for m, hooks, pre_hooks in saved:
            m._backward_hooks, m._backward_pre_hooks = hooks, pre_hooks


def saved_by(node: Any, name: str, default: Any = None) -> Any:
    """What a node of a graph keeps for its own use: tensors, to be looked at under `no_grad`, and settings.

    Uses `node._saved_*`, which torch's tutorial on saved tensors describes and its reference does not.
    """
    return getattr(node, f"_saved_{name}", default)


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of what a node of a graph computed; None where it does not say.

    Uses `node._input_metadata`, which is about the gradient that the node will be given.
    """
    metadata = getattr(node, "_input_metadata", ())
    return metadata[0].dtype if metadata else None


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of what a node of a graph computed; empty where it does not say. Uses `node._input_metadata`, too."""
    metadata = getattr(node, "_input_metadata", ())
    return tuple(metadata[0].shape) if metadata else ()


def is_packed(node: Any) -> bool:
    """Whether somebody has packed what a node keeps: to look at it may run a part of the network again.

    Uses `node._raw_saved_*` and its `unpack_hook`: hooks on saved tensors can be registered, not asked for.
    """
    for name in _raw_names(node.__class__):
        saved = getattr(node, name)
        for tensor in saved if isinstance(saved, (tuple, list)) else (saved,):
            if getattr(tensor, "unpack_hook", None) is not None:
                return True
    return False


@cache
def _raw_names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
