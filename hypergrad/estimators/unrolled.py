"""Reverse-mode hypergradients: recorded steps, differentiated backwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hypergrad.activation_pattern import HeldLoss
from hypergrad.clipping import ClippedLoss
from hypergrad.curvature import Curvature, Evaluation, Exact
from hypergrad.errors import ConfigurationError, HypergradError
from hypergrad.estimators.base import (
    Contraction,
    Estimator,
    Learned,
    Pace,
    Tensors,
    Tracker,
    plain,
    wide,
)
from hypergrad.hyperparameter import OptimizerHyperparameter
from hypergrad.optimizer.packets import gradient_of, stepped_params
from hypergrad.optimizer.recorded import RecordedStep
from hypergrad.optimizer.step import StateVector, check_optimizer
from hypergrad.optimizer.verify import verify
from hypergrad.schedule import Schedule
from hypergrad.scopes import weights


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Records steps and goes back through them: one adjoint for all hyperparameters, however many there are.

        lam_bar += alpha dPhi/dlam,    alpha <- alpha dPhi/ds,    alpha_T = grad L_val(theta_T)

    Exact over the recorded steps, like `Forward` over the same ones. Each costs one copy of the parameters, their
    gradients and the optimizer's state, keeps its batch alive, and takes one evaluation of its loss and one
    Hessian-vector product on the way back, whatever the number of hyperparameters: memory grows with `steps`, and so
    does a checkpoint of the callback, which holds them.

    Reverse-HG of Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter optimization", algorithm 1;
    truncated after Shaban et al. 2019, "Truncated back-propagation for bilevel optimization". The trajectory is stored
    and not, as in Maclaurin et al. 2015, reversed.

    Args:
        steps: how many of the latest steps are differentiated, at least 1; None takes all since tracking began.
        curvature: how Hessian-vector products are computed.

    Raises:
        ConfigurationError: for a number of steps below 1, or no curvature.
    """

    steps: int | None = None
    curvature: Curvature = field(default_factory=Exact)

    def __post_init__(self) -> None:
        steps = self.steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ConfigurationError(f"`steps` must be an integer of at least 1, or None, but got {steps!r}.")
        if not isinstance(self.curvature, Curvature):
            raise ConfigurationError(f"`curvature` must be Exact() or FiniteDifference(), but got {self.curvature!r}.")

    @property
    def needs_every_step(self) -> bool:
        """Whether every step of a run must be tracked, and not only the one before a validation loss."""
        return self.steps != 1

    def track(
        self,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[Learned],
        tensors: Tensors | None = None,
    ) -> Tracker:
        """Start to follow an optimizer; checks on a small problem that its steps are differentiated correctly."""
        check_optimizer(optimizer)
        verify(optimizer, [plain(h) for h in hyperparameters], carried=self.steps != 1, backwards=True)
        return UnrolledTracker(self, optimizer, hyperparameters, tensors or {})


