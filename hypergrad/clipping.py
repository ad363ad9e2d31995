"""The derivative through gradient clipping: of the step that was really taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hypergrad.autodiff import requiring_grad
from hypergrad.curvature import Evaluation, SharedLoss, check_same, mean_of
from hypergrad.errors import ConfigurationError

_Map = Callable[[Sequence[torch.Tensor | None]], list[torch.Tensor | None]]
_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Clipping:
    """What happens to the gradients of all parameters of an optimizer before its step.

        by norm:   c(g) = g * min(1, limit / (|g| + 1e-6)),    |g| over all parameters (torch.nn.utils.clip_grad_norm_)
        by value:  c(g) = min(max(g, -limit), limit), element by element      (torch.nn.utils.clip_grad_value_)

    Args:
        limit: positive.
        by: what is limited.

    Raises:
        ConfigurationError: for a value outside its range.

    >>> [round(x, 3) for x in Clipping(1.0).applied([torch.tensor([3.0, 4.0])])[0].tolist()]
    [0.6, 0.8]
    """

    limit: float
    by: Literal["norm", "value"] = "norm"

    def __post_init__(self) -> None:
        if not self.limit > 0.0:
            raise ConfigurationError(f"`limit` must be positive, but got {self.limit!r}.")
        if self.by not in ("norm", "value"):
            raise ConfigurationError(f"`by` must be 'norm' or 'value', but got {self.by!r}.")

    @torch.no_grad()
    def applied(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The clipped gradients; None stays None."""
        if self.by == "value":
            return [None if g is None else g.clamp(-self.limit, self.limit) for g in gradients]
        scale = (self.limit / (_norm(gradients) + _EPS)).clamp(max=1.0)
        return [None if g is None else g * scale.to(g) for g in gradients]

    @torch.no_grad()
    def jacobian(self, gradients: Sequence[torch.Tensor | None]) -> _Map:
        """d(c)/d(g) at these gradients, as a map of vectors of their shapes. It is symmetric."""
        if self.by == "value":
            inside = [None if g is None else g.abs() <= self.limit for g in gradients]
            return lambda v: [None if x is None or m is None else x * m for x, m in zip(v, inside, strict=True)]
        total = _norm(gradients)
        clipped = total + _EPS > self.limit
        scale = torch.where(clipped, self.limit / (total + _EPS), torch.ones_like(total))
        # d(limit / (|g| + eps)) = -limit / (|g| + eps)^2 * (g . dg) / |g|
        slope = torch.where(clipped, self.limit / ((total + _EPS).square() * total), torch.zeros_like(total))

        def along(v: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
            pairs = [(g, x) for g, x in zip(gradients, v, strict=True) if g is not None and x is not None]
            inner = sum(((g * x).sum().to(total) for g, x in pairs), torch.zeros_like(total))
            rows: list[torch.Tensor | None] = []
            for g, x in zip(gradients, v, strict=True):
                # A gradient is scaled by the norm of all, so that it moves also where its own direction is 0.
                straight = None if x is None else x * scale.to(x)
                if g is not None:
                    bent = g * (slope * inner).to(g)
                    straight = -bent if straight is None else straight - bent
                rows.append(straight)
            return rows

        return along


class ClippedLoss(SharedLoss):
    """A training loss whose gradient is clipped before the step is taken: callable like any other `Evaluation`."""

    def __init__(self, loss: Evaluation, clipping: Clipping) -> None:
        super().__init__(loss, mean_of(loss))
        self.clipping = clipping

    def gradients(
        self, params: Sequence[torch.Tensor], clipped: Sequence[torch.Tensor | None]
    ) -> tuple[list[torch.Tensor], _Map]:
        """The gradients before they were clipped, and d(clipped)/d(gradient) there. Takes one gradient.

        Args:
            params: those whose gradients are clipped together, as they stand.
            clipped: their gradients as the real step has them.

        Raises:
            NotDifferentiableError: if the gradient of this loss, clipped, is another one.
        """
        with requiring_grad(params), torch.enable_grad():
            own = torch.autograd.grad(self.loss(), list(params), allow_unused=True, materialize_grads=True)
        raw = [g for g in self.mean([g.detach() for g in own], params) if g is not None]
        check_same(self.clipping.applied(raw), clipped)
        return raw, self.clipping.jacobian(raw)


def _norm(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
    if not norms:
        return torch.zeros(())
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
    return total
