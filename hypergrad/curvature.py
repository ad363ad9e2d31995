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
from hypergrad.autodiff import kinds, moved, requiring_grad
from hypergrad.chunks import pieces, pieces_of
from hypergrad.errors import ConfigurationError, NotDifferentiableError
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
Part = torch.Tensor | None

# Elements of a gradient that are at most so many rounding errors of an ordinary one, and change by more than this share
# of themselves on the way, are rounding.
_NOISE, _JUMP = 100.0, 0.05


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


@dataclass(frozen=True)
class FiniteDifference(Curvature):
    """H v = (g(x + e v) - g(x)) / e, with e v of relative size `step`: one more gradient per direction.

    Works wherever a gradient does: fused attention, recurrent kernels, compiled modules, mixed precision. A direction
    in both parameters and hyperparameters costs two, and one more is spent where g(x) is not known.

    An approximation: good to three or four digits. Both gradients are taken on the same pieces of the network (see
    `ActivationPattern`): else units that switch within a step, as those of a ReLU do, would add noise, which rules that
    divide by the root of a second moment (Adam) multiply for units that are rarely active. Where the pieces cannot be
    seen that is what happens, and over some ten steps it can drown the hypergradient: in compiled modules, under
    activation checkpoints, in what compares by hand (`x * (x > 0)`). Compare with `Exact()` there, or use `check`.

    Args:
        step: size of e v relative to 1 + |x|, in (0, 1). Default: the square root of the rounding error of the
            parameters' dtype (3e-4 in float32) where the whole of the network is held on its pieces. Where it is not,
            or parts are computed in less (autocast, TF32), the cube root (5e-3): small ones are lost in noise there.

    Raises:
        ConfigurationError: for a step outside (0, 1).
    """

    step: float | None = None

    def __post_init__(self) -> None:
        if self.step is not None and not 0.0 < self.step < 1.0:
            raise ConfigurationError(f"`step` must lie in (0, 1), but got {self.step!r}.")

    @property
    def uses_pattern(self) -> bool:
        """Whether it differentiates on the pieces of the step."""
        return True

    def at(
        self,
        loss: Evaluation,
        inputs: Sequence[torch.Tensor],
        grads: Vector,
        *,
        products: int | None = None,  # noqa: ARG002
    ) -> AbstractContextManager[Product]:
        """See `Curvature.at`."""
        return self._at(loss, inputs, grads, dead=True)

    def at_minimum(
        self, loss: Evaluation, inputs: Sequence[torch.Tensor], grads: Vector
    ) -> AbstractContextManager[Product]:
        """See `Curvature.at_minimum`."""
        return self._at(loss, inputs, grads, dead=False)

    @contextmanager
    def _at(self, loss: Evaluation, inputs: Sequence[torch.Tensor], grads: Vector, *, dead: bool) -> Iterator[Product]:
        # Parameters and hyperparameters differ in scale, and so does how far each may be moved.
        blocks = [[i for i, g in enumerate(grads) if (g is None) == unknown] for unknown in (False, True)]
        with requiring_grad(inputs), torch.no_grad():
            here = _Here(loss, inputs, grads)

            def along(v: Vector) -> list[torch.Tensor | None] | None:
                """H v; None if a gradient could not be taken on the pieces of the other, as it was to be."""
                result: list[torch.Tensor | None] = [None] * len(inputs)
                for block in blocks:
                    rows = [i for i in block if v[i] is not None]
                    if not rows:
                        continue
                    moving, directions = [inputs[i] for i in rows], [d for d in (v[i] for i in rows) if d is not None]
                    step = self.step if self.step is not None else here.step
                    length = step * (1.0 + _norm(moving)) / (_norm(directions) + 1e-30)
                    with moved(moving, directions, length):
                        there = here.gradient()
                    if there is None:
                        return None
                    for i, a in enumerate(there):
                        change = here.change(i, a, length, dead=dead)
                        if change is not None:
                            other = result[i]
                            result[i] = change if other is None else other + change
                return result

            def product(v: Vector) -> list[torch.Tensor | None]:
                for retreat in (here.look_again, here.let_go):
                    found = along(v)
                    if found is not None:
                        return found
                    retreat()
                return along(v) or [None] * len(inputs)

            yield product


