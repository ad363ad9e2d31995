"""Trials on this machine: one process each, forked from a server that has torch and Lightning loaded."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from hypergrad.errors import ConfigurationError
from hypergrad.search.execution.base import Began, Ended, Event, Executor, Launched, Reported
from hypergrad.search.execution.server import ForkServer, how_it_died, search_path
from hypergrad.search.messages import Beginning, Job, Report, Result, Verdict

_GRACE = 10.0  # seconds from a trial's result to the end of its process


@dataclass
class _Running:
    slot: int
    connection: Connection
    pid: int | None = None
    result: Result | None = None
    result_at: float = 0.0
    doomed_at: float | None = None  # to be killed since then


class Local(Executor):
    """Processes on this machine.

    Where there are GPUs, each trial sees its own by `CUDA_VISIBLE_DEVICES`: `gpus_per_trial` of them, shared in turn if
    there are more workers than that serves. What a trial prints is in `log.txt` in its folder. A trial is a process
    group that ends as a whole, and ends when the driver ends, however that happens.

    Args:
        workers: trials at a time, at least 1.
        gpus_per_trial: None gives each worker an equal share, at least one; 0 hides them all.
        threads: of torch on the CPU per trial. None shares the cores among the workers.
        preload: modules that trials find loaded, beside torch and Lightning, such as `("sklearn.datasets",)`: an import
            of 0.6 s is then paid once and not per trial. They must start no threads and not touch CUDA.

    Raises:
        ConfigurationError: for values out of range, or on a system without fork (Windows).
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        gpus_per_trial: int | None = None,
        threads: int | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        for name, value, least in (
            ("workers", workers, 1),
            ("gpus_per_trial", gpus_per_trial, 0),
            ("threads", threads, 1),
        ):
            optional = value is None and name != "workers"
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigurationError(f"`{name}` must be an integer of at least {least}, but got {value!r}.")
        if not hasattr(os, "fork"):
            raise ConfigurationError("Local trials are forked, which this system cannot: use execution='ray'.")
        if isinstance(preload, str) or not all(isinstance(name, str) for name in preload):
            raise ConfigurationError(f"`preload` must be names of modules, but got {preload!r}.")
        self.capacity = workers
        self._preload = list(preload)
        self._gpus = _assigned_gpus(workers, gpus_per_trial)
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) // workers if _LINUX else (os.cpu_count() or 1))
        self._running: dict[int, _Running] = {}
        self._events: list[Event] = []
        self._server: ForkServer | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def open(self, payload: bytes) -> None:
        """Start the server, if none is kept; it loads torch while the driver goes on."""
        self._folder = tempfile.TemporaryDirectory(prefix="hypergrad-")
        (Path(self._folder.name) / "train.pkl").write_bytes(payload)
        self._server = ForkServer.take()

    def submit(self, job: Job) -> None:
        """Have a process forked for the job."""
        assert self._folder is not None, "open() comes first"
        if self._server is None or not self._server.alive():
            self._server = ForkServer.take()
        self._server.wait_until_ready()
        slot = min(set(range(self.capacity)) - {r.slot for r in self._running.values()})
        ours, theirs = Pipe()
        gpus = {} if self._gpus is None else {"CUDA_VISIBLE_DEVICES": self._gpus[slot]}
        request = {
            "job": job.to_json(),
            "payload": str(Path(self._folder.name) / "train.pkl"),
            "log": str(Path(job.folder) / "log.txt"),
            "environment": {**os.environ, **gpus},
            "cwd": os.getcwd(),
            "path": search_path(),
            "threads": self._threads,
            "preload": self._preload,
        }
        self._running[job.number] = _Running(slot, ours)
        self._server.fork(request, theirs.fileno())
        theirs.close()
        self._events.append(Launched(job.number))

    def poll(self, timeout: float) -> list[Event]:
        """What has happened; waits up to `timeout` seconds for something to happen."""
        sources: dict[Any, int] = {r.connection: n for n, r in self._running.items() if not r.connection.closed}
        server = self._server
        if server is not None and not self._events:
            for ready in wait([server.control, *sources], timeout):
                if ready is server.control:
                    self._listen(server)
                else:
                    self._read(sources[ready])
        now = time.monotonic()
        for running in self._running.values():
            if running.result is not None and now > running.result_at + _GRACE:
                self._signal(running)
            if running.pid is None and running.doomed_at is not None and now > running.doomed_at + _GRACE:
                self._kill_server()  # it hangs, in a module to preload
        events, self._events = self._events, []
        return events

    def reply(self, number: int, verdict: Verdict) -> None:
        """Answer a report."""
        running = self._running.get(number)
        if running is not None and not running.connection.closed:
            with contextlib.suppress(OSError):
                running.connection.send(verdict)

    def kill(self, number: int) -> None:
        """SIGKILL to the trial's process group, as soon as it has one."""
        running = self._running.get(number)
        if running is not None:
            running.doomed_at = running.doomed_at or time.monotonic()
            self._signal(running)

    def close(self) -> None:
        """Kill what runs, and see it gone. The server stays for the next run."""
        for number in self._running:
            self.kill(number)
        until = time.monotonic() + _GRACE
        while self._running and time.monotonic() < until:
            self.poll(0.1)
            self._events.clear()
        if self._running:
            self._kill_server()
        if self._folder is not None:
            self._folder.cleanup()
        if self._server is not None:
            self._server.give_back()
        self._server = self._folder = None

    # ----------------------------------------------------------------------------------------------------- inside

    def _listen(self, server: ForkServer) -> None:
        for event in server.events():
            if "started" in event and event["started"] in self._running:
                running = self._running[event["started"]]
                running.pid = event["pid"]
                if running.doomed_at is not None:
                    self._signal(running)
            elif "exited" in event:
                number = next((n for n, r in self._running.items() if r.pid == event["exited"]), None)
                if number is not None:
                    self._end(number, how_it_died(event["code"]))
        if server.death is not None:
            for number in list(self._running):
                self._end(number, f"the process that starts trials died ({server.death}), and its trials with it")
            self._server = None

    def _read(self, number: int) -> None:
        running = self._running.get(number)
        if running is None or running.connection.closed:
            return
        try:
            message = running.connection.recv()
        except (EOFError, OSError):
            running.connection.close()
            return
        if isinstance(message, Beginning):
            self._events.append(Began(number))
        elif isinstance(message, Report):
            self._events.append(Reported(number, message))
        elif isinstance(message, Result):
            running.result, running.result_at = message, time.monotonic()

    def _end(self, number: int, reason: str) -> None:
        running = self._running[number]
        while not running.connection.closed and running.connection.poll():
            self._read(number)  # what it said before it went
        # Nobody is there any more to hear the answer to a report.
        self._events = [e for e in self._events if not (isinstance(e, Reported) and e.number == number)]
        running.connection.close()
        del self._running[number]
        self._events.append(Ended(number, running.result, None if running.result is not None else reason))

    def _kill_server(self) -> None:
        if self._server is not None:
            self._server.kill()

    @staticmethod
    def _signal(running: _Running) -> None:
        if running.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(running.pid, signal.SIGKILL)


_LINUX = hasattr(os, "sched_getaffinity")


def _assigned_gpus(workers: int, per_trial: int | None) -> list[str] | None:
    if per_trial == 0:
        return [""] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (
        [n for n in visible.split(",") if n]
        if visible is not None
        else list(map(str, range(torch.cuda.device_count())))
    )
    if not names:
        if per_trial:
            raise ConfigurationError(f"`gpus_per_trial` is {per_trial}, but no GPU is visible here.")
        return None
    per_trial = per_trial or max(1, len(names) // workers)
    if per_trial > len(names):
        raise ConfigurationError(f"`gpus_per_trial` is {per_trial}, but there are only {len(names)} GPUs.")
    places = len(names) // per_trial
    return [",".join(names[(w % places) * per_trial : (w % places + 1) * per_trial]) for w in range(workers)]
