"""Where trials run. A new place needs one file with one class."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from hypergrad.search.messages import Job, Report, Result, Verdict


@dataclass(frozen=True)
class Launched:
    """The trial has a place, and its process starts. A trial that waits for a place is charged no time."""

    number: int


@dataclass(frozen=True)
class Began:
    """Its process is there, has loaded `train` and calls it: its time runs from here."""

    number: int


@dataclass(frozen=True)
class Reported:
    """A trial asks whether to go on; it waits for `Executor.reply`."""

    number: int
    report: Report


@dataclass(frozen=True)
class Ended:
    """The attempt is over and everything that it held is free. `result` is None if it died, and `reason` says how."""

    number: int
    result: Result | None
    reason: str | None = None


Event = Launched | Began | Reported | Ended


class Executor(abc.ABC):
    """Runs jobs in processes of their own, `capacity` at a time.

    It tells all four events of every job, in order; of one that dies, those that it lived to see, and `Ended`.
    """

    capacity: int

    @abc.abstractmethod
    def open(self, payload: bytes) -> None:
        """Get ready to run jobs of the pickled `train` function."""

    @abc.abstractmethod
    def submit(self, job: Job) -> None:
        """Start a job. There are never more than `capacity`."""

    @abc.abstractmethod
    def poll(self, timeout: float) -> list[Event]:
        """What has happened; waits up to `timeout` seconds for something to happen."""

    @abc.abstractmethod
    def reply(self, number: int, verdict: Verdict) -> None:
        """Answer the report of a trial. One that has died meanwhile does not mind."""

    @abc.abstractmethod
    def kill(self, number: int) -> None:
        """End a job at once, with all processes that it started. `poll` tells when it is gone."""

    @abc.abstractmethod
    def close(self) -> None:
        """End all jobs at once and let go of everything. May be called twice."""
