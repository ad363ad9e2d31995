"""The program that local trials run in: `python -m hypergrad.search.execution.process`.

`serve FD`: a process that has torch and Lightning loaded and forks once per trial. It is not multiprocessing's fork
server, for three reasons: that one runs the user's script again in every trial, where ours gets the function by value;
under DDP Lightning starts further ranks by the command line of the process, which must lead to the trial and not to
a second study; and every trial must be a process group that dies as a whole, and that dies with the driver.

`rank PAYLOAD JOB`: one trial without a driver, the further ranks of a trial under DDP.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from select import select
from typing import Any, NoReturn

from hypergrad.search.messages import Beginning, Job, Report, Verdict
from hypergrad.search.worker import run_job, save_result

PRELOAD = ("torch", "lightning.pytorch", "torch.utils.tensorboard", "hypergrad.search.trainer")


class _Pipe:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def begin(self) -> None:
        self.connection.send(Beginning())

    def ask(self, report: Report) -> Verdict:
        self.connection.send(report)
        answer = self.connection.recv()
        assert isinstance(answer, Verdict)
        return answer


def _run(request: dict[str, Any], connection: Connection | None) -> int:
    job = Job.from_json(request["job"])
    payload = Path(request["payload"]).read_bytes()
    result = run_job(payload, job, _Pipe(connection) if connection is not None else None)
    if connection is None:  # a further rank: rank 0 tells
        if result.traceback:
            print(result.traceback, file=sys.stderr)
        return int(result.state == "failed")
    if result.traceback:
        print(result.traceback, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # a full disk; the driver hears of the result anyhow
        save_result(result, job)
    with contextlib.suppress(OSError):
        connection.send(result)
    return 0


class Server:
    """Forks on demand, says who has died, and takes all trials with it when the driver goes."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._buffer = b""
        self._fds: list[int] = []
        self._pids: set[int] = set()
        self._finalizers: list[weakref.finalize[Any, Any]] = []
        # Its end closes with this process, however that ends; every trial watches the other end.
        self._lifeline, self._lifeline_end = os.pipe()
        self._wake, self._wake_end = socket.socketpair()
        for end in (self._wake, self._wake_end):
            end.setblocking(False)

    def serve(self) -> tuple[dict[str, Any], Connection] | None:
        """Returns in a child with what it has to run, and in the server with None once the driver has gone."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_end.fileno())
        for name in PRELOAD:
            importlib.import_module(name)
        self._keep_finalizers()
        gc.collect()
        gc.freeze()  # collections in the children would otherwise copy every page
        self._tell({"ready": os.getpid()})
        while True:
            ready, _, _ = select([self._control, self._wake], [], [])
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake.recv(4096)
                self._reap()
            if self._control in ready:
                data, fds = b"", list[int]()
                with contextlib.suppress(ConnectionError):  # the driver was killed before it had read all
                    data, fds, _, _ = socket.recv_fds(self._control, 1 << 20, 16)
                if not data:
                    return None
                self._buffer += data
                self._fds += fds
                while b"\n" in self._buffer:
                    line, _, self._buffer = self._buffer.partition(b"\n")
                    request, fd = json.loads(line), self._fds.pop(0)
                    self._preload(request)
                    pid = os.fork()
                    if pid == 0:
                        return self._become(request), Connection(fd)
                    os.close(fd)
                    self._pids.add(pid)
                    self._tell({"started": request["job"]["number"], "pid": pid})

    def end(self) -> None:
        """Kill what is left."""
        for pid in self._pids:
            _kill_group(pid)
        for finalizer in self._finalizers:
            finalizer.atexit = True

    def _preload(self, request: dict[str, Any]) -> None:
        for name in request["preload"]:
            if name not in sys.modules:
                sys.path[:] = request["path"]
                with contextlib.suppress(Exception):  # the trial will meet the same error, and say so
                    importlib.import_module(name)
                self._keep_finalizers()

    def _keep_finalizers(self) -> None:
        """What this process has made is not for a trial to take down at its end, such as torch's 174 libraries of
        operators, in 30 to 60 ms. What a trial makes itself is taken down as ever.
        """
        made = [finalizer for finalizer in getattr(weakref.finalize, "_registry", ()) if finalizer.atexit]
        for finalizer in made:
            finalizer.atexit = False
        self._finalizers += made

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._pids.discard(pid)
            _kill_group(pid)  # what it started and left behind: loader workers, ranks
            self._tell({"exited": pid, "code": os.waitstatus_to_exitcode(status)})

    def _tell(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._control.sendall(json.dumps(event).encode() + b"\n")

    def _become(self, request: dict[str, Any]) -> dict[str, Any]:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        for end in (self._control, self._wake, self._wake_end):
            end.close()
        os.close(self._lifeline_end)
        threading.Thread(target=_die_with, args=(self._lifeline,), daemon=True, name="lifeline").start()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        sys.path[:] = request["path"]
        sys.argv = [sys.argv[0], "rank", request["payload"], json.dumps(request["job"])]
        if request["threads"]:
            import torch

            torch.set_num_threads(request["threads"])
        return request


def _die_with(lifeline: int) -> NoReturn:
    os.read(lifeline, 1)  # returns when the server's end is closed
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise SystemExit


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """See the module's docstring; the exit code."""
    if arguments[0] == "rank":
        return _run({"payload": arguments[1], "job": json.loads(arguments[2])}, None)
    server = Server(socket.socket(fileno=int(arguments[1])))
    child = server.serve()
    if child is None:
        server.end()
        return 0
    code = _run(*child)
    # What was registered to run at the end runs. Then the process is gone in 0.05 s, where taking the interpreter
    # down, and with it every page that it shares with the server, would take 0.7 s.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
