"""The trials that are under way, and until when each may be."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

START = 300.0  # seconds from a process of its own to the call of `train`, where there is a limit at all


class Clocks:
    """A clock per trial under way. It stands still while the trial waits for a place where it can run; then the start
    of its process has `START` seconds, or `limit` if that is more; and `train` itself has `limit`.

    Args:
        limit: seconds; None for no limit, neither on the start.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = math.inf if limit is None else limit
        self._start = math.inf if limit is None else max(START, limit)
        self._until: dict[int, tuple[float, str]] = {}

    def submitted(self, number: int) -> None:
        """A trial is under way, but not started yet."""
        self._until[number] = (math.inf, "")

    def launched(self, number: int) -> None:
        """It has a place, and its process starts."""
        words = f"`train` was not called within {self._start:g} s of the start of its process"
        self._until[number] = (time.monotonic() + self._start, words)

    def began(self, number: int) -> None:
        """`train` is being called."""
        self._until[number] = (time.monotonic() + self._limit, f"no end within trial_timeout={self._limit:g} s")

    def ended(self, number: int) -> None:
        """It is not under way any more."""
        del self._until[number]

    def overdue(self) -> list[tuple[int, str]]:
        """The trials whose time is over, and the reason in words."""
        now = time.monotonic()
        return [(number, words) for number, (until, words) in self._until.items() if now > until]

    def __len__(self) -> int:
        return len(self._until)

    def __iter__(self) -> Iterator[int]:
        return iter(self._until)

    def __contains__(self, number: object) -> bool:
        return number in self._until
