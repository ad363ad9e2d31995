"""A user's own gradcheck: is the hypergradient right on this model, with this optimizer and these losses?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal

import torch

from hypergrad.errors import ConfigurationError
from hypergrad.estimators.base import Estimator, without_schedules
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.implicit import Implicit
from hypergrad.estimators.online import Online
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.functional import Loss, ModelT, Name, hypergradient, split_names
from hypergrad.hyperparameter import OptimizerHyperparameter
from hypergrad.isolation import preserved
from hypergrad.loss_hyperparameter import Hyperparameter
from hypergrad.rng import preserved_rng
from hypergrad.scopes import reference, split_where_asked, units, write
from hypergrad.torch_internals import raw_step

Verdict = Literal["agrees", "disagrees", "inconclusive"]
# Relative steps of the central differences: the right one depends on the model, so several are tried.
_STEPS = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)


@dataclass(frozen=True)
class CheckedHyperparameter:
    """One hypergradient beside its central difference.

    Args:
        name: the hyperparameter, followed by the index of param group, tensor or element where there are several.
        estimate: d(validation loss)/d(value) by the estimator.
        difference: the same by central differences of the whole computation, of the step whose neighbours agree best.
        uncertainty: how far the neighbouring steps are apart: rounding, or a loss with kinks.
        verdict: `"inconclusive"` where the uncertainty is more than a tenth of the difference itself.
    """

    name: str
    estimate: float
    difference: float
    uncertainty: float
    verdict: Verdict


@dataclass(frozen=True)
class CheckResult:
    """What `check` found; `print` it for a table."""

    rows: tuple[CheckedHyperparameter, ...]

    @property
    def ok(self) -> bool:
        """Whether every hyperparameter agrees."""
        return all(row.verdict == "agrees" for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'':20}{'estimate':>14}{'difference':>14}{'uncertainty':>14}"]
        lines += [
            f"{r.name:20}{r.estimate:14.5g}{r.difference:14.5g}{r.uncertainty:14.1g}  {r.verdict}" for r in self.rows
        ]
        return "\n".join(lines)


def check(
    model: ModelT,
    optimizer: torch.optim.Optimizer,
    train_losses: Sequence[Loss[ModelT]],
    val_loss: Loss[ModelT],
    hyperparameters: Sequence[Name] = ("lr", "weight_decay"),
    estimator: Estimator | None = None,
    *,
    tolerance: float = 1e-2,
) -> CheckResult:
    """Compare an estimator with central differences of the same few steps, on a user's own model.

    Every training and validation loss is evaluated 15 times per hyperparameter and param group; take few steps. Of a
    `Hyperparameter` with more than eight elements, eight are checked. Model, optimizer and the global RNG streams are
    left exactly as they were found. In float32 the differences are good to a few digits only; a model in float64 shows
    more.

    Args:
        tolerance: relative difference up to which the two agree, beside the uncertainty of the differences.
        model, optimizer, train_losses, val_loss, hyperparameters, estimator: as for `hypergradient`.

    Raises:
        ConfigurationError: for an estimator that is meant to differ from the derivative of the run: `Implicit`, and
            `Forward` with a decay between 0 and 1 or without curvature.

    >>> theta = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> half_square = lambda model: 0.5 * (model.weight - 3.0).square().sum()
    >>> sgd = torch.optim.SGD(theta.parameters(), lr=0.1, momentum=0.9)
    >>> check(theta, sgd, [half_square] * 3, half_square, ["lr", "momentum"], Forward()).ok
    True
    """
    if isinstance(estimator, Implicit):
        raise ConfigurationError(
            "Implicit differentiates the minimum and not the run that led to it, so a few steps cannot confirm it: "
            "look at HypergradientResult.status and .residual, or check Unrolled() on the same losses."
        )
    if isinstance(estimator, Forward) and (
        0.0 < estimator.decay < 1.0 or (estimator.decay and not estimator.curvature)
    ):
        raise ConfigurationError(
            f"{estimator!r} leaves a part of the derivative out on purpose, so differences cannot confirm it. Check "
            "Forward(decay=1.0) with a curvature, whose parts are the same."
        )
    found = hypergradient(model, optimizer, train_losses, val_loss, hyperparameters, estimator)
    first = _first_step(estimator or Online(), len(train_losses))
    named, modules = split_names(optimizer, model, hyperparameters)
    own = without_schedules(named, "check")
    with split_where_asked(optimizer, own):
        counts = {h.name: len(units(h, optimizer.param_groups)) for h in own}
    spots: list[tuple[str, int, OptimizerHyperparameter | Hyperparameter, int]] = []
    for h in own:
        spots += [(h.name, i, h, counts[h.name]) for i in range(counts[h.name])]
    for path, module in modules.items():
        elements = torch.linspace(0, module.value.numel() - 1, min(8, module.value.numel())).long().tolist()
        spots += [(path, i, module, module.value.numel()) for i in elements]
    rows = []
    for path, index, what, count in spots:
        difference, uncertainty = _Run(model, optimizer, train_losses, val_loss, what, index, first).difference()
        estimate = float(found.grads[path].reshape(-1)[index])
        kind = what.per if isinstance(what, OptimizerHyperparameter) else "element"
        verdict = _verdict(estimate, difference, uncertainty, tolerance)
        name = path if count == 1 else f"{path}, {kind} {index}"
        rows.append(CheckedHyperparameter(name, estimate, difference, uncertainty, verdict))
    return CheckResult(tuple(rows))


def _first_step(estimator: Estimator, steps: int) -> int:
    """The step from which on the estimator differentiates."""
    if isinstance(estimator, Unrolled) and estimator.steps is not None:
        return max(0, steps - estimator.steps)
    return 0 if estimator.needs_every_step else steps - 1


@dataclass(frozen=True)
class _Run(Generic[ModelT]):
    """The validation loss as a function of one number of a hyperparameter, used from step `first` on."""

    model: ModelT
    optimizer: torch.optim.Optimizer
    train_losses: Sequence[Loss[ModelT]]
    val_loss: Loss[ModelT]
    hyperparameter: OptimizerHyperparameter | Hyperparameter
    index: int
    first: int

    def difference(self) -> tuple[float, float]:
        """The central difference whose next neighbours agree with it best, and how far they are off."""
        what = self.hyperparameter
        if isinstance(what, OptimizerHyperparameter):
            with split_where_asked(self.optimizer, [what]):
                groups = self.optimizer.param_groups
                value = what.read(groups[reference(what, groups, units(what, groups)[self.index])])
        else:
            value = float(what.value.reshape(-1)[self.index])
        room = min(value, 1.0 - value) if 0.0 < value < 1.0 else abs(value) or 1e-3
        table, rounding = [], []
        for relative in _STEPS:
            h = relative * room
            (above, digit), (below, _) = self.value_at(value + h), self.value_at(value - h)
            table.append((above - below) / (2 * h))
            rounding.append(digit / (2 * h))
        spread = [
            max(abs(table[i] - table[i - 1]), abs(table[i] - table[i + 1]), rounding[i])
            for i in range(1, len(table) - 1)
        ]
        finite = [s if math.isfinite(s) else math.inf for s in spread]
        best = finite.index(min(finite))
        return table[best + 1], finite[best]

    def value_at(self, value: float) -> tuple[float, float]:
        """The validation loss, and what its last digit stands for."""
        what, optimizer = self.hyperparameter, self.optimizer
        own = [what] if isinstance(what, OptimizerHyperparameter) else []
        with preserved(optimizer, self.model, parameters=True), preserved_rng(), split_where_asked(optimizer, own):
            for i, loss in enumerate(self.train_losses):
                if i == self.first:
                    self._write(value)
                self.optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss(self.model))
                raw_step(self.optimizer)
            found = self.val_loss(self.model)
            return found.item(), abs(found.item()) * torch.finfo(found.dtype).eps

    def _write(self, value: float) -> None:
        if isinstance(self.hyperparameter, OptimizerHyperparameter):
            what, groups = self.hyperparameter, self.optimizer.param_groups
            write(what, groups, units(what, groups)[self.index], value)
        else:
            self.hyperparameter.value.view(-1)[self.index] = value  # a copy: `preserved` puts the user's back


def _verdict(estimate: float, difference: float, uncertainty: float, tolerance: float) -> Verdict:
    if not uncertainty <= 0.1 * abs(difference):
        return "inconclusive"
    return "agrees" if abs(estimate - difference) <= tolerance * abs(difference) + 2 * uncertainty else "disagrees"
