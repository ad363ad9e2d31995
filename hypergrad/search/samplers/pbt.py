"""Population-based training: bad members become changed copies of good ones, weights and all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.samplers import RandomSampler

from hypergrad.errors import ConfigurationError
from hypergrad.search.parameter import Constant, Float, Int, Parameter
from hypergrad.search.record import TrialRecord
from hypergrad.search.samplers.base import Proposal, Sampler
from hypergrad.search.samplers.from_optuna import FromOptuna, require_feasible
from hypergrad.search.seeding import derived_seed
from hypergrad.search.spec import StudySpec
from hypergrad.search.storage import Storage
from hypergrad.search.unit import drawn, from_unit, to_unit


class PBT(Sampler):
    """Exploit and explore from checkpoints (Jaderberg et al. 2017, "Population Based Training of Neural Networks").

    Every `interval` steps the whole population is ranked. The worst members end as pruned; for each of them a new trial
    starts from the last checkpoint of one of the best, with every parameter perturbed. Members wait for each other
    at these steps, so the result depends neither on the number of workers nor on which of them is faster, and a
    population larger than the number of workers takes turns.

    `train` must report at every step (`trial.trainer` reports once an epoch) and start from `trial.checkpoint`. Under
    `trial.trainer` what is in the optimizer's param groups (learning rate, weight decay, momentum, …) is then the new
    trial's, not the checkpoint's.

    Args:
        population: members, at least 2.
        interval: steps between two rankings, at least 1.
        steps: at which step `train` reports for the last time. No ranking there.
        fraction: share of the population that is replaced, and share that is copied, in (0, 0.5].
        factor: a perturbed number is multiplied or divided by it, each with probability 1/2; greater than 1. Numbers
            without a log scale move by the same share of their range where that is more.
        resample: probability with which a parameter is drawn anew instead, in [0, 1]; categoricals only change so.

    Raises:
        ConfigurationError: for values outside these ranges.
    """

    needs_reports = True
    ends = True

    def __init__(
        self,
        population: int = 8,
        interval: int = 1,
        steps: int = 10,
        fraction: float = 0.25,
        factor: float = 1.25,
        resample: float = 0.25,
    ) -> None:
        for name, value, least in (("population", population, 2), ("interval", interval, 1), ("steps", steps, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"`{name}` must be an integer of at least {least}, but got {value!r}.")
        if not 0.0 < fraction <= 0.5:
            raise ConfigurationError(f"`fraction` must lie in (0, 0.5], but got {fraction!r}.")
        if not factor > 1.0:
            raise ConfigurationError(f"`factor` must be greater than 1, but got {factor!r}.")
        if not 0.0 <= resample <= 1.0:
            raise ConfigurationError(f"`resample` must lie in [0, 1], but got {resample!r}.")
        self.population, self.interval, self.steps = population, interval, steps
        self.fraction, self.factor, self.resample = fraction, factor, resample

    def check(self, spec: StudySpec) -> None:
        """Raise `ConfigurationError` where there is no one ranking, or the pruner would rank too."""
        if len(spec.directions) > 1:
            raise ConfigurationError("PBT ranks by one objective: with several use sampler='genetic'.")
        if spec.pruner != "none":
            raise ConfigurationError(f"PBT decides itself who stops: leave out pruner={spec.pruner!r}.")
        require_feasible(spec.space)

    def check_trials(self, trials: int | None) -> None:
        """Raise `ConfigurationError` for fewer trials than members, who would wait for the missing ones."""
        if trials is not None and trials < self.population:
            raise ConfigurationError(f"`trials` must be at least PBT's population, {self.population}, but is {trials}.")

    def exhausted(self, storage: Storage) -> bool:
        """Whether the population is complete and nobody has to be replaced."""
        return len(storage.numbers()) >= self.population and not self.urgent(storage)

    def urgent(self, storage: Storage) -> bool:
        """Whether a member has been removed whose place is empty: its model must be copied before it trains on."""
        return self._vacancy(storage) is not None

    def pauses(self, step: int) -> bool:
        """Members meet every `interval` steps, but not at the end."""
        return step % self.interval == 0 and step < self.steps

    def continuable(self, storage: Storage, waiting: Sequence[int], running: int) -> Sequence[int]:
        """Those that are furthest behind; once all have met, and before anybody goes on, the worst are removed."""
        if len(storage.numbers()) < self.population:
            return [n for n in waiting if self._level(storage, storage.record(n)) == 0]
        alive = [r for r in storage.records() if r.state not in ("pruned", "failed")]
        levels = {record.number: self._level(storage, record) for record in alive}
        level = min(levels.values(), default=0)
        if self._ranking_is_due(storage, alive, levels, level):
            if running:
                return []  # one of them has just arrived, and is on its way to wait
            self._remove_worst(storage, alive, int(level))
        if self._vacancy(storage) is not None and self._room(storage) > 0:
            return []  # the copies are made first, while their originals stand still
        return [n for n in waiting if levels.get(n) == level and storage.record(n).state == "waiting"]

    def propose(self, storage: Storage, number: int) -> Proposal:
        """A random member of the first population, or a perturbed copy of one of the best."""
        lost = self._vacancy(storage)
        if lost is None:
            return FromOptuna(lambda _, seed: RandomSampler(seed)).propose(storage, number)
        spec, level = storage.spec, storage.attributes(lost)["removed_at"]
        generator = np.random.default_rng(derived_seed(spec.seed, number, 1))
        best = self._ranked(storage, [r for r in storage.records() if r.state == "waiting"], level)
        parent = best[generator.integers(min(len(best), self._count(len(best) + 1)))]
        for _ in range(10_000):
            point: dict[str, Any] = {}
            for name, parameter in spec.space.items():
                if spec.space.is_active(name, point):
                    point[name] = self._explored(parameter, parent.params.get(name), generator)
            if spec.space.is_feasible(point):
                return Proposal(point, parent.number, {"level": level, "replaces": lost, "parent": parent.number})
        raise ConfigurationError(f"No neighbour of {parent.params} satisfies the constraints.")

    # ---------------------------------------------------------------------------------------------------- inside

    def _count(self, size: int) -> int:
        return max(1, int(self.fraction * size))

    def _level(self, storage: Storage, record: TrialRecord) -> float:
        """How many rankings lie behind a member."""
        if record.state == "complete":
            return float("inf")
        inherited: int = storage.attributes(record.number).get("level", 0)
        return max(inherited, max(record.curve, default=0) // self.interval)

    def _ranked(self, storage: Storage, records: Sequence[TrialRecord], level: int) -> list[TrialRecord]:
        sign, step = (1.0 if storage.spec.directions[0] == "minimize" else -1.0), level * self.interval
        return sorted((r for r in records if step in r.curve), key=lambda r: (sign * r.curve[step], r.number))

    def _ranking_is_due(
        self, storage: Storage, alive: Sequence[TrialRecord], levels: dict[int, float], level: float
    ) -> bool:
        if not 1 <= level < float("inf") or any(levels[record.number] != level for record in alive):
            return False
        # A copy has not been measured at this level, which says that the ranking is behind us.
        measured = len(self._ranked(storage, alive, int(level))) == len(alive) >= 2
        return measured and self._room(storage) > 0 and self._vacancy(storage) is None

    def _remove_worst(self, storage: Storage, alive: Sequence[TrialRecord], level: int) -> None:
        ranked = self._ranked(storage, alive, level)
        for record in ranked[len(ranked) - min(self._count(len(ranked)), self._room(storage)) :]:
            storage.set_attribute(record.number, "removed_at", level)
            reason = f"PBT replaced it at step {level * self.interval} by a copy of a better one"
            storage.resume_and_finish(record.number, "pruned", reason)

    def _room(self, storage: Storage) -> int:
        return self.population if storage.target is None else storage.target - len(storage.numbers())

    def _vacancy(self, storage: Storage) -> int | None:
        filled, removed = set(), []
        for number in storage.numbers():
            attributes = storage.attributes(number)
            filled.add(attributes.get("replaces"))
            if "removed_at" in attributes and storage.record(number).state == "pruned":
                removed.append(number)
        return next((number for number in removed if number not in filled), None)

    def _explored(self, parameter: Parameter, value: Any, generator: np.random.Generator) -> Any:
        anew, up = generator.random() < self.resample, generator.random() < 0.5
        if anew or value is None or isinstance(parameter, Constant):
            return drawn(parameter, generator)
        if isinstance(parameter, (Float, Int)):
            share = (self.factor - 1.0) if up else (1.0 / self.factor - 1.0)
            moved = value * (1.0 + share)
            if not parameter.log:
                moved = value + share * max(abs(value), parameter.high - parameter.low)
            return from_unit(parameter, to_unit(parameter, min(max(moved, parameter.low), parameter.high)))
        return value
