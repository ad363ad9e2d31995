"""Hessian-vector products of the training loss: how the gradient of a step follows parameters and hyperparameters."""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from hypergrad.activation_pattern import ActivationPattern, HeldLoss
from hypergrad.autodiff import kinds, requiring_grad
from hypergrad.errors import NotDifferentiableError
from hypergrad.second_derivatives import (
    Mean,
    has_second_derivative,
    refusals,
    refuse_other_gradients,
    refuse_untracked,
    refuse_wrong,
    twice_differentiable_kernels,
    untried,
)

# Evaluates the training loss of one step at the parameters as they stand: the same batch, randomness and buffers at
# every call, and no trace left.
Evaluation = Callable[[], torch.Tensor]
# One entry per input, in its shape; None stands for zero.
Vector = Sequence[torch.Tensor | None]
Product = Callable[[Vector], list[torch.Tensor | None]]


class SharedLoss(HeldLoss):
    """The part of a training loss that this process evaluates, where several take the mean of their gradients.

    Callable like any other `Evaluation`.

    Args:
        loss: evaluates this part.
        mean: the mean over all processes, each of which calls it at the same point.
    """

    def __init__(self, loss: Evaluation, mean: Mean) -> None:
        self.loss = loss
        self.mean = mean

    def __call__(self) -> torch.Tensor:
        return self.loss()

    @property
    def rounding(self) -> float:
        """See `HeldLoss.rounding`, of this part."""
        return self.loss.rounding if isinstance(self.loss, HeldLoss) else math.inf

    def held(self) -> tuple[torch.Tensor, bool]:
        """See `HeldLoss.held`, of this part."""
        return self.loss.held() if isinstance(self.loss, HeldLoss) else (self.loss(), False)

    def shrink(self) -> None:
        """See `HeldLoss.shrink`."""
        if isinstance(self.loss, HeldLoss):
            self.loss.shrink()


class HeldAt(HeldLoss):
    """The training loss of a step that has been evaluated before.

    Args:
        again: evaluates it once more.
        pattern: the pieces that the step was on.
    """

    def __init__(self, again: Evaluation, pattern: ActivationPattern) -> None:
        self._again, self._pattern = again, pattern

    def __call__(self) -> torch.Tensor:
        return self._again()

    @property
    def rounding(self) -> float:
        """See `HeldLoss.rounding`."""
        return self._pattern.rounding

    def held(self) -> tuple[torch.Tensor, bool]:
        """See `HeldLoss.held`."""
        value = self._again()
        return value, self._pattern.hold(value)

    def shrink(self) -> None:
        """See `HeldLoss.shrink`."""
        self._pattern.shrink()


def mean_of(loss: Evaluation) -> Mean:
    """What turns gradients of an evaluation into those of the training loss."""
    return loss.mean if isinstance(loss, SharedLoss) else lambda rows, _: list(rows)


class TakenStep:
    """The evaluation whose gradient a step takes, while its graph is there: callable like any other `Evaluation`.

    With its gradient at hand, `Exact` needs no evaluation of its own.

    Args:
        again: evaluates the same loss once more.
        inputs: the parameters that had required a gradient, and tensors of hyperparameters.
    """

    def __init__(self, again: Evaluation, inputs: Sequence[torch.Tensor]) -> None:
        self._again = again
        self._inputs = set(inputs)
        self._gradients: dict[torch.Tensor, torch.Tensor] = {}
        self._graph: dict[type, str] = {}

    def __call__(self) -> torch.Tensor:
        return self._again()

    def backward(self, loss: Evaluation) -> None:
        """As `loss().backward()`, but the gradients keep their graph if they can be differentiated again."""
        with twice_differentiable_kernels():
            value = loss()
            graph = kinds([value])
            if not has_second_derivative(graph):
                torch.autograd.backward(value)
                return
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Using backward.*with create_graph=True")  # it is cut below
                torch.autograd.backward(value, create_graph=True)
        self._graph = graph
        for x in self._inputs:
            if x.grad is not None:
                self._gradients[x] = x.grad
                x.grad = x.grad.detach()

    def gradient(self, inputs: Sequence[torch.Tensor]) -> Gradient | None:
        """The gradient by each input with its graph; None if they, or the graph to some input, are not there."""
        if not self._gradients or not self._inputs.issuperset(inputs):
            return None
        return Gradient([self._gradients.get(x) for x in inputs], self._graph)


@dataclass(frozen=True)
class Gradient:
    """A gradient that can be differentiated.

    Args:
        rows: one per input, with its graph.
        graph: the kinds of nodes in the graph of the loss.
    """

    rows: Sequence[torch.Tensor | None]
    graph: Mapping[type, str]


