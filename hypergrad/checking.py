"""A user's own gradcheck: is the hypergradient right on this model, with this optimizer and these losses?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal

import torch

from hypergrad.errors import ConfigurationError
from hypergrad.estimators.base import Estimator
from hypergrad.estimators.forward import Forward
from hypergrad.functional import Loss, ModelT, hypergradient
from hypergrad.hyperparameter import OptimizerHyperparameter, resolve
from hypergrad.isolation import preserved
from hypergrad.rng import preserved_rng
from hypergrad.torch_internals import raw_step

Verdict = Literal["agrees", "disagrees", "inconclusive"]
# Relative steps of the central differences: the right one depends on the model, so several are tried.
_STEPS = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)


@dataclass(frozen=True)
class CheckedHyperparameter:
    """One hypergradient beside its central difference.

    Args:
        name: the hyperparameter, followed by the param group's index where there are several.
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
    hyperparameters: Sequence[str | OptimizerHyperparameter] = ("lr", "weight_decay"),
    estimator: Estimator | None = None,
    *,
    tolerance: float = 1e-2,
) -> CheckResult:
    """Compare an estimator with central differences of the same few steps, on a user's own model.

    Every training and validation loss is evaluated 15 times per hyperparameter and param group; take few steps. Model,
    optimizer and the global RNG streams are left exactly as they were found. In float32 the differences are good to a
    few digits only; a model in float64 shows more.

    Args:
        tolerance: relative difference up to which the two agree, beside the uncertainty of the differences.
        model, optimizer, train_losses, val_loss, hyperparameters, estimator: as for `hypergradient`.

    Raises:
        ConfigurationError: for an estimator that is meant to differ from the derivative of the run: `Forward` with a
            decay between 0 and 1 or without curvature.

    >>> theta = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> half_square = lambda model: 0.5 * (model.weight - 3.0).square().sum()
    >>> sgd = torch.optim.SGD(theta.parameters(), lr=0.1, momentum=0.9)
    >>> check(theta, sgd, [half_square] * 3, half_square, ["lr", "momentum"], Forward()).ok
    True
    """
    if isinstance(estimator, Forward) and (
        0.0 < estimator.decay < 1.0 or (estimator.decay and not estimator.curvature)
    ):
        raise ConfigurationError(
            f"{estimator!r} leaves a part of the derivative out on purpose, so differences cannot confirm it. Check "
            "Forward(decay=1.0) with a curvature, whose parts are the same."
        )
    found = hypergradient(model, optimizer, train_losses, val_loss, hyperparameters, estimator)
    every_step = estimator is not None and estimator.needs_every_step
    rows = []
    groups = len(optimizer.param_groups)
    for h in resolve(optimizer, hyperparameters):
        for group in range(groups):
            run = _Run(model, optimizer, train_losses, val_loss, h, group, 0 if every_step else len(train_losses) - 1)
            difference, uncertainty = run.difference()
            estimate = float(found.grads[h.name].reshape(-1)[group])
            name = h.name if groups == 1 else f"{h.name}, group {group}"
            verdict = _verdict(estimate, difference, uncertainty, tolerance)
            rows.append(CheckedHyperparameter(name, estimate, difference, uncertainty, verdict))
    return CheckResult(tuple(rows))


@dataclass(frozen=True)
class _Run(Generic[ModelT]):
    """The validation loss as a function of one value in one param group, used from step `first` on."""

    model: ModelT
    optimizer: torch.optim.Optimizer
    train_losses: Sequence[Loss[ModelT]]
    val_loss: Loss[ModelT]
    hyperparameter: OptimizerHyperparameter
    group: int
    first: int

    def difference(self) -> tuple[float, float]:
        """The central difference whose next neighbours agree with it best, and how far they are off."""
        value = self.hyperparameter.read(self.optimizer.param_groups[self.group])
        room = min(value, 1.0 - value) if 0.0 < value < 1.0 else abs(value) or 1e-3
        table = []
        for relative in _STEPS:
            h = relative * room
            table.append((self.value_at(value + h) - self.value_at(value - h)) / (2 * h))
        spread = [max(abs(table[i] - table[i - 1]), abs(table[i] - table[i + 1])) for i in range(1, len(table) - 1)]
        finite = [s if math.isfinite(s) else math.inf for s in spread]
        best = finite.index(min(finite))
        return table[best + 1], finite[best]

    def value_at(self, value: float) -> float:
        with preserved(self.optimizer, self.model, parameters=True), preserved_rng():
            for i, loss in enumerate(self.train_losses):
                self.optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss(self.model))
                if i == self.first:
                    self.hyperparameter.write(self.optimizer.param_groups[self.group], value)
                raw_step(self.optimizer)
            return self.val_loss(self.model).item()


def _verdict(estimate: float, difference: float, uncertainty: float, tolerance: float) -> Verdict:
    if not uncertainty <= 0.1 * abs(difference):
        return "inconclusive"
    return "agrees" if abs(estimate - difference) <= tolerance * abs(difference) + 2 * uncertainty else "disagrees"
