"""The samplers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from hypergrad.errors import ConfigurationError
from hypergrad.search.choice import Choice, chosen
from hypergrad.search.samplers.base import Sampler
from hypergrad.search.samplers.from_optuna import FromOptuna, Given
from hypergrad.search.samplers.grid import Grid
from hypergrad.search.samplers.pbt import PBT
from hypergrad.search.samplers.refine import Refine


def _random(**options: Any) -> Sampler:
    return FromOptuna(lambda _, trial_seed: RandomSampler(seed=trial_seed, **options))


def _qmc(**options: Any) -> Sampler:
    def make(study_seed: int, trial_seed: int) -> BaseSampler:
        settings: dict[str, Any] = {"scramble": True, "independent_sampler": RandomSampler(trial_seed), **options}
        return QMCSampler(seed=study_seed, warn_independent_sampling=False, **settings)

    return FromOptuna(make)


def _tpe(**options: Any) -> Sampler:
    return FromOptuna(lambda _, trial_seed: TPESampler(seed=trial_seed, **options))


def _gp(**options: Any) -> Sampler:
    return FromOptuna(lambda _, trial_seed: GPSampler(seed=trial_seed, warn_independent_sampling=False, **options))


def _cmaes(**options: Any) -> Sampler:
    return FromOptuna(lambda _, trial_seed: CmaEsSampler(seed=trial_seed, warn_independent_sampling=False, **options))


def _genetic(**options: Any) -> Sampler:
    return FromOptuna(lambda _, trial_seed: NSGAIISampler(seed=trial_seed, **options))


_BY_NAME: Mapping[str, Callable[..., Sampler]] = {
    "random": _random,
    "grid": Grid,
    "qmc": _qmc,
    "tpe": _tpe,
    "gp": _gp,
    "cmaes": _cmaes,
    "genetic": _genetic,
    "refine": Refine,
    "pbt": PBT,
}


def sampler_of(sampler: Any) -> Choice[Sampler]:
    """What `Study(sampler=...)` was given, as a sampler and as the text that is stored.

    Raises:
        ConfigurationError: for an unknown name or option, or anything that is no sampler.
    """
    if isinstance(sampler, BaseSampler):
        return Choice(f"{type(sampler).__name__} object", Given(sampler))
    if isinstance(sampler, Sampler):
        options = {k: v for k, v in vars(sampler).items() if k in inspect.signature(type(sampler)).parameters}
        names = [name for name, kind in _BY_NAME.items() if kind is type(sampler)]
        if not names:
            return Choice(f"{type(sampler).__name__} object", sampler)
        sampler = (names[0], options)
    try:
        return chosen("sampler", sampler, _BY_NAME)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"sampler={sampler!r}: {error}.") from error