class _Here:
    """The point at which curvature is sought: the gradient there, and the pieces that it was taken on.

    Args:
        loss, inputs, grads: see `Curvature.at`.
    """

    def __init__(self, loss: Evaluation, inputs: Sequence[torch.Tensor], grads: Vector) -> None:
        self._inputs, self._mean = inputs, mean_of(loss)
        self._again, self._loss = loss, loss
        self._known = list(grads)
        self._rounding = max(torch.finfo(x.dtype).eps for x in inputs)
        if any(g is None for g in grads):
            self.look_again()
        else:
            self._decide()

    def look_again(self) -> None:
        """Take the gradient here once more."""
        with torch.enable_grad():
            value = self._again()
            self._loss = HeldAt(self._again, ActivationPattern(value))
            found = torch.autograd.grad(value, list(self._inputs), allow_unused=True)
        self._known = self._mean(found, self._inputs)
        self._decide()

    def let_go(self) -> None:
        """Do without the pieces."""
        self._loss, self.is_held = self._again, False

    def _decide(self) -> None:
        seen = isinstance(self._loss, HeldLoss) and self._loss.rounding <= self._rounding
        self.is_held = self._everywhere(seen)
        # As small as this is only what rounding makes of a gradient that is zero.
        usual = [
            torch.linalg.vector_norm(g).float() / g.numel() ** 0.5 for g in self._known if g is not None and g.numel()
        ]
        self._noise = _NOISE * self._rounding * torch.stack(usual).max() if usual else torch.zeros(())

    def _everywhere(self, here: bool) -> bool:
        """Whether it is so in all processes."""
        flag = self._inputs[0].new_tensor(float(here))
        (share,) = self._mean([flag], [flag])
        return here if share is flag or share is None else float(share) == 1.0

    @property
    def step(self) -> float:
        """How far to go, relative to the size of what is moved."""
        return math.sqrt(self._rounding) if self.is_held else math.cbrt(self._rounding)

    def gradient(self) -> list[torch.Tensor | None] | None:
        """The gradient where the inputs stand now; None if it is not on the pieces of that here, and was to be."""
        with torch.enable_grad():
            value, is_on_them = self._loss.held() if isinstance(self._loss, HeldLoss) else (self._loss(), False)
            if self.is_held and not self._everywhere(is_on_them):
                return None
            found = torch.autograd.grad(value, list(self._inputs), allow_unused=True)
        return self._mean(found, self._inputs)

    def change(self, index: int, there: torch.Tensor | None, length: torch.Tensor, *, dead: bool) -> Part:
        """The change of a gradient, per length.

        Args:
            dead: whether what is exactly 0 stays so where units may switch: a dead unit, a row of an embedding that the
                batch lacks. Adam divides by the root of its second moment, 0, and would make of a unit that the
                difference wakes up a tangent of 1 / eps.
        """
        here = self._known[index]
        if there is None or here is None:
            return None
        found = _quotient(there, here, length.to(there), dead=dead and not self.is_held)
        if self.is_held and here.dim() <= 1:
            # A bias before a normalisation has no gradient but for rounding, which a small step would make large, and
            # Adam as large as any.
            largest = torch.maximum(there.abs(), here.abs())
            jumps = (there - here).abs() > _JUMP * largest
            found.masked_fill_(here.any() & (largest <= self._noise.to(largest)) & jumps, 0.0)
        return found


def _quotient(a: torch.Tensor, b: torch.Tensor, length: torch.Tensor, *, dead: bool) -> torch.Tensor:
    """(a - b) / length; if `dead`, 0 where b is."""
    result, count = torch.empty_like(b, memory_format=torch.contiguous_format), pieces_of(b)
    for x, y, target in zip(pieces(a, count), pieces(b, count), pieces(result, count), strict=True):
        torch.sub(x, y, out=target).div_(length)
        if dead:
            alive = y.sign()  # its square is 0 where y is, and 1 elsewhere; a mask would take three times as long
            target.mul_(alive).mul_(alive)
    return result


@torch.no_grad()
def check_same(found: Sequence[torch.Tensor | None], known: Vector) -> None:
    """The gradient that a step was taken with must be that of the loss as it is evaluated again."""
    pairs = [
        (f if f is not None else torch.zeros_like(k), k) for f, k in zip(found, known, strict=True) if k is not None
    ]
    if not pairs:
        return
    off, size = _norm([f - k for f, k in pairs]), _norm([k for _, k in pairs])
    half = any(k.dtype in (torch.float16, torch.bfloat16) for _, k in pairs) or torch.is_autocast_enabled("cpu")
    if bool(size.isfinite()) and not bool(off <= (0.5 if half else 0.05) * size + 1e-6):
        raise NotDifferentiableError(
            f"The training loss of a step has another gradient when it is evaluated again (off by {float(off):.3g}, "
            f"its size is {float(size):.3g}). Either the step did not take the gradient of this loss (it was clipped, "
            "scaled or changed by a hook), or the loss depends on something that has changed since: a counter, an "
            "attribute, a batch that was overwritten."
        )


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    norms = torch.stack([torch.linalg.vector_norm(t.detach()).float() for t in tensors])
    norm: torch.Tensor = torch.linalg.vector_norm(norms)
    return norm
