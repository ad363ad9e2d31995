"""Hessian-vector products of the training loss: how the gradient of a step follows the parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergrad.autodiff import passes_through
from hypergrad.errors import ConfigurationError, NotDifferentiableError

# Evaluates the training loss of one step at the parameters as they stand: the same batch, randomness and buffers at
# every call, and no trace left.
Evaluation = Callable[[], torch.Tensor]
Vectors = Sequence[torch.Tensor]


class Curvature(ABC):
    """A way to compute H v, where H is the Hessian of the training loss at the parameters before the step."""

    @abstractmethod
    def products(
        self, loss: Evaluation, params: Vectors, grads: Vectors, directions: Sequence[Vectors]
    ) -> list[list[torch.Tensor]]:
        """H v for each direction v. Parameters and `.grad` are as before afterwards, also if the loss raises.

        Args:
            loss: evaluates the training loss.
            params: tensors that require a gradient.
            grads: the gradient of the loss with respect to each of them, as the real step has it.
            directions: vectors v, each a sequence of tensors with the shapes of `params`.

        Raises:
            NotDifferentiableError: if the loss cannot be differentiated as often as is needed.
        """


@dataclass(frozen=True)
class Exact(Curvature):
    """Reverse over reverse (Pearlmutter 1994, "Fast exact multiplication by the Hessian"): exact up to rounding.

    Costs one more evaluation of the gradient and, per direction, about two. Attention and recurrent layers are
    evaluated by kernels that can be differentiated twice; compiled modules cannot, and take `FiniteDifference`.
    """

    def products(
        self,
        loss: Evaluation,
        params: Vectors,
        grads: Vectors,  # noqa: ARG002 (another curvature needs them)
        directions: Sequence[Vectors],
    ) -> list[list[torch.Tensor]]:
        """See `Curvature.products`."""
        if not directions:
            return []
        try:
            with torch.enable_grad(), _twice_differentiable_kernels():
                gradients = torch.autograd.grad(loss(), list(params), create_graph=True, allow_unused=True)
                # A gradient without a graph is a constant: the loss is linear in that parameter.
                alive = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
                # Left where a function is differentiable once: autograd goes round it and gives 0 in silence.
                if passes_through([gradients[i] for i in alive], "torch::autograd::Error"):
                    raise NotDifferentiableError(
                        "The training loss goes through a torch.autograd.Function that is marked once_differentiable: "
                        "use curvature=FiniteDifference()."
                    )
                if not alive:
                    return [[torch.zeros_like(p) for p in params] for _ in directions]
                return [
                    list(
                        torch.autograd.grad(
                            [gradients[i] for i in alive],
                            list(params),
                            [v[i] for i in alive],
                            retain_graph=at < len(directions) - 1,
                            allow_unused=True,
                            materialize_grads=True,
                        )
                    )
                    for at, v in enumerate(directions)
                ]
        except RuntimeError as error:
            if "not implemented" not in str(error) and "double backward" not in str(error):
                raise
            raise NotDifferentiableError(
                f"The training loss cannot be differentiated twice ({str(error).splitlines()[0]}): use "
                "curvature=FiniteDifference()."
            ) from error


@dataclass(frozen=True)
class FiniteDifference(Curvature):
    """H v = (g(theta + e v) - g(theta)) / e, with e v of relative size `step`: one more gradient per direction.

    Works wherever a gradient does: fused attention, recurrent kernels, compiled modules, mixed precision.

    Args:
        step: size of e v relative to 1 + |theta|, in (0, 1). Default: the square root of the rounding error of the
            parameters' dtype (3e-4 in float32), where the errors of rounding and of curvature balance.

    Raises:
        ConfigurationError: for a step outside (0, 1).
    """

    step: float | None = None

    def __post_init__(self) -> None:
        if self.step is not None and not 0.0 < self.step < 1.0:
            raise ConfigurationError(f"`step` must lie in (0, 1), but got {self.step!r}.")

    @torch.no_grad()
    def products(
        self, loss: Evaluation, params: Vectors, grads: Vectors, directions: Sequence[Vectors]
    ) -> list[list[torch.Tensor]]:
        """See `Curvature.products`."""
        return [self._product(loss, params, grads, v) for v in directions]

    def _product(self, loss: Evaluation, params: Vectors, grads: Vectors, v: Vectors) -> list[torch.Tensor]:
        rounding = max(torch.finfo(p.dtype).eps for p in params)
        step = self.step if self.step is not None else math.sqrt(rounding)
        length = step * (1.0 + _norm(params)) / (_norm(v) + 1e-30)
        before = [p.detach().clone() for p in params]
        try:
            for p, direction in zip(params, v, strict=True):
                p.add_(direction * length.to(p))
            with torch.enable_grad():
                moved = torch.autograd.grad(loss(), list(params), allow_unused=True, materialize_grads=True)
        finally:
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
        return [(m - g).div_(length.to(m)) for m, g in zip(moved, grads, strict=True)]


def _norm(tensors: Vectors) -> torch.Tensor:
    norms = torch.stack([torch.linalg.vector_norm(t.detach()).float() for t in tensors])
    norm: torch.Tensor = torch.linalg.vector_norm(norms)
    return norm


@contextmanager
def _twice_differentiable_kernels() -> Iterator[None]:
    # Fused attention has no double backward, and neither have cuDNN's recurrent kernels.
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield
