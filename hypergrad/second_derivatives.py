"""Which graphs autograd differentiates a second time, which it refuses, and which it gets wrong without a word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergrad.autodiff import moved, nodes, passes_through
from hypergrad.errors import NotDifferentiableError
from hypergrad.torch_internals import without_gradient_hooks

# The mean over processes of rows, each of the shape of a tensor in the second argument.
Mean = Callable[[Sequence[torch.Tensor | None], Sequence[torch.Tensor]], list[torch.Tensor | None]]

# Nodes of kernels that have no second derivative where others that compute the same have one.
_FUSED = {
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductCudnnAttentionBackward0",
    "ScaledDotProductFusedAttentionOverrideableBackward0",
    "CudnnRnnBackward0",
}
# Nodes through which a gradient flows that is no graph of its inputs.
_CLOSED = {"CompiledFunctionBackward", "CheckpointFunctionBackward"}
# Nodes that autograd differentiates a second time without a word, and wrongly.
_WRONG_TWICE = {
    # Left where a function is differentiable once: autograd goes round it and gives 0.
    "torch::autograd::Error": "a torch.autograd.Function that is marked once_differentiable",
    "WeightNormInterfaceBackward0": "torch's fused weight_norm, whose second derivative is wrong",
}
# A Function in Python whose backward hands gradients on as they are.
_HARMLESS = "BackwardHookFunctionBackward"
# Functions that `refuse_untracked` has let pass.
_passed: WeakSet[type] = WeakSet()


@contextmanager
def twice_differentiable_kernels() -> Iterator[None]:
    """Inside the block attention and recurrent layers are evaluated by kernels that have a second derivative."""
    # Fused attention has no double backward, and neither have cuDNN's recurrent kernels.
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def has_second_derivative(graph: Mapping[type, str]) -> bool:
    """Whether a gradient through nodes of these kinds can keep its graph; see `autodiff.kinds`."""
    return not (_FUSED | _CLOSED).intersection(graph.values())


def refuse_wrong(graph: Mapping[type, str], gradients: Sequence[torch.Tensor]) -> None:
    """Refuse nodes that are known to be differentiated wrongly a second time.

    Args:
        graph: the kinds of nodes in the graph of the loss.
        gradients: its gradients, with their graph. That is searched only where Python has a part in it: a backward of
            torch's own is made of nothing else.

    Raises:
        NotDifferentiableError: if there is one.
    """
    wrong = next((name for name in graph.values() if name in _WRONG_TWICE), None)
    if wrong is None and _functions(graph):
        wrong = passes_through(gradients, set(_WRONG_TWICE))
    if wrong is not None:
        raise NotDifferentiableError(
            f"The training loss goes through {_WRONG_TWICE[wrong]}: use curvature=FiniteDifference()."
        )


def untried(graph: Mapping[type, str]) -> set[type]:
    """Functions written in Python that `refuse_untracked` has not let pass in this process."""
    return {kind for kind in _functions(graph) if kind not in _passed}


def refuse_untracked(loss: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], functions: set[type]) -> None:
    """Refuse a Function whose backward depends on something without a graph that says so.

    One that multiplies by what `forward` had computed, as fused losses do, is differentiated a second time as if that
    were constant. Found out by two gradients, at the inputs and about a tenth of their size from there, for which each
    Function is asked to carry the same vector backwards: what comes out and follows no input must not have changed.
    Some of it may, where units switch as those of a ReLU do; a half may not. And all of it must follow the vector.

    Args:
        loss: evaluates the training loss.
        inputs: what it is differentiated by, moved for a while.
        functions: the kinds of nodes to look at.

    Raises:
        NotDifferentiableError: if there is such a Function.
    """
    here = _carried(loss, inputs, functions, follow=False)
    with moved(inputs, [_away(x) for x in inputs], 0.1):
        there = _carried(loss, inputs, functions, follow=True)
    wrong = {
        name
        for (name, before), (_, after) in zip(here, there, strict=False)
        if before.shape == after.shape
        and ((not before.requires_grad and _differs(before, after)) or (not after.requires_grad and bool(after.any())))
    }
    if wrong:
        raise NotDifferentiableError(
            f"The training loss goes through {', '.join(sorted(wrong))}, a torch.autograd.Function whose backward "
            "autograd cannot follow, so that second derivatives would be wrong: use curvature=FiniteDifference(), or "
            "make its backward of differentiable operations on the gradient and on inputs and outputs that "
            "ctx.save_for_backward has kept."
        )
    _passed.update(functions)


def refuse_other_gradients(
    loss: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], mean: Mean
) -> None:
    """Refuse a step whose gradient is not the derivative of its loss: where that depends on what was detached.

    Autograd takes for constant what is detached, the second time as the first: a target that the same network
    computes, a weight made of losses. The gradient of a step does depend on it. So does the loss, by which it is found
    out: on a short way along the gradient it must change by the gradient's norm per unit of length. Two evaluations;
    where they say otherwise, the gradient is taken anew without hooks on parameters, and the loss has to say it at four
    lengths, far from rounding: else it passes.

    Args:
        loss: evaluates the training loss.
        inputs: what it is differentiated by, moved for a while.
        grads: the gradient that the step takes; clipped ones are taken anew.
        mean: the mean over processes.

    Raises:
        NotDifferentiableError: if the gradient is another.
    """
    if not inputs:
        return
    length = max(torch.finfo(x.dtype).eps for x in inputs) ** 0.5 * (1.0 + _norm(inputs))
    size = _norm(grads)
    if size == 0.0 or not math.isfinite(size):
        return
    if abs(_slope(loss, inputs, grads, length, mean) - size) <= 0.02 * size:
        return
    with without_gradient_hooks(inputs), torch.enable_grad():
        value = loss()
        own = torch.autograd.grad(value, list(inputs), allow_unused=True, materialize_grads=True)
    grads = [g if m is None else m for g, m in zip(own, mean(own, inputs), strict=True)]
    size = _norm(grads)
    if size == 0.0 or not math.isfinite(size):
        return
    slopes = [_slope(loss, inputs, grads, times * length, mean) for times in (1.0, 1.7, 2.9, 5.0)]
    if not any(slopes) and size * length < torch.finfo(value.dtype).eps:
        return  # fitted so well that what is left is below the last digit of what the loss is computed from
    # What the loss does on a way so short that it should stay; by luck it does, and then its last digits count.
    rounding = abs(_slope(loss, inputs, [_noise(x) for x in inputs], 1e-4 * length, mean)) * 1e-4
    rounding += torch.finfo(value.dtype).eps * abs(_averaged(value.detach(), mean)) / length
    doubt = 5.0 * (max(slopes) - min(slopes)) + 50.0 * rounding
    if abs(slopes[0] - size) > max(doubt, 0.05 * abs(slopes[0]), 0.05 * size):
        raise NotDifferentiableError(
            "The gradient of a training step is not the derivative of its loss: along it the loss changes by "
            f"{slopes[0]:.3g} per unit of length, where a derivative would say {size:.3g}. The loss depends on the "
            "parameters through something detached (a target or a weight that the same network computes), or through a "
            "Function whose backward is not its derivative (straight-through, reversed). Second derivatives would lack "
            "it: use curvature=FiniteDifference(), which takes the gradient as it is."
        )


def _slope(
    loss: Callable[[], torch.Tensor],
    inputs: Sequence[torch.Tensor],
    directions: Sequence[torch.Tensor],
    length: float,
    mean: Mean,
) -> float:
    """How fast the loss changes along a direction, over twice a length, divided by the length of that."""
    unit, found = length / max(_norm(directions), 1e-30), []
    for way in (unit, -unit):
        with moved(inputs, directions, way), torch.enable_grad():
            found.append(loss().detach())
    return _averaged(found[0] - found[1], mean) / (2.0 * length)


def _averaged(number: torch.Tensor, mean: Mean) -> float:
    # All processes decide alike.
    (found,) = mean([number], [number])
    return float(number if found is None else found)


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach())) for t in tensors))


def _carried(
    loss: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], functions: set[type], *, follow: bool
) -> list[tuple[str, torch.Tensor]]:
    """What each Function makes of one vector on the way back; if `follow`, of one that requires a gradient."""
    value = loss()
    found: list[tuple[str, torch.Tensor]] = []

    def replaced(grads: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(None if g is None else _noise(g).requires_grad_(follow) for g in grads)

    def noted(name: str) -> Callable[..., None]:
        return lambda out, _: found.extend((name, g) for g in out if g is not None and g.is_floating_point())

    for node in nodes([value]):
        if type(node) in functions:
            node.register_prehook(replaced)
            node.register_hook(noted(node.name().removesuffix("Backward")))
    with refusals():
        torch.autograd.grad(value, list(inputs), create_graph=True, allow_unused=True)
    return found


def _away(x: torch.Tensor) -> torch.Tensor:
    noise = _noise(x)
    if isinstance(x, torch.nn.Parameter):
        return noise * (x.detach().abs().mean() + 0.1)
    return -x.detach() * noise.sigmoid()  # a hyperparameter that becomes smaller does not leave its domain


def _noise(like: torch.Tensor) -> torch.Tensor:
    # The same at every call, and from no stream of the user's.
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def _differs(before: torch.Tensor, after: torch.Tensor) -> bool:
    before, after = before.detach(), after.detach()
    acts = (before != 0) | (after != 0)
    rounding = 16 * torch.finfo(before.dtype).eps * before.abs().mean()
    return bool(2 * ((after - before).abs() > rounding).sum() > acts.sum())


def _functions(graph: Mapping[type, str]) -> list[type]:
    return [kind for kind, name in graph.items() if issubclass(kind, BackwardCFunction) and name != _HARMLESS]


@contextmanager
def refusals() -> Iterator[None]:
    """What autograd says when there is no second derivative becomes an error that names the way out."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("not implemented", "double backward", "create_graph=False")):
            raise
        raise NotDifferentiableError(
            f"The training loss cannot be differentiated twice ({str(error).splitlines()[0]}): use "
            "curvature=FiniteDifference()."
        ) from error
