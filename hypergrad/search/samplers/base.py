"""What a study asks of a sampler."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.samplers import BaseSampler, RandomSampler

from hypergrad.search.spec import StudySpec
from hypergrad.search.storage import Storage


@dataclass(frozen=True)
class Proposal:
    """A point to try, the trial from whose last checkpoint it starts, if any, and what else to keep of it."""

    params: Mapping[str, Any]
    parent: int | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Sampler(abc.ABC):
    """Chooses the next point. All it remembers is in the storage: a resumed study goes on as if never killed."""

    needs_reports = False  # whether it decides by what trials report while they train
    ends = False  # whether it runs out of points by itself

    def check(self, spec: StudySpec) -> None:  # noqa: B027 - most have nothing to object
        """Raise `ConfigurationError` where this sampler cannot search `spec`."""

    def check_trials(self, trials: int | None) -> None:  # noqa: B027 - most take any number
        """Raise `ConfigurationError` where this sampler cannot do with so many trials in all."""

    def exhausted(self, storage: Storage) -> bool:  # noqa: ARG002
        """Whether there is nothing more to try."""
        return False

    def urgent(self, storage: Storage) -> bool:  # noqa: ARG002
        """Whether a new trial is to be created before waiting ones are continued."""
        return False

    def pauses(self, step: int) -> bool:  # noqa: ARG002
        """Whether a trial that has reported at `step` goes back to wait there."""
        return False

    def continuable(self, storage: Storage, waiting: Sequence[int], running: int) -> Sequence[int]:  # noqa: ARG002
        """Which of the waiting trials may start now; called whenever a place is free."""
        return waiting

    def told(self, spec: StudySpec, number: int) -> BaseSampler:  # noqa: ARG002
        """Optuna's object, which hears of the end of each trial."""
        return RandomSampler()

    @abc.abstractmethod
    def propose(self, storage: Storage, number: int) -> Proposal:
        """The point of the trial `number`, which has just been created."""
