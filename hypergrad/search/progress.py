"""How far a study is, for whoever waits for it: one line that updates itself, or a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger("hypergrad.search")


@dataclass(frozen=True)
class Standing:
    """Where a study is.

    Args:
        states: how many trials there are in each state.
        total: how many there are to be; None where that is not known.
        best: the best value so far; None before the first, and with several objectives.
        seconds_left: at the pace of this run so far; None where that is not known.
    """

    states: Mapping[str, int]
    total: int | None
    best: float | None
    seconds_left: float | None

    @property
    def finished(self) -> int:
        """Trials that will not be run again."""
        return sum(self.states.get(state, 0) for state in ("complete", "pruned", "failed"))

    def __str__(self) -> str:
        """One line.

        >>> print(Standing({"complete": 3, "pruned": 1, "running": 2}, 10, 0.125, 90.0))
        4/10 trials, best 0.125, 2 running, 1 pruned, 0 failed, 1:30 left
        """
        said = f"{self.finished}{f'/{self.total}' if self.total is not None else ''} trials"
        said += f", best {self.best:.4g}" if self.best is not None else ""
        said += "".join(f", {self.states.get(state, 0)} {state}" for state in ("running", "pruned", "failed"))
        return said + (f", {_clock(self.seconds_left)} left" if self.seconds_left is not None else "")


class Progress(AbstractContextManager["Progress"], ABC):
    """Shows a `Standing`; as a context manager, from the beginning of a run to its end."""

    every: float = 0.5  # seconds between two looks

    def __init__(self) -> None:
        self._next = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time to look again; says so once."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.every
        return True

    @abstractmethod
    def show(self, standing: Standing) -> None:
        """Say where the study is."""

    def __exit__(self, *_: object) -> None:
        """Nothing more is to come."""


class Silent(Progress):
    """Says nothing."""

    @property
    def is_due(self) -> bool:
        """Never."""
        return False

    def show(self, standing: Standing) -> None:
        """Says nothing."""


class Bar(Progress):
    """One line on the terminal; log messages appear above it."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[None] | None = None
        self._stack = ExitStack()

    def show(self, standing: Standing) -> None:
        """Draw the line anew."""
        if self._bar is None:
            bar_format = "{l_bar}{bar:20}| {desc}" if standing.total else "{desc}"
            self._bar = tqdm(total=standing.total, bar_format=bar_format, dynamic_ncols=True, file=sys.stderr)
            self._stack.enter_context(logging_redirect_tqdm([logging.getLogger(), log]))
        self._bar.n = standing.finished
        self._bar.set_description_str(str(standing), refresh=False)
        self._bar.refresh()

    def __exit__(self, *_: object) -> None:
        """Leave the last line where it is."""
        self._stack.close()
        if self._bar is not None:
            self._bar.close()


class Lines(Progress):
    """A line for files and pipes whenever something has changed, at most every ten seconds."""

    every = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._said = ""

    def show(self, standing: Standing) -> None:
        """Print the line if it is another one."""
        known = str(Standing(standing.states, standing.total, standing.best, None))
        if known != self._said:
            print(standing, file=sys.stderr, flush=True)
            self._said = known


def progress_of(wanted: bool | None) -> Progress:
    """A bar on a terminal, lines elsewhere, or nothing; None asks for a bar on a terminal and for nothing elsewhere."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if wanted is False or (wanted is None and not terminal):
        return Silent()
    return Bar() if terminal else Lines()


class Pace:
    """Counts what a run finishes and says how long the rest will take.

    Args:
        counts: trials by state at the start.
        total: how many there are to be.
        best: the best value at the start.
        sign: 1 if small values are good, else -1.
    """

    def __init__(self, counts: Mapping[str, int], total: int | None, best: float | None, sign: float) -> None:
        self._counts, self._total, self._best, self._sign = Counter(counts), total, best, sign
        self._began, self._done = time.monotonic(), 0

    def finished(self, state: str, value: object) -> None:
        """A trial has ended."""
        self._counts[state] += 1
        self._done += 1
        better = isinstance(value, float) and (self._best is None or self._sign * value < self._sign * self._best)
        if state == "complete" and better:
            self._best = float(value)  # type: ignore[arg-type]

    def standing(self, running: int) -> Standing:
        """Where the study is now."""
        now = Standing({**self._counts, "running": running}, self._total, self._best, None)
        if not self._done or self._total is None:
            return now
        left = (self._total - now.finished) * (time.monotonic() - self._began) / self._done
        return Standing(now.states, self._total, self._best, max(left, 0.0))


def _clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> _clock(59.6), _clock(3700.0)
    ('1:00', '1:01:40')
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