class UnrolledTracker(Tracker):
    """Follows one optimizer for `Unrolled`, and for the hyperparameters in the loss of `Online`."""

    def __init__(
        self,
        estimator: Unrolled,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[Learned],
        tensors: Tensors,
    ) -> None:
        self._estimator = estimator
        self._optimizer = optimizer
        self._hyperparameters = hyperparameters
        self._tensors = tensors
        self._steps: deque[_Step] = deque(maxlen=estimator.steps)
        self._count = 0
        self._scopes: dict[str, torch.Tensor | None] = {}  # of the last step
        self._groups = 0

    @property
    def params(self) -> list[torch.Tensor]:
        moved = self._moved()
        return [*moved, *self._tensors.values()] if moved else []

    @property
    def needs_loss(self) -> bool:
        return bool(self._tensors) or self._estimator.steps != 1

    @property
    def needs_pattern(self) -> bool:
        # With tensors in the loss its gradient is taken anew.
        return self.needs_loss and self._estimator.curvature.uses_pattern and not self._tensors

    @property
    def losses(self) -> list[Evaluation | None]:
        return [step.loss for step in self._carried]

    def state_dict(self) -> dict[str, Any]:
        """The recorded steps that the next one will not push out."""
        return {"count": self._count, "steps": [step.state_dict() for step in self._carried]}

    def load_state_dict(self, state: dict[str, Any], losses: Sequence[Evaluation | None] = ()) -> None:
        """Continue from the steps of the tracker that returned `state`; not where it had other tensors in its loss."""
        self._count = state["count"]
        known = {h.name: h for h in map(plain, self._hyperparameters)}
        for saved, loss in zip(state["steps"], losses, strict=True):
            if saved["tensors"].keys() == self._tensors.keys():
                self._steps.append(_Step.restored(saved, self._optimizer, known, loss))

    @property
    def _carried(self) -> list[_Step]:
        steps, limit = list(self._steps), self._estimator.steps
        return steps if limit is None else steps[max(len(steps) - limit + 1, 0) :]

    def before_step(self, loss: Evaluation | None = None) -> None:
        if loss is None and self.needs_loss:
            raise HypergradError("Unrolled needs the training loss of each step: call before_step(loss).")
        groups = self._optimizer.param_groups
        if loss is not None and self._count == 0 and self._estimator.steps != 1:
            self._estimator.curvature.check(loss, {p: gradient_of(p) for g in groups for p in stepped_params(g)})
        if isinstance(loss, HeldLoss):
            loss.shrink()
        own = [plain(h) for h in self._hyperparameters]
        values = {(i, h): h.read(group) for h in own for i, group in enumerate(groups)}
        then = {name: t.detach().clone() for name, t in self._tensors.items()}
        self._scopes = {h.name: weights(h, groups) for h in self._hyperparameters if not isinstance(h, Schedule)}
        self._groups = len(groups)
        self._steps.append(_Step(RecordedStep(self._optimizer), loss, values, self._count, then))
        self._count += 1

    def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
        if not self._steps:
            raise HypergradError("There is no tracked step to contract with: call before_step() before the update.")
        params, groups = self._moved(), self._groups
        dtype = wide(list(gradients.values()))
        device = params[0].device if params else torch.device("cpu")
        coordinates = [(i, plain(h)) for h in self._hyperparameters for i in range(groups)]
        sizes = {h.name: len(h.knots) if isinstance(h, Schedule) else groups for h in self._hyperparameters}
        totals = {name: torch.zeros(size, dtype=dtype, device=device) for name, size in sizes.items()}
        direct = {name: gradients[t].to(dtype) for name, t in self._tensors.items()}
        used: set[str] = set()
        values: dict[torch.Tensor, torch.Tensor] = {}
        adjoint = StateVector({p: gradients[p].detach() for p in params})
        products = 0
        rates = {c: _rates(c[1], [step.values.get(c) for step in self._steps]) for c in coordinates}
        for at, recorded in reversed(list(enumerate(self._steps))):
            step, loss = recorded.record, recorded.loss
            # Parameters that joined the optimizer later were until then what they were at their first step.
            values.update(step.values)
            # A param group may have been added since.
            back = step.pull_back(adjoint, [c for c in coordinates if c in recorded.values])
            none = torch.zeros(())
            for h in self._hyperparameters:
                numbers = [back.hyperparameters.get((i, plain(h)), none).to(device, dtype) for i in range(groups)]
                if isinstance(h, Schedule):
                    for knot, rate in h.rates(self._steps[at].index).items():
                        totals[h.name][knot] += rate * torch.stack(numbers).sum()
                else:
                    totals[h.name] += torch.stack([rates[i, h][at] * n for i, n in enumerate(numbers)])
            moved = set(step.moved)
            # A parameter without a gradient stayed where it was, and so did its state.
            before = {p: t for p, t in adjoint.params.items() if p not in moved} | back.before.params
            state = {p: t for p, t in adjoint.state.items() if p not in moved} | back.before.state
            if loss is not None and (at > 0 or self._tensors):
                with _values(self._tensors, recorded.tensors), step.parameters_at(values):
                    rows = self._through_gradient(step, loss, params, back.grads)
                products += 1
                for p in params:
                    row = rows.pop(p, None)
                    if row is not None:
                        before[p] = before[p] + row if p in before else row
                for name, tensor in self._tensors.items():
                    row = rows.get(tensor)
                    if row is not None:
                        used.add(name)
                        direct[name] = direct[name] + row.to(dtype)
            adjoint = StateVector(before, state)
        unused = tuple(name for name in self._tensors if name not in used)
        # Rates are relative to the last step, where one number moves its groups by these weights.
        totals |= {name: w.to(device, dtype) @ totals[name] for name, w in self._scopes.items() if w is not None}
        return Contraction({**totals, **direct}, {}, {}, products=products, unused=unused)

    def _through_gradient(
        self,
        step: RecordedStep,
        loss: Evaluation,
        params: list[torch.Tensor],
        cotangents: Mapping[torch.Tensor, torch.Tensor],
    ) -> dict[torch.Tensor, torch.Tensor | None]:
        """How the gradient of a step, weighed by its cotangent, depends on parameters and on the loss's tensors."""
        inputs = [*params, *self._tensors.values()]
        known = step.gradients
        if isinstance(loss, ClippedLoss):
            raw, jacobian = loss.gradients(step.moved, [known[p] for p in step.moved])
            rows = jacobian([cotangents.get(p) for p in step.moved])  # symmetric, so its own transpose
            known = dict(zip(step.moved, raw, strict=True))
            cotangents = {p: row for p, row in zip(step.moved, rows, strict=True) if row is not None}
        grads = [known.get(p) for p in params]
        known_grads = [*grads, *[None] * len(self._tensors)]
        with self._estimator.curvature.at(loss, inputs, known_grads, products=1) as product:
            rows = product([*(cotangents.get(p) for p in params), *[None] * len(self._tensors)])
        return dict(zip(inputs, rows, strict=True))

    def _moved(self) -> list[torch.Tensor]:
        return list(dict.fromkeys(p for step in self._steps for p in step.record.moved))


