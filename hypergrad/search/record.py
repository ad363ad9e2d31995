"""What is known of one trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hypergrad.search.failure import FILE

State = Literal["waiting", "running", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the storage knows it.

    Args:
        number: 0, 1, … in the order of creation.
        params: the values of all active parameters, constants included; empty while they are not drawn yet.
        value: the objective of a complete trial (one number per objective where there are several), the last value
            that a pruned one reported, else None.
        state: `"waiting"` to be started or continued, `"running"`, `"complete"`, `"pruned"` or `"failed"`.
        reason: why it was pruned or failed, or why its training stopped early; None where there is nothing to say.
        metrics: the last value of everything that it logged, and what `train` returned.
        attempts: how many times it was started; more than 1 after a retry or a resume.
        failures: why earlier attempts ended, oldest first.
        duration: seconds in attempts whose end is known.
        curve: what it reported, by step.
        folder: its logs, checkpoints and event files.
    """

    number: int
    params: Mapping[str, Any]
    value: float | tuple[float, ...] | None
    state: State
    reason: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    attempts: int = 0
    failures: tuple[str, ...] = ()
    duration: float = 0.0
    curve: Mapping[int, float] = field(default_factory=dict)
    folder: Path = Path()

    def line(self) -> str:
        """What is said of it in a log."""
        value = "" if self.value is None else f" {self.value}"
        reason = f" ({self.reason})" if self.reason else ""
        return f"Trial {self.number} {self.state}{value}{reason}, {self.duration:.1f} s, {dict(self.params)}"

    @property
    def error(self) -> Path | None:
        """The file with the tracebacks of its failed attempts; None if it has none."""
        path = self.folder / FILE
        return path if path.exists() else None

    @property
    def finished(self) -> bool:
        """Whether it will not be run again."""
        return self.state in ("complete", "pruned", "failed")
