"""What the driver and a worker tell each other: plain values only, so that they cross processes and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Job:
    """One attempt at one trial.

    Args:
        number, params, seed, attempt, folder: of the trial.
        monitors: the names of the objectives.
        prune_on: the metric to report while training.
        prunes: whether somebody may decide, from what is reported, that the trial stops.
        folds_apart: whether the pruner compares fold by fold rather than running means.
        inherited: whether the checkpoint in the folder is another trial's.
    """

    number: int
    params: Mapping[str, Any]
    seed: int
    attempt: int
    folder: str
    monitors: tuple[str, ...]
    prune_on: str
    prunes: bool
    folds_apart: bool
    inherited: bool

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The job that `to_json` described."""
        return cls(**{**data, "monitors": tuple(data["monitors"])})


@dataclass(frozen=True)
class Beginning:
    """A worker has loaded `train` and calls it next."""


@dataclass(frozen=True)
class Report:
    """A worker asks whether to go on, having reached `value` at `step`."""

    step: int
    value: float


@dataclass(frozen=True)
class Verdict:
    """The answer: None to go on, else why not; `later` if the trial will be continued another time."""

    stop: str | None = None
    later: bool = False


@dataclass(frozen=True)
class Result:
    """How an attempt ended, as far as the worker itself can tell.

    Args:
        state: `"complete"`, `"pruned"` (it was told to stop, or raised `TrialPruned`), `"failed"`, `"waiting"` (it was
            told to stop and will be continued), or `"invalid"`: what `train` returned is no objective, and will not be
            in any other trial.
        values: one per objective, of a complete trial.
        metrics: everything that it logged or returned, last values.
        logged: the names among them that its own logger has written to event files.
        reason: what is to be said of it.
        traceback: of an exception.
    """

    state: Literal["complete", "pruned", "failed", "waiting", "invalid"]
    values: tuple[float, ...] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    logged: tuple[str, ...] = ()
    reason: str | None = None
    traceback: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """The result that `to_json` described."""
        values = data["values"]
        return cls(**{**data, "values": None if values is None else tuple(values), "logged": tuple(data["logged"])})