class Curvature(ABC):
    """A way to compute H v, where H is the Hessian of the training loss with respect to all inputs together."""

    @property
    def uses_graph(self) -> bool:
        """Whether the graph of a `TakenStep` saves it an evaluation."""
        return False

    @property
    def uses_pattern(self) -> bool:
        """Whether it differentiates on the pieces of the step, where the loss knows them: see `HeldLoss`."""
        return False

    @abstractmethod
    def at(
        self, loss: Evaluation, inputs: Sequence[torch.Tensor], grads: Vector, *, products: int | None = None
    ) -> AbstractContextManager[Product]:
        """The map v -> H v at the inputs as they stand on entry, for use inside the block.

        A row of H v that is None is zero because the gradient of the loss does not depend on that input. Inputs and
        `.grad` are as before afterwards, also if the loss raises.

        Args:
            loss: evaluates the training loss.
            inputs: parameters, and tensors of hyperparameters that the loss uses.
            grads: the gradient of the loss with respect to each parameter, as the real step has it; None for a tensor
                of hyperparameters, and for all of them where it is not known.
            products: how many will be asked for at most, where that is known: with the last one graphs may go.

        Raises:
            NotDifferentiableError: if the loss cannot be differentiated as often as is needed.
        """

    def at_minimum(
        self, loss: Evaluation, inputs: Sequence[torch.Tensor], grads: Vector
    ) -> AbstractContextManager[Product]:
        """The same where a gradient of 0 says nothing about the curvature."""
        return self.at(loss, inputs, grads)

    def check(self, loss: Evaluation, grads: Mapping[torch.Tensor, torch.Tensor]) -> None:  # noqa: B027
        """Called once for a run, before its first step is taken: refuse what products would get wrong.

        Args:
            loss: evaluates the training loss of the step.
            grads: the gradient that the step takes, by parameter.

        Raises:
            NotDifferentiableError: if they would.
        """


@dataclass(frozen=True)
class Exact(Curvature):
    """Reverse over reverse (Pearlmutter 1994, "Fast exact multiplication by the Hessian"): exact up to rounding.

    Costs about two gradients per direction, and one more where the graph of the step's own is not there. Attention and
    recurrent layers are evaluated by kernels that can be differentiated twice; compiled modules cannot, and take
    `FiniteDifference`.

    Autograd differentiates some losses wrongly a second time and does not say so. What can be found out is refused: at
    the start of a run a gradient that is not the derivative of its loss, since that depends on what was detached, and
    a `torch.autograd.Function` whose backward is no graph of what it depends on when it is met first.
    """

    @property
    def uses_graph(self) -> bool:
        """Whether the graph of a `TakenStep` saves it an evaluation."""
        return True

    def check(self, loss: Evaluation, grads: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Refuse a step whose gradient is not the derivative of its loss."""
        with twice_differentiable_kernels():
            refuse_other_gradients(loss, list(grads), list(grads.values()), mean_of(loss))

    @contextmanager
    def at(
        self, loss: Evaluation, inputs: Sequence[torch.Tensor], grads: Vector, *, products: int | None = None
    ) -> Iterator[Product]:
        """See `Curvature.at`."""
        mean = mean_of(loss)
        asked = itertools.count(1)
        with requiring_grad(inputs), twice_differentiable_kernels(), torch.enable_grad():
            gradient = loss.gradient(inputs) if isinstance(loss, TakenStep) else None
            if gradient is None:
                gradient = _evaluate(loss, inputs)
                check_same(mean([None if g is None else g.detach() for g in gradient.rows], inputs), grads)
            functions = untried(gradient.graph)
            if functions:
                refuse_untracked(loss, inputs, functions)
                gradient = _evaluate(loss, inputs)  # the inputs have been moved, which a graph does not survive
            # A gradient without a graph is a constant: the loss is linear in that input.
            alive = _alive(gradient)
            refuse_wrong(gradient.graph, list(alive.values()))

            def product(v: Vector) -> list[torch.Tensor | None]:
                is_last = next(asked) == products
                # What is let go on the way is still in the cache.
                return mean(_product(alive, inputs, v, keep=not is_last), inputs)

            yield product


def _evaluate(loss: Evaluation, inputs: Sequence[torch.Tensor]) -> Gradient:
    with refusals():
        value = loss()
        return Gradient(torch.autograd.grad(value, list(inputs), create_graph=True, allow_unused=True), kinds([value]))


def _alive(gradient: Gradient) -> dict[int, torch.Tensor]:
    return {i: g for i, g in enumerate(gradient.rows) if g is not None and g.requires_grad}


def _product(
    alive: Mapping[int, torch.Tensor], inputs: Sequence[torch.Tensor], v: Vector, *, keep: bool
) -> list[torch.Tensor | None]:
    rows = [i for i in alive if v[i] is not None]
    if not rows:
        return [None] * len(inputs)
    with refusals():
        gradients, along = [alive[i] for i in rows], [v[i] for i in rows]
        found = torch.autograd.grad(gradients, list(inputs), along, retain_graph=keep, allow_unused=True)
    # A row may be a tensor of the graph itself, and would keep it.
    return [None if row is None else row.detach() for row in found]


@torch.no_grad()
def check_same(found: Sequence[torch.Tensor | None], known: Vector) -> None:
    """The gradient that a step was taken with must be that of the loss as it is evaluated again."""
    pairs = [
        (f if f is not None else torch.zeros_like(k), k) for f, k in zip(found, known, strict=True) if k is not None
    ]
    if not pairs:
        return
    off, size = norm_of([f - k for f, k in pairs]), norm_of([k for _, k in pairs])
    half = any(k.dtype in (torch.float16, torch.bfloat16) for _, k in pairs) or torch.is_autocast_enabled("cpu")
    if bool(size.isfinite()) and not bool(off <= (0.5 if half else 0.05) * size + 1e-6):
        raise NotDifferentiableError(
            f"The training loss of a step has another gradient when it is evaluated again (off by {float(off):.3g}, "
            f"its size is {float(size):.3g}). Either the step did not take the gradient of this loss (it was clipped, "
            "scaled or changed by a hook), or the loss depends on something that has changed since: a counter, an "
            "attribute, a batch that was overwritten."
        )


def norm_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all of them together, in float32."""
    norms = torch.stack([torch.linalg.vector_norm(t.detach()).float() for t in tensors])
    norm: torch.Tensor = torch.linalg.vector_norm(norms)
    return norm
