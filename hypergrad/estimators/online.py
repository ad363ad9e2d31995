"""The one-step hypergradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from hypergrad.curvature import Curvature, Evaluation, Exact
from hypergrad.errors import HypergradError
from hypergrad.estimators.base import Contraction, Estimator, Learned, Tensors, Tracker, without_schedules
from hypergrad.estimators.unrolled import Unrolled, UnrolledTracker
from hypergrad.hyperparameter import OptimizerHyperparameter, ParamGroup
from hypergrad.optimizer.packets import stepped_params
from hypergrad.optimizer.rules import decay_is_decoupled, is_known, lr_from_difference
from hypergrad.optimizer.step import Direction, check_optimizer, differentiate_step, step_per_lr
from hypergrad.optimizer.verify import verify
from hypergrad.scopes import weights


@dataclass(frozen=True)
class Online(Estimator):
    """Looks one step ahead: how does the validation loss after this step depend on this step's hyperparameters?

        h = grad L_val(theta') . d(theta')/d(lam),    theta' = Phi(theta, s, g; lam)

    with the state before the step held constant. Costs one validation gradient per evaluation and, between the step
    and the evaluation, one flat vector of the parameters' size per hyperparameter. What it cannot see is the effect on
    later steps: it prefers learning rates that are best now (Wu et al. 2018, "Understanding short-horizon bias in
    stochastic meta-optimization").

    The hypergradient of the learning rate is that of Almeida et al. 1998 and Baydin et al. 2018 (eq. 4), with the
    validation gradient in place of the next training gradient.

    A hyperparameter in the loss acts through the gradient of this step, whose derivative is taken backwards, for any
    number of them at the cost of one more gradient and one Hessian-vector product (Luketina et al. 2016, "Scalable
    gradient-based tuning of continuous regularization hyperparameters").

    Args:
        closed_forms: read derivatives off the step where the rule is known to allow it; False always takes the
            general derivative (same numbers, slower).
        curvature: how second derivatives of the training loss are computed, for hyperparameters in the loss only.
    """

    closed_forms: bool = True
    curvature: Curvature = field(default_factory=Exact)

    def track(
        self,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[Learned],
        tensors: Tensors | None = None,
    ) -> Tracker:
        """Start to follow an optimizer; checks on a small problem that its step is differentiated correctly.

        Closed forms are not checked: they hold for exact classes of torch.optim, and the tests prove them.
        """
        check_optimizer(optimizer)
        hyperparameters = without_schedules(hyperparameters, "Online")
        verify(optimizer, [h for h in hyperparameters if not (self.closed_forms and is_known(optimizer, h.name))])
        own = _OnlineTracker(optimizer, hyperparameters, self.closed_forms)
        if not tensors:
            return own
        last_step = Unrolled(steps=1, curvature=self.curvature)
        return _WithTensors(own, UnrolledTracker(last_step, optimizer, (), tensors))


# Flat vectors of so many elements: many small tensors take one kernel, and large ones no copy.
_ELEMENTS_AT_A_TIME = 2**22


@dataclass
class _Tangent:
    """d(parameters)/d(value) of one param group: `scale` times flat vectors."""

    vectors: list[torch.Tensor]
    scale: float = 1.0

    def scaled(self, number: torch.Tensor) -> torch.Tensor:
        """A number that was computed with the vectors alone."""
        return number if self.scale == 1.0 else number * self.scale


@dataclass
class _GroupStep:
    """What one tracked step leaves behind for one param group.

    Args:
        params: the parameters that the step moves.
        tangents: by hyperparameter name.
        before: the parameters before the step, flat, if a tangent is to be read off the step as
            `(after - before) / lr`; None otherwise.
    """

    params: list[torch.Tensor]
    tangents: dict[str, _Tangent] = field(default_factory=dict)
    before: list[torch.Tensor] | None = None
    lr: float = 0.0

    @cached_property
    def parts(self) -> list[list[torch.Tensor]]:
        """The parameters, as they share a flat vector: a large one has its own, which is no copy where it need not."""
        parts: list[list[torch.Tensor]] = []
        size = 0
        for p in self.params:
            size += p.numel()
            if not parts or size > _ELEMENTS_AT_A_TIME:
                parts.append([])
                size = p.numel()
            parts[-1].append(p)
        return parts

    def against(
        self, gradients: Mapping[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The norm of the gradient; and by name the inner product with a tangent, and the tangent's norm."""
        products: dict[str, list[torch.Tensor]] = {name: [] for name in self.tangents}
        norms = []
        for i, part in enumerate(self.parts):
            gradient = _flat([gradients[p] for p in part])
            norms.append(torch.linalg.vector_norm(gradient))
            for name, tangent in self.tangents.items():
                products[name].append(torch.dot(gradient, tangent.vectors[i]))
        pairs = {}
        for name, tangent in self.tangents.items():
            norm = _norm([torch.linalg.vector_norm(v) for v in tangent.vectors])
            pairs[name] = tangent.scaled(_sum(products[name])), tangent.scaled(norm).abs()
        return _norm(norms), pairs


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
        self._scopes: dict[str, torch.Tensor | None] = {}

    @property
    def params(self) -> list[torch.Tensor]:
        return [p for group in self._groups for p in group.params]

    def before_step(self, loss: Evaluation | None = None) -> None:  # noqa: ARG002
        groups = self._optimizer.param_groups
        self._groups = [self._closed_forms_of(group) for group in groups]
        self._scopes = {h.name: weights(h, groups) for h in self._hyperparameters}
        for hyperparameter in self._hyperparameters:
            name = hyperparameter.name
            rest = [
                i
                for i, g in enumerate(self._groups)
                if g.params and name not in g.tangents and not (name == "lr" and g.before is not None)
            ]
            if rest:
                self._differentiate(hyperparameter, rest)

    def after_step(self) -> None:
        for step in self._groups:
            if step.before is not None:
                after = map(_flat, step.parts)
                moved = [a - b for a, b in zip(after, step.before, strict=True)]
                step.tangents["lr"], step.before = _Tangent(moved, 1.0 / step.lr), None

    @torch.no_grad()
    def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
        if not self._groups:
            raise HypergradError("There is no tracked step to contract with: call before_step() before the update.")
        groups, self._groups = self._groups, []  # flat vectors of the size of the model are not kept until the next
        device = next((p.device for step in groups for p in step.params), torch.device("cpu"))
        zero = torch.zeros((), device=device)
        found = [step.against(gradients) if step.params else (zero, {}) for step in groups]
        gradient_norms = _stacked([gradient_norm for gradient_norm, _ in found])
        scopes, self._scopes = self._scopes, {}
        result = Contraction({}, {}, {})
        for name in (h.name for h in self._hyperparameters):
            rows = [pairs.get(name, (zero, zero)) for _, pairs in found]
            values, norms = (_stacked(column) for column in zip(*rows, strict=True))
            weight = scopes[name]
            if weight is None:
                result.hypergradients[name], result.tangent_norms[name] = values, norms
                result.gradient_norms[name] = gradient_norms
                continue
            # Each parameter is in one group, so that squares of norms add up.
            w = weight.to(values)
            result.hypergradients[name] = w @ values
            result.tangent_norms[name] = (w.square() @ norms.square()).sqrt()
            result.gradient_norms[name] = ((w != 0).to(values) @ gradient_norms.to(values).square()).sqrt()
        return result

    def _closed_forms_of(self, group: ParamGroup) -> _GroupStep:
        params, lr = stepped_params(group), group.get("lr")
        if not self._closed_forms or not params or not isinstance(lr, (int, float)):
            return _GroupStep(params)
        names = {h.name for h in self._hyperparameters}
        by_difference = "lr" in names and lr_from_difference(self._optimizer, group, lr)
        by_decay = "weight_decay" in names and decay_is_decoupled(self._optimizer, group)
        if not by_difference and not by_decay:
            return _GroupStep(params)
        step = _GroupStep(params, lr=lr)
        before = [_flat(part, copy=True) for part in step.parts]
        if by_decay:
            step.tangents["weight_decay"] = _Tangent(before, -lr)
        if by_difference:
            step.before = before
        return step

    def _differentiate(self, hyperparameter: OptimizerHyperparameter, groups: list[int]) -> None:
        # Groups do not influence each other within a step: one direction serves them all.
        if hyperparameter.name == "lr" and self._closed_forms and is_known(self._optimizer, "lr"):
            moved = step_per_lr(self._optimizer, groups)
        else:
            direction = Direction(hyperparameters={(index, hyperparameter): 1.0 for index in groups})
            moved = differentiate_step(self._optimizer, direction).params
        for index in groups:
            vectors = [
                _flat([moved[p] if p in moved else torch.zeros_like(p) for p in part])
                for part in self._groups[index].parts
            ]
            self._groups[index].tangents[hyperparameter.name] = _Tangent(vectors)


class _WithTensors(Tracker):
    """Hyperparameters of the optimizer forwards, those in the loss backwards."""

    def __init__(self, own: Tracker, tensors: Tracker) -> None:
        self._own, self._tensors = own, tensors

    @property
    def params(self) -> list[torch.Tensor]:
        return list(dict.fromkeys([*self._own.params, *self._tensors.params]))

    @property
    def needs_loss(self) -> bool:
        return True

    def before_step(self, loss: Evaluation | None = None) -> None:
        self._own.before_step(loss)
        self._tensors.before_step(loss)

    def after_step(self) -> None:
        self._own.after_step()

    def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
        own, tensors = self._own.contract(gradients), self._tensors.contract(gradients)
        both = {**own.hypergradients, **tensors.hypergradients}
        return replace(own, hypergradients=both, products=tensors.products, unused=tensors.unused)


def _flat(tensors: Sequence[torch.Tensor], *, copy: bool = False) -> torch.Tensor:
    """End to end, in float32 or wider: one kernel however many tensors there are. Call under no_grad.

    Args:
        copy: also where there is only one, which may be itself otherwise.
    """
    flat = tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])
    if flat.dtype not in (torch.float32, torch.float64):
        return flat.float()
    return flat.clone() if copy and len(tensors) == 1 else flat


def _sum(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    return numbers[0] if len(numbers) == 1 else _stacked(numbers).sum()


def _norm(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of vectors end to end."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(_stacked(norms))


def _stacked(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """One vector, in the widest of the dtypes."""
    if len(values) == 1:  # a param group alone: no copy
        return values[0].reshape(1)
    if any(v.dtype == torch.float64 for v in values):
        values = [v.to(torch.float64) for v in values]
    return torch.stack(list(values))
