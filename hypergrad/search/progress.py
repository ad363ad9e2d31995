"""How far a study is, for whoever waits for it: one line that updates itself, or a line in the log now and then."""

from __future__ import annotations

import logging
import os
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

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


class Tolerant(Progress):
    """Another one, whose first error is logged and its last: a study does not end with the terminal that shows it."""

    def __init__(self, shown: Progress) -> None:
        super().__init__()
        self.every = shown.every
        self._shown: Progress | None = shown

    @property
    def is_due(self) -> bool:
        """As the other one says, and never any more once that has failed."""
        return self._shown is not None and self._shown.is_due

    def show(self, standing: Standing) -> None:
        """Have it shown."""
        if self._shown is None:
            return
        try:
            self._shown.show(standing)
        except Exception as error:  # a closed terminal, a broken pipe, a stream of somebody's own
            self._give_up(error)

    def __exit__(self, *_: object) -> None:
        """End the other one."""
        shown, self._shown = self._shown, None
        if shown is not None:
            with suppress(Exception):
                shown.__exit__(None, None, None)

    def _give_up(self, error: Exception) -> None:
        self.__exit__()
        log.warning("Progress is not shown any more (%s: %s); the study goes on.", type(error).__name__, error)


class Silent(Progress):
    """Says nothing."""

    @property
    def is_due(self) -> bool:
        """Never."""
        return False

    def show(self, standing: Standing) -> None:
        """Says nothing."""


class _Stream:
    """Standard error for tqdm, which does not get over errors of it: the first is kept, and nothing written after."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self._stream.write(text)
            except Exception as error:
                self.error = error
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except Exception as error:
                self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Bar(Progress):
    """One line on the terminal; log messages appear above it."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[None] | None = None
        self._stack, self._stream = ExitStack(), _Stream(sys.stderr)

    def show(self, standing: Standing) -> None:
        """Draw the line anew."""
        width = _width(self._stream)
        if self._bar is None:
            bar_format = "|{bar:20}| {desc}" if standing.total and width >= 90 else "{desc}"
            self._bar = tqdm(total=standing.total, bar_format=bar_format, ncols=width, file=self._stream)
            self._stack.enter_context(logging_redirect_tqdm([logging.getLogger(), log]))
        self._bar.n, self._bar.ncols = standing.finished, width
        self._bar.set_description_str(str(standing), refresh=False)
        self._bar.refresh()
        if self._stream.error is not None:
            raise self._stream.error

    def __exit__(self, *_: object) -> None:
        """Leave the last line where it is."""
        self._stack.close()
        if self._bar is not None:
            self._bar.close()


def _width(stream: Any) -> int:
    """Columns to write in; a terminal that does not know how many it has gets as many as most have."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0
    return columns - 1 if columns > 20 else 119


class Lines(Progress):
    """A line for files and pipes whenever something has changed, at most every five seconds."""

    every = 5.0

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
    return Tolerant(Bar() if terminal else Lines())


class Pace:
    """Counts what a run finishes and says how long the rest will take.

    Args:
        counts: trials by state at the start.
        total: how many there are to be.
        best: the best value at the start.
        sign: 1 if small values are good, else -1.
        timeout: seconds for the run; None for no limit.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        total: int | None,
        best: float | None,
        sign: float,
        timeout: float | None = None,
    ) -> None:
        self._counts, self._total, self._best, self._sign = Counter(counts), total, best, sign
        self._timeout = timeout
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
        elapsed = time.monotonic() - self._began
        left = [self._timeout - elapsed] if self._timeout is not None else []
        if self._done and self._total is not None:
            left.append((self._total - now.finished) * elapsed / self._done)
        return replace(now, seconds_left=max(0.0, min(left))) if left else now


def _clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> _clock(59.6), _clock(3700.0)
    ('1:00', '1:01:40')
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
