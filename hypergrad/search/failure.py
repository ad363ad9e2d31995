"""What is left of a failed attempt in the trial's folder: the traceback, also of a signal such as SIGSEGV."""

from __future__ import annotations

import contextlib
import faulthandler
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FILE = "error.txt"
_FRAME = re.compile(r'  File "(.+)", line (\S+) in (.+)')


@contextlib.contextmanager
def traced_crashes(folder: Path, attempt: int) -> Iterator[None]:
    """If a signal ends this process meanwhile, the Python stack of all threads is left in a file for `stack_of`."""
    path, before = _crash_file(folder, attempt), faulthandler.is_enabled()
    try:
        file = path.open("ab")
    except OSError:  # a full disk
        yield
        return
    with file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            if before:
                faulthandler.enable(sys.stderr)
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


def stack_of(folder: Path, attempt: int) -> str | None:
    """What a crash of that attempt has left; it is taken away."""
    path = _crash_file(folder, attempt)
    try:
        stack = path.read_text(errors="replace")
        path.unlink()
    except OSError:
        return None
    return stack or None


def last_frame(stack: str) -> str | None:
    """The frame in which it happened, in words; None if that was in a thread without one.

    >>> last_frame('Current thread 0x1 (most recent call first):\\n  File "/lib/a/b.py", line 5 in f')
    'f (a/b.py, line 5)'
    """
    _, _, current = stack.rpartition("Current thread")
    frame = _FRAME.match(current.partition("\n")[2])
    if frame is None:
        return None
    path, line, name = frame.groups()
    return f"{name} ({'/'.join(Path(path).parts[-2:])}, line {line})"


def keep_error(folder: Path, attempt: int, reason: str, traceback: str | None) -> None:
    """Append to `FILE` why an attempt has failed. A full disk costs the file only."""
    with contextlib.suppress(OSError), (folder / FILE).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"Attempt {attempt}: {reason}\n{traceback or ''}\n")


def _crash_file(folder: Path, attempt: int) -> Path:
    return folder / f"crash-{attempt}.txt"
