"""The pruners by name, and the one place where it is decided that a trial stops."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)
from optuna.trial import TrialState

from hypergrad.errors import ConfigurationError
from hypergrad.search.choice import Choice, chosen
from hypergrad.search.record import TrialRecord
from hypergrad.search.storage import Storage, quiet


def _asha(min_resource: int = 1, **options: Any) -> BasePruner:
    # Optuna's "auto" waits for the first complete trial and then guesses; the first epoch is a fine first rung.
    return SuccessiveHalvingPruner(min_resource=min_resource, **options)


def _patience(patience: int = 5, min_delta: float = 0.0) -> BasePruner:
    return PatientPruner(None, patience=patience, min_delta=min_delta)


_BY_NAME: Mapping[str, Callable[..., BasePruner]] = {
    "none": NopPruner,
    "median": MedianPruner,
    "asha": _asha,
    "hyperband": HyperbandPruner,
    "patience": _patience,
    "threshold": ThresholdPruner,
    "wilcoxon": WilcoxonPruner,
}


def pruner_of(pruner: Any) -> Choice[BasePruner]:
    """What `Study(pruner=...)` was given, as Optuna's pruner and as the text that is stored.

    Raises:
        ConfigurationError: for an unknown name or option, or anything that is no pruner.
    """
    if isinstance(pruner, BasePruner):
        return Choice(f"{type(pruner).__name__} object", pruner)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return chosen("pruner", pruner, _BY_NAME)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"pruner={pruner!r}: {error} Pass options as (name, {{option: value}}).") from error


class Pruning:
    """Decides for one study. Not-a-number and infinity end a trial whatever the pruner says.

    Optuna's pruners know one objective. With several, they see a study in memory whose only objective is the metric
    that is pruned on, filled from the stored curves.
    """

    def __init__(self, choice: Choice[BasePruner], storage: Storage) -> None:
        self._name, self._pruner, self._storage = choice.text, choice.item, storage
        storage.study.pruner = choice.item
        self._view = None if len(storage.spec.directions) == 1 else _OneObjective(storage, choice.item)

    def decide(self, number: int, step: int, value: float) -> str | None:
        """Why trial `number`, which has reported `value` at `step`, should stop; None if it may go on."""
        if not math.isfinite(value):
            return f"{self._storage.spec.prune_on} is {value} at step {step}"
        if isinstance(self._pruner, NopPruner):
            return None
        if self._view is not None:
            stop = self._view.decide(number, step, value)
        else:
            stop = self._pruner.prune(self._storage.study, self._storage.frozen(number))
        return (
            f"{self._name} stopped it at step {step}, where {self._storage.spec.prune_on} was {value:g}"
            if stop
            else None
        )

    def finished(self, record: TrialRecord) -> None:
        """The trial has ended."""
        if self._view is not None:
            self._view.finished(record)


class _OneObjective:
    def __init__(self, storage: Storage, pruner: BasePruner) -> None:
        self._pruner = pruner
        self._memory = optuna.storages.InMemoryStorage()
        direction = optuna.study.StudyDirection[storage.spec.pruning_direction.upper()]
        with quiet():
            self._study_id = self._memory.create_new_study([direction], "pruning")
        self._study = optuna.load_study(study_name="pruning", storage=self._memory, pruner=pruner)
        self._ids: dict[int, int] = {}
        for record in storage.records():
            # Replayed, because pruners leave notes at the trials, such as the rungs that they have reached.
            for step, value in record.curve.items():
                self.decide(record.number, step, value)
            if record.finished:
                self.finished(record)

    def decide(self, number: int, step: int, value: float) -> bool:
        if number not in self._ids:
            self._ids[number] = self._memory.create_new_trial(self._study_id)
        trial = self._ids[number]
        self._memory.set_trial_intermediate_value(trial, step, value)
        return self._pruner.prune(self._study, self._memory.get_trial(trial))

    def finished(self, record: TrialRecord) -> None:
        if record.number in self._ids and record.curve:
            state = TrialState.COMPLETE if record.state == "complete" else TrialState.PRUNED
            last = record.curve[max(record.curve)]
            self._memory.set_trial_state_values(self._ids[record.number], state, [last])
