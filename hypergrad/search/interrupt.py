"""Ctrl-C as a wish and not an exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ctrl_c(handle: Callable[[], None]) -> Iterator[None]:
    """Meanwhile Ctrl-C calls `handle`, in the main thread; other threads do not hear of it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears of signals
        return

    def handler(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        handle()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