@dataclass(frozen=True)
class _Step:
    record: RecordedStep
    loss: Evaluation | None
    values: dict[tuple[int, OptimizerHyperparameter], float]
    index: int
    tensors: dict[str, torch.Tensor]

    def state_dict(self) -> dict[str, Any]:
        """All but the loss, in plain containers."""
        return {
            "record": self.record.state_dict(),
            "values": [[group, h.name, value] for (group, h), value in self.values.items()],
            "index": self.index,
            "tensors": dict(self.tensors),
        }

    @classmethod
    def restored(
        cls,
        state: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        known: Mapping[str, OptimizerHyperparameter],
        loss: Evaluation | None,
    ) -> _Step:
        """The step whose `state_dict` this is; hyperparameters that are no longer known are left out."""
        record = RecordedStep.restored(optimizer, state["record"])
        values = {(group, known[name]): value for group, name, value in state["values"] if name in known}
        return cls(record, loss, values, state["index"], dict(state["tensors"]))


@contextmanager
def _values(tensors: Tensors, then: Tensors) -> Iterator[None]:
    """Hyperparameters in the loss have the values that they had at a step, inside the block."""
    now = {name: t.detach().clone() for name, t in tensors.items()}
    try:
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(then[name])
        yield
    finally:
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(now[name])


def _rates(hyperparameter: OptimizerHyperparameter, values: Sequence[float | None]) -> list[float]:
    """How far the value of each step moves with the last one, see `Pace`; not at all where there was none."""
    pace, rates = Pace(), list[float]()
    for value in values:
        if value is None:
            rates.append(0.0)
            continue
        rate, anew = pace.step(hyperparameter, value)
        rates = [*([0.0] * len(rates) if anew else rates), rate]
    return [rate * pace.unit for rate in rates]
