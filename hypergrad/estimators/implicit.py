"""Implicit differentiation: the response of a minimum to hyperparameters in its loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from hypergrad.curvature import Curvature, Evaluation, Exact
from hypergrad.errors import ConfigurationError, HypergradError, HyperparameterError
from hypergrad.estimators.base import Contraction, Estimator, Learned, Tensors, Tracker, wide
from hypergrad.optimizer.packets import gradient_of, stepped_params
from hypergrad.solvers import CG, Solver


@dataclass(frozen=True)
class Implicit(Estimator):
    """Takes the parameters for a minimum of the training loss and asks how that minimum moves:

        h = dL_val/dlam - (d2L_train / dtheta dlam)' x,    (H + damping) x = grad L_val(theta)

    Memory and time do not depend on the number of hyperparameters: the way to thousands or millions of them. What
    happened before does not matter, so neither does the optimizer: its own hyperparameters are refused. The number is
    as good as the minimum is one: `HypergradientResult.status` and `.residual` report on the linear system, and away
    from a minimum the hypergradient is biased in ways that they do not show.

    Pedregosa 2016, "Hyperparameter optimization with approximate gradient" (CG); Lorraine et al. 2020, "Optimizing
    millions of hyperparameters by implicit differentiation" (Neumann); Hataya & Yamada 2023 (Nystrom).

    Args:
        solver: `CG()`, `Neumann()` or `Nystrom()`.
        damping: added to the Hessian's eigenvalues, at least 0: makes an indefinite one invertible.
        batches: the Hessian is that of the mean of so many of the latest training losses, at least 1.
        curvature: how Hessian-vector products are computed.

    Raises:
        ConfigurationError: for a value outside its range.
    """

    solver: Solver = field(default_factory=CG)
    damping: float = 0.0
    batches: int = 1
    curvature: Curvature = field(default_factory=Exact)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise ConfigurationError(f"`solver` must be CG(), Neumann() or Nystrom(), but got {self.solver!r}.")
        if not (math.isfinite(self.damping) and self.damping >= 0.0):
            raise ConfigurationError(f"`damping` must be at least 0, but got {self.damping!r}.")
        if isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 1:
            raise ConfigurationError(f"`batches` must be an integer of at least 1, but got {self.batches!r}.")
        if not isinstance(self.curvature, Curvature):
            raise ConfigurationError(f"`curvature` must be Exact() or FiniteDifference(), but got {self.curvature!r}.")

    @property
    def needs_every_step(self) -> bool:
        """Whether every step of a run must be tracked, and not only the one before a validation loss."""
        return self.batches > 1

    def track(
        self,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[Learned],
        tensors: Tensors | None = None,
    ) -> Tracker:
        """Start to follow an optimizer, whose parameters are differentiated.

        Raises:
            HyperparameterError: for hyperparameters of the optimizer.
        """
        if hyperparameters:
            raise HyperparameterError(
                f"Implicit cannot serve {', '.join(h.name for h in hyperparameters)}: where a minimum lies does not "
                "depend on how the optimizer got there. Use Online(), Forward() or Unrolled() for hyperparameters of "
                "the optimizer; put a weight decay into the loss as a Hyperparameter."
            )
        if not tensors:
            raise HyperparameterError("Implicit needs at least one Hyperparameter in the training loss.")
        return _ImplicitTracker(self, optimizer, tensors)


class _ImplicitTracker(Tracker):
    def __init__(self, estimator: Implicit, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
        self._estimator = estimator
        self._optimizer = optimizer
        self._tensors = tensors
        self._losses: deque[Evaluation] = deque(maxlen=estimator.batches)
        self._moved: list[torch.Tensor] = []

    @property
    def params(self) -> list[torch.Tensor]:
        return [*self._moved, *self._tensors.values()] if self._moved else []

    @property
    def needs_loss(self) -> bool:
        return True

    @property
    def losses(self) -> list[Evaluation]:
        return list(self._losses)[1 - self._estimator.batches :] if self._estimator.batches > 1 else []

    def load_state_dict(self, state: dict[str, Any], losses: Sequence[Evaluation | None] = ()) -> None:  # noqa: ARG002
        """Continue with the batches of another tracker."""
        self._losses.extend(loss for loss in losses if loss is not None)

    def before_step(self, loss: Evaluation | None = None) -> None:
        if loss is None:
            raise HypergradError("Implicit needs the training loss of each step: call before_step(loss).")
        self._moved = [p for group in self._optimizer.param_groups for p in stepped_params(group)]
        if not self._losses:
            self._estimator.curvature.check(loss, {p: gradient_of(p) for p in self._moved})
        self._losses.append(loss)

    def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
        if not self._losses:
            raise HypergradError("There is no tracked step to contract with: call before_step() before the update.")
        params, tensors, damping = self._moved, self._tensors, self._estimator.damping
        inputs = [*params, *tensors.values()]
        dtype = wide(list(gradients.values()))
        sizes = [p.numel() for p in params]

        def parts(flat: torch.Tensor) -> list[torch.Tensor | None]:
            pieces = zip(torch.split(flat, sizes), params, strict=True)
            return [*(piece.view(p.shape).to(p) for piece, p in pieces), *[None] * len(tensors)]

        with ExitStack() as stack:
            products = [
                stack.enter_context(self._estimator.curvature.at_minimum(loss, inputs, [None] * len(inputs)))
                for loss in self._losses
            ]

            def operator(v: torch.Tensor) -> torch.Tensor:
                rows = [product(parts(v))[: len(params)] for product in products]
                return damping * v + sum((_flat(r, params, dtype) for r in rows), torch.zeros_like(v)) / len(products)

            g = _flat([gradients[p] for p in params], params, dtype)
            solution = self._estimator.solver.solve(operator, g, damping)
            rows = [product(parts(solution.x))[len(params) :] for product in products]
        hypergradients, unused = {}, list[str]()
        for at, (name, tensor) in enumerate(tensors.items()):
            found = [row[at] for row in rows]
            if all(f is None for f in found):
                unused.append(name)
            mixed = sum((f.to(dtype) for f in found if f is not None), torch.zeros_like(tensor, dtype=dtype))
            hypergradients[name] = gradients[tensor].to(dtype) - mixed / len(products)
        # The last one is for the derivative by the hyperparameters.
        spent = (solution.products + 1) * len(products)
        return Contraction(hypergradients, {}, {}, solution.status, solution.residual, spent, tuple(unused))


def _flat(rows: Sequence[torch.Tensor | None], params: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if r is None else r).reshape(-1).to(dtype) for r, p in zip(rows, params, strict=True)]
    )
