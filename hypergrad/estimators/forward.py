"""Forward-mode hypergradients: the tangent of the whole run, carried along with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hypergrad.curvature import Curvature, Evaluation, Exact
from hypergrad.errors import ConfigurationError, HypergradError
from hypergrad.estimators.base import Contraction, Estimator, Tracker
from hypergrad.hyperparameter import OptimizerHyperparameter
from hypergrad.optimizer.step import Direction, StepTangents, check_optimizer, differentiate_step, stepped_params
from hypergrad.optimizer.verify import verify


@dataclass(frozen=True)
class Forward(Estimator):
    """Carries Z = d(parameters, optimizer state)/d(lam) through every step:

        Z' = dPhi/ds Z + dPhi/dlam,    h = grad L_val(theta) . Z_theta

    so that the hypergradient sees the effect of a hyperparameter on all steps since tracking began, in memory that does
    not grow with their number: one copy of parameters and optimizer state per hyperparameter and param group. Each of
    them costs one Hessian-vector product and one differentiated step per training step.

    Forward-HG of Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter optimization", eqs. 13-15;
    real-time recurrent learning of a hyperparameter.

    Args:
        decay: Z is multiplied by it before each step, in [0, 1]: 1 is exact over the whole run, 0 looks one step ahead
            as `Online` does, between them the effect on later steps fades.
        curvature: how Hessian-vector products are computed; None drops them: the gradient of every step is then taken
            to be what it was, whatever the parameters.

    Raises:
        ConfigurationError: for a decay outside [0, 1].
    """

    decay: float = 1.0
    curvature: Curvature | None = field(default_factory=Exact)

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigurationError(f"`decay` must lie in [0, 1], but got {self.decay!r}.")
        if self.curvature is not None and not isinstance(self.curvature, Curvature):
            raise ConfigurationError(
                f"`curvature` must be Exact(), FiniteDifference() or None, but got {self.curvature!r}."
            )

    @property
    def needs_every_step(self) -> bool:
        """Whether every step of a run must be tracked, and not only the one before a validation loss."""
        return self.decay > 0.0

    @property
    def needs_training_loss(self) -> bool:
        """Whether steps must be tracked with an evaluation of their training loss."""
        return self.decay > 0.0 and self.curvature is not None

    def track(self, optimizer: torch.optim.Optimizer, hyperparameters: Sequence[OptimizerHyperparameter]) -> Tracker:
        """Start to follow an optimizer; checks on a small problem that its steps are differentiated correctly."""
        check_optimizer(optimizer)
        verify(optimizer, hyperparameters, carried=self.decay > 0.0)
        return _ForwardTracker(self, optimizer, hyperparameters)


class _ForwardTracker(Tracker):
    def __init__(
        self,
        estimator: Forward,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[OptimizerHyperparameter],
    ) -> None:
        self._estimator = estimator
        self._optimizer = optimizer
        self._hyperparameters = hyperparameters
        self._tangents: dict[tuple[int, OptimizerHyperparameter], StepTangents] = {}

    @property
    def params(self) -> list[torch.Tensor]:
        return list(dict.fromkeys(p for tangents in self._tangents.values() for p in tangents.params))

    def before_step(self, loss: Evaluation | None = None) -> None:
        optimizer = self._optimizer
        stepped = [stepped_params(group) for group in optimizer.param_groups]
        self._fade()
        for h in self._hyperparameters:
            for i in range(len(stepped)):
                self._tangents.setdefault((i, h), StepTangents())
        moved = {p: None for params in stepped for p in params}
        curved = self._curved(loss, list(moved))
        for (i, h), before in self._tangents.items():
            direction = Direction({(i, h): 1.0}, params=before.params, grads=curved.get((i, h), {}), state=before.state)
            after = differentiate_step(optimizer, direction)
            # A parameter without a gradient stays where it is, and so does its tangent.
            kept = StepTangents(
                {p: t for p, t in before.params.items() if p not in moved},
                {p: t for p, t in before.state.items() if p not in moved},
            )
            self._tangents[i, h] = StepTangents({**kept.params, **after.params}, {**kept.state, **after.state})

    @torch.no_grad()
    def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
        if not self._tangents:
            raise HypergradError("There is no tracked step to contract with: call before_step() before the update.")
        groups = range(len(self._optimizer.param_groups))
        device = next(iter(gradients)).device if gradients else torch.device("cpu")
        wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients.values()) else torch.float32
        zero = torch.zeros((), device=device, dtype=wide)
        hypergradients: dict[str, torch.Tensor] = {}
        tangent_norms: dict[str, torch.Tensor] = {}
        for h in self._hyperparameters:
            tangents = [self._tangents[i, h].params for i in groups]
            dots = [[(gradients[p].to(wide) * t.to(wide)).sum() for p, t in ts.items()] for ts in tangents]
            squares = [[t.to(wide).square().sum() for t in ts.values()] for ts in tangents]
            hypergradients[h.name] = torch.stack([sum(values, zero) for values in dots])
            tangent_norms[h.name] = torch.stack([sum(values, zero).sqrt() for values in squares])
        # A group's hyperparameter acts, through the loss, on the parameters of all.
        norm = sum((g.to(wide).square().sum() for g in gradients.values()), zero).sqrt()
        return Contraction(hypergradients, tangent_norms, norm.expand(len(groups)))

    def _fade(self) -> None:
        decay = self._estimator.decay
        if decay == 0.0:
            self._tangents = {}
        elif decay < 1.0:
            self._tangents = {
                key: StepTangents(
                    {p: decay * t for p, t in tangents.params.items()},
                    {p: {name: decay * t for name, t in entry.items()} for p, entry in tangents.state.items()},
                )
                for key, tangents in self._tangents.items()
            }

    def _curved(
        self, loss: Evaluation | None, params: list[torch.Tensor]
    ) -> dict[tuple[int, OptimizerHyperparameter], dict[torch.Tensor, torch.Tensor]]:
        """The tangent of every gradient, by direction: H Z."""
        curvature = self._estimator.curvature
        keys = [key for key, tangents in self._tangents.items() if tangents.params]
        if curvature is None or not keys:
            return {}
        if loss is None:
            raise HypergradError("Forward needs the training loss of each step: call before_step(loss).")
        # Also parameters that this step does not move count: the gradients of others depend on them.
        involved = list(dict.fromkeys([*params, *(p for key in keys for p in self._tangents[key].params)]))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in involved]
        directions = [[self._tangents[key].params.get(p, torch.zeros_like(p)) for p in involved] for key in keys]
        products = curvature.products(loss, involved, grads, directions)
        moved = set(params)
        return {
            key: {p: t for p, t in zip(involved, product, strict=True) if p in moved}
            for key, product in zip(keys, products, strict=True)
        }
