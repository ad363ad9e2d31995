"""The driver's end of the process that forks trials; see `process.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from select import select
from typing import Any

from hypergrad.search.errors import ExecutionError

_READY = 300.0  # seconds for loading torch


class ForkServer:
    """A running server, of one study at a time. One is kept for the next study, and ends with this process."""

    _idle: ForkServer | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "hypergrad.search.execution.process", "serve", str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path()))}
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._buffer, self._ready, self._owner = b"", False, os.getpid()
        self.death: str | None = None

    @classmethod
    def take(cls) -> ForkServer:
        """The one that is kept, or a new one. What it says is for the taker only."""
        with cls._lock:
            server, cls._idle = cls._idle, None
        return server if server is not None and server._owner == os.getpid() and server.alive() else cls()

    def give_back(self) -> None:
        """Keep it, unless another one is kept already."""
        with self._lock:
            if ForkServer._idle is None and self.alive():
                ForkServer._idle = self
                return
        if self.death is None:
            self._bury()

    def alive(self) -> bool:
        """Also if it was killed while nobody listened."""
        if self.death is None and self._process.poll() is not None:
            self._bury()
        return self.death is None

    def wait_until_ready(self) -> None:
        """Until torch is loaded.

        Raises:
            ExecutionError: if the server dies instead, or hangs.
        """
        until = time.monotonic() + _READY
        while not self._ready and self.death is None:
            if not select([self.control], [], [], max(0.0, until - time.monotonic()))[0]:
                self.kill()
                raise ExecutionError(f"The process that starts trials has not loaded torch within {_READY:g} s.")
            self.events()
        if not self._ready:
            raise ExecutionError(
                f"The process that starts trials died while it was loading torch ({self.death}); see what it printed."
            )

    def _bury(self) -> None:
        self.control.close()
        self.death = how_it_died(self._process.wait())

    def kill(self) -> None:
        """End it at once, and with it all processes that it has started."""
        self._process.kill()

    def fork(self, request: dict[str, Any], fd: int) -> None:
        """Ask for a process that does `request` and talks through `fd`. If the server is dead, `events` will say so."""
        with contextlib.suppress(OSError):
            message = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(self.control, [message], [fd])
            self.control.sendall(message[sent:])

    def events(self) -> list[dict[str, Any]]:
        """What the server says: `{"started": number, "pid": …}`, `{"exited": pid, "code": …}`. Waits for something."""
        try:
            data = self.control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._bury()
            return []
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        events = [json.loads(line) for line in lines]
        self._ready = self._ready or any("ready" in event for event in events)
        return [event for event in events if "ready" not in event]


def search_path() -> list[str]:
    """`sys.path` as text; there are those who append a `Path`."""
    return [os.fsdecode(entry) for entry in sys.path]


def how_it_died(code: int) -> str:
    """An exit code in words."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL: by somebody, or by the system because memory ran out"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"its process exited with code {code} before train returned"
