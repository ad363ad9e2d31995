"""Optuna's samplers, asked point by point so that constraints and conditions are ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, QMCSampler, RandomSampler
from optuna.trial import FrozenTrial

from hypergrad.errors import ConfigurationError
from hypergrad.search.errors import SpaceError
from hypergrad.search.parameter import Categorical, Constant, Float, Int, Parameter
from hypergrad.search.samplers.base import Proposal, Sampler
from hypergrad.search.seeding import derived_seed
from hypergrad.search.space import Space
from hypergrad.search.spec import StudySpec
from hypergrad.search.storage import Storage
from hypergrad.search.unit import drawn

# From the study's seed and the trial's: the sampler's object. Two seeds, because the scrambling of a
# quasi-random sequence must stay the same over the whole study, where everything else is drawn anew per trial.
Make = Callable[[int, int], BaseSampler]
_MODEL_TRIES, _TRIES = 20, 10_000


class FromOptuna(Sampler):
    """One of Optuna's samplers.

    The object is made anew for each trial, seeded by the study's seed and the trial's number. All that these samplers
    need to know is in the storage, so the sequence of points does not depend on processes, kills and resumes.

    Args:
        make: builds the object.
    """

    def __init__(self, make: Make) -> None:
        self._make = make

    def check(self, spec: StudySpec) -> None:
        """Raise `ConfigurationError` where this sampler cannot search `spec`."""
        try:
            sampler = self.told(spec, 0)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"sampler={spec.sampler!r}: {error}") from error
        require_feasible(spec.space)
        if isinstance(sampler, CmaEsSampler) and len(spec.directions) > 1:
            raise ConfigurationError("CMA-ES has one objective: with several use sampler='genetic', 'tpe' or 'gp'.")

    def told(self, spec: StudySpec, number: int) -> BaseSampler:
        """Optuna's object for one trial."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return self._make(spec.seed, derived_seed(spec.seed, number, 1))

    def propose(self, storage: Storage, number: int) -> Proposal:
        """Ask until a point satisfies the constraints; models that insist on the same point give way to chance."""
        study, space = storage.study, storage.spec.space
        sampler = study.sampler = self.told(storage.spec, number)
        trial = storage.frozen(number)
        sampler.before_trial(study, trial)
        trial = storage.frozen(number)
        for attempt in range(_TRIES):
            if attempt == _MODEL_TRIES:
                sampler = RandomSampler(derived_seed(storage.spec.seed, number, 2))
            point = self._point(storage, sampler, trial)
            if space.is_feasible(point):
                return Proposal(point)
        raise SpaceError(f"{_TRIES} points in a row violated {[c.text for c in space.constraints]}: widen the space.")

    def _point(self, storage: Storage, sampler: BaseSampler, trial: FrozenTrial) -> dict[str, Any]:
        study, space = storage.study, storage.spec.space
        relative = sampler.sample_relative(study, trial, _jointly_sampled(storage, sampler, trial))
        point: dict[str, Any] = {}
        for name, parameter in space.items():
            if not space.is_active(name, point):
                continue
            if isinstance(parameter, Constant):
                point[name] = parameter.value
            elif name in relative:
                point[name] = _plain(parameter, relative[name])
            else:
                drawn = sampler.sample_independent(study, trial, name, parameter.distribution())
                point[name] = _plain(parameter, drawn)
        return point


class Given(FromOptuna):
    """A sampler object of the user's, used as it is; its random stream starts anew when the study is resumed."""

    def __init__(self, sampler: BaseSampler) -> None:
        super().__init__(lambda *_: sampler)


def _jointly_sampled(storage: Storage, sampler: BaseSampler, trial: FrozenTrial) -> dict[str, BaseDistribution]:
    if isinstance(sampler, QMCSampler):
        # Optuna infers what varies from the trials so far; we know it, and so the first point is quasi-random too.
        parameters = storage.spec.space.items()
        return {n: p.distribution() for n, p in parameters if not isinstance(p, (Categorical, Constant))}
    return sampler.infer_relative_search_space(storage.study, trial)


def require_feasible(space: Space) -> None:
    """Raise `SpaceError` if chance finds no point that satisfies the constraints."""
    generator = np.random.default_rng(0)
    for _ in range(_TRIES if space.constraints else 0):
        point: dict[str, Any] = {}
        for name, parameter in space.items():
            if space.is_active(name, point):
                point[name] = drawn(parameter, generator)
        if space.is_feasible(point):
            return
    if space.constraints:
        raise SpaceError(
            f"No point of the space satisfies {[c.text for c in space.constraints]}: of {_TRIES} random ones none did."
        )


def _plain(parameter: Parameter, value: Any) -> Any:
    if isinstance(parameter, Int):
        return int(value)
    if isinstance(parameter, Float):
        return min(max(float(value), parameter.low), parameter.high)  # rounding may leave the bounds
    return value
