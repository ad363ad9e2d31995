"""The one-step hypergradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hypergrad.errors import HypergradError
from hypergrad.estimators.base import Contraction, Estimator, Tracker
from hypergrad.hyperparameter import OptimizerHyperparameter, ParamGroup
from hypergrad.optimizer.closed_form import decay_is_decoupled, lr_from_difference
from hypergrad.optimizer.step import Direction, differentiate_step, stepped_params
from hypergrad.optimizer.verify import verify


@dataclass(frozen=True)
class Online(Estimator):
    """Looks one step ahead: how does the validation loss after this step depend on this step's hyperparameters?

        h = grad L_val(theta') . d(theta')/d(lam),    theta' = Phi(theta, s, g; lam)

    with the state before the step held constant. Costs one validation gradient per evaluation and no memory
    beyond one copy of the parameters. What it cannot see is the effect on later steps: it prefers learning rates
    that are best now (Wu et al. 2018, "Understanding short-horizon bias in stochastic meta-optimization").

    The hypergradient of the learning rate is that of Almeida et al. 1998 and Baydin et al. 2018 (eq. 4), with the
    validation gradient in place of the next training gradient.

    Args:
        closed_forms: read derivatives off the step where the rule is known to allow it; False always takes the
            general derivative (same numbers, slower).
    """

    closed_forms: bool = True

    def track(self, optimizer: torch.optim.Optimizer, hyperparameters: Sequence[OptimizerHyperparameter]) -> Tracker:
        """Start to follow an optimizer; checks on a small problem that its step is differentiated correctly."""
        verify(optimizer, hyperparameters)
        return _OnlineTracker(optimizer, hyperparameters, self.closed_forms)


@dataclass(frozen=True)
class _Tangent:
    """d(parameters)/d(value) of one param group: `scale` times a flat vector, or times the step itself."""

    vector: torch.Tensor | None
    scale: float = 1.0


@dataclass(frozen=True)
class _GroupStep:
    """What one tracked step leaves behind for one param group. `before`: its parameters then, flat, if needed."""

    params: list[torch.Tensor]
    tangents: dict[str, _Tangent] = field(default_factory=dict)
    before: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class _OnlineTracker(Tracker):
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[OptimizerHyperparameter],
        closed_forms: bool,
    ) -> None:
        self._optimizer = optimizer
        self._hyperparameters = hyperparameters
        self._closed_forms = closed_forms
        self._groups: list[_GroupStep] = []

    @property
    def params(self) -> list[torch.Tensor]:
        return [p for group in self._groups for p in group.params]

    def before_step(self) -> None:
        groups = self._optimizer.param_groups
        self._groups = [self._closed_forms_of(group) for group in groups]
        for hyperparameter in self._hyperparameters:
            rest = [i for i, g in enumerate(self._groups) if g.params and hyperparameter.name not in g.tangents]
            if rest:
                self._differentiate(hyperparameter, rest)

    def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
        if not self._groups:
            raise HypergradError("There is no tracked step to contract with: call before_step() before the update.")
        names = [h.name for h in self._hyperparameters]
        rows = [self._contract_group(step, gradients) for step in self._groups]
        return Contraction(
            hypergradients={n: torch.stack([row[n][0] for row in rows]) for n in names},
            tangent_norms={n: torch.stack([row[n][1] for row in rows]) for n in names},
            gradient_norms=torch.stack([row[n][2] for row in rows for n in names[:1]]),
        )

    def _contract_group(
        self, step: _GroupStep, gradients: Mapping[torch.Tensor, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if not step.params:
            zero = torch.zeros((), device=self._device())
            return {h.name: (zero, zero, zero) for h in self._hyperparameters}
        gradient = _flat([gradients[p] for p in step.params])
        result = {}
        for name, tangent in step.tangents.items():
            vector = tangent.vector if tangent.vector is not None else _flat(step.params) - step.before
            result[name] = (gradient @ vector * tangent.scale, vector.norm() * abs(tangent.scale), gradient.norm())
        return result

    def _closed_forms_of(self, group: ParamGroup) -> _GroupStep:
        params, lr = stepped_params(group), group.get("lr")
        if not self._closed_forms or not params or not isinstance(lr, (int, float)):
            return _GroupStep(params)
        names = {h.name for h in self._hyperparameters}
        by_difference = "lr" in names and lr_from_difference(self._optimizer, group, lr)
        by_decay = "weight_decay" in names and decay_is_decoupled(self._optimizer, group)
        before = _flat(params) if by_difference or by_decay else torch.empty(0)
        tangents = {}
        if by_difference:
            tangents["lr"] = _Tangent(None, 1.0 / lr)
        if by_decay:
            tangents["weight_decay"] = _Tangent(before, -lr)
        return _GroupStep(params, tangents, before)

    def _differentiate(self, hyperparameter: OptimizerHyperparameter, groups: list[int]) -> None:
        # Groups do not influence each other within a step: one direction serves them all.
        direction = Direction(hyperparameters={(index, hyperparameter): 1.0 for index in groups})
        moved = differentiate_step(self._optimizer, direction).params
        for index in groups:
            params = self._groups[index].params
            flat = _flat([moved[p] if p in moved else torch.zeros_like(p) for p in params])
            self._groups[index].tangents[hyperparameter.name] = _Tangent(flat)

    def _device(self) -> torch.device:
        device: torch.device = self._optimizer.param_groups[0]["params"][0].device
        return device


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A flat copy, end to end, in float32 or wider: one kernel however many tensors there are."""
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
