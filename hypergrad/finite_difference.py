"""Hessian-vector products by differences of gradients, both taken on the same pieces of the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from hypergrad.activation_pattern import ActivationPattern, HeldLoss
from hypergrad.autodiff import moved, requiring_grad
from hypergrad.chunks import pieces, pieces_of
from hypergrad.curvature import Curvature, Evaluation, HeldAt, Product, Vector, mean_of, norm_of
from hypergrad.errors import ConfigurationError

# Elements of a gradient that are at most so many rounding errors of an ordinary one, and change by more than this many
# times the step, are rounding; in half precision nothing can be said of it.
_NOISE, _JUMP, _COARSE = 100.0, 150.0, 1e-6


@dataclass(frozen=True)
class FiniteDifference(Curvature):
    """H v = (g(x + e v) - g(x)) / e, with e v of relative size `step`: one more gradient per direction.

    Works wherever a gradient does: fused attention, recurrent kernels, compiled modules, mixed precision. A direction
    in both parameters and hyperparameters costs two, and one more is spent where g(x) is not known.

    An approximation: a product is good to three or four digits in float32. Both gradients are taken on the same pieces
    of the network (see `ActivationPattern`): else units that switch within a step, as those of a ReLU do, would add
    noise, which rules that divide by the root of a second moment (Adam) multiply for units that are rarely active.
    Where the pieces cannot be seen that is what happens, and over some ten steps it can drown the hypergradient: in
    compiled modules, under activation checkpoints, in operations that are not known to be smooth. It also does where a
    product has a factor of several numbers that comparisons have made, `x * torch.where(x > 0, 1.0, 0.1)`, which looks
    like any constant (one of 0 and 1 does not). Compare with `Exact()` there, or use `check`. A value that jumps, as
    where routing chooses other experts, has no derivative that a difference could find.

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
            here = _Here(loss, inputs, grads, self.step)

            def along(v: Vector) -> list[torch.Tensor | None] | None:
                """H v; None if a gradient could not be taken on the pieces of the other, as it was to be."""
                result: list[torch.Tensor | None] = [None] * len(inputs)
                for block in blocks:
                    rows = [i for i in block if v[i] is not None]
                    if not rows:
                        continue
                    moving, directions = [inputs[i] for i in rows], [d for d in (v[i] for i in rows) if d is not None]
                    step = here.step
                    length = step * (1.0 + norm_of(moving)) / (norm_of(directions) + 1e-30)
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
        step: what the user says.
    """

    def __init__(
        self, loss: Evaluation, inputs: Sequence[torch.Tensor], grads: Vector, step: float | None = None
    ) -> None:
        self._step = step
        self._inputs, self._mean = inputs, mean_of(loss)
        self._again, self._loss = loss, loss
        self._known = list(grads)
        self._stepped = [i for i, g in enumerate(grads) if g is not None]
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
        stepped = [g for g in (self._known[i] for i in self._stepped) if g is not None and g.numel()]
        usual = [torch.linalg.vector_norm(g).float() / g.numel() ** 0.5 for g in stepped]
        self._noise = _NOISE * self._rounding * torch.stack(usual).max() if usual else torch.zeros(())

    def _everywhere(self, here: bool) -> bool:
        """Whether it is so in all processes."""
        missing = self._inputs[0].new_tensor(float(not here))
        (share,) = self._mean([missing], [missing])
        return here if share is missing or share is None else float(share) == 0.0

    @property
    def step(self) -> float:
        """How far to go, relative to the size of what is moved."""
        if self._step is not None:
            return self._step
        return math.sqrt(self._rounding) if self.is_held else math.cbrt(self._rounding)

    def gradient(self) -> list[torch.Tensor | None] | None:
        """The gradient where the inputs stand now; None if it is not on the pieces of that here, and was to be."""
        with torch.enable_grad():
            value, is_on_them = self._loss.held() if isinstance(self._loss, HeldLoss) else (self._loss(), False)
            if self.is_held and not self._everywhere(is_on_them):
                return None
            found = torch.autograd.grad(value, list(self._inputs), allow_unused=True)
        return self._mean(found, self._inputs)

    def change(
        self, index: int, there: torch.Tensor | None, length: torch.Tensor, *, dead: bool
    ) -> torch.Tensor | None:
        """The change of a gradient, per length.

        Args:
            dead: whether a gradient of 0 says something. What is exactly 0 stays so where units may switch: a dead
                unit, a row of an embedding that the batch lacks. Adam divides by the root of its second moment, 0, and
                would make of a unit that the difference wakes up a tangent of 1 / eps.
        """
        here = self._known[index]
        if there is None or here is None:
            return None
        found = _quotient(there, here, length.to(there), dead=dead and not self.is_held)
        if dead and self.is_held and here.dim() <= 1 and index in self._stepped and self._rounding < _COARSE:
            # A bias before a normalisation has no gradient but for rounding, which a small step would make large, and
            # Adam as large as any.
            largest = torch.maximum(there.abs(), here.abs())
            jumps = (there - here).abs() > _JUMP * self.step * largest
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
