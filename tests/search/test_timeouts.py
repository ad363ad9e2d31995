"""A trial's time begins when `train` does: not while it waits for a place or its process starts, which have bounds of
their own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hypergrad.search import Began, Ended, Event, Executor, Float, Job, Launched, Local, Result, Study, Trial, Verdict
from hypergrad.search import clock as clock_module
from hypergrad.search.clock import Clocks
from hypergrad.search.execution import local as local_module
from tests.search.objectives import kept_server

SPACE = {"x": Float(-2.0, 2.0)}


def load(first: float, marks: Path) -> None:
    """Takes `first` seconds to load, the first time."""
    if not marks.exists():
        marks.touch()
        time.sleep(first)


class SlowToLoad:
    """What a worker needs its time for before it can call `train`, such as the import of a large package."""

    def __init__(self, first: float, marks: Path) -> None:
        self.arguments = (first, marks)

    def __reduce__(self) -> Any:
        return load, self.arguments


def test_what_train_refers_to_may_take_longer_to_load_than_a_trial_may_run(tmp_path: Path) -> None:
    slow = SlowToLoad(2.5, tmp_path / "mark")

    def train(trial: Trial) -> float:
        return float(slow is None)

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1, trial_timeout=1.0)
    assert (record.state, record.value, record.attempts) == ("complete", 1.0, 1)
    assert record.duration > 2.5


def test_the_start_of_the_server_is_charged_to_nobody_nor_its_death_while_idle(tmp_path: Path) -> None:
    before = kept_server()
    before.kill()
    before._process.wait()
    (record,) = Study(tmp_path / "s", space=SPACE).run(lambda _: 1.0, 1, trial_timeout=0.5)
    assert kept_server() is not before
    assert (record.state, record.attempts) == ("complete", 1)
    assert record.duration > 0.5


def test_a_start_that_hangs_costs_an_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_module, "START", 1.0)
    slow = SlowToLoad(600.0, tmp_path / "mark")

    def train(trial: Trial) -> float:
        return float(slow is None)

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1, trial_timeout=0.5, retries=1)
    assert (record.state, record.attempts) == ("complete", 2)
    assert record.failures == ("`train` was not called within 1 s of the start of its process",)


def test_a_module_that_hangs_while_it_is_preloaded_costs_an_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock_module, "START", 1.0)
    monkeypatch.setattr(local_module, "_GRACE", 0.5)
    monkeypatch.syspath_prepend(tmp_path)
    source = f"import pathlib, time\nm = pathlib.Path({str(tmp_path / 'mark')!r})\n"
    (tmp_path / "hangs.py").write_text(f"{source}if not m.exists():\n    m.touch()\n    time.sleep(600)\n")
    before = kept_server()
    place = Local(preload=["hangs"])
    (record,) = Study(tmp_path / "s", space=SPACE).run(lambda _: 1.0, 1, trial_timeout=1.0, retries=1, execution=place)
    assert (record.state, record.attempts) == ("complete", 2)
    assert record.failures == ("`train` was not called within 1 s of the start of its process",)
    assert kept_server() is not before


class Queueing(Executor):
    """A cluster that has no room at first. Trials run nowhere, and return 1."""

    capacity = 1

    def __init__(self, seconds: float) -> None:
        self.seconds, self.killed = seconds, 0
        self.jobs: list[tuple[float, int]] = []

    def open(self, payload: bytes) -> None: ...

    def submit(self, job: Job) -> None:
        self.jobs.append((time.monotonic() + self.seconds, job.number))

    def poll(self, timeout: float) -> list[Event]:
        time.sleep(0.05)
        ready = [number for due, number in self.jobs if time.monotonic() > due]
        self.jobs = [(due, number) for due, number in self.jobs if number not in ready]
        result = Result("complete", (1.0,))
        return [event for n in ready for event in (Launched(n), Began(n), Ended(n, result))]

    def reply(self, number: int, verdict: Verdict) -> None: ...

    def kill(self, number: int) -> None:
        self.killed += 1

    def close(self) -> None: ...


def test_waiting_for_a_place_takes_no_time(tmp_path: Path) -> None:
    place = Queueing(1.0)
    (record,) = Study(tmp_path / "s", space=SPACE).run(lambda _: 1.0, 1, trial_timeout=0.3, execution=place)
    assert record.state == "complete"
    assert place.killed == 0


def test_every_phase_has_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clocks = Clocks(10.0)
    for number in range(3):
        clocks.submitted(number)
    clocks.launched(1)
    clocks.launched(2)
    clocks.began(2)
    now = 10.5
    assert clocks.overdue() == [(2, "no end within trial_timeout=10 s")]
    now = 301.0
    assert [number for number, _ in clocks.overdue()] == [1, 2]
    clocks.ended(2)
    clocks.began(1)
    assert clocks.overdue() == []
    now = math.inf
    assert [number for number, _ in clocks.overdue()] == [1]
    assert (list(clocks), len(clocks), 2 in clocks) == ([0, 1], 2, False)
    free, now = Clocks(None), 0.0
    free.submitted(0)
    free.launched(0)
    now = 1e9
    assert free.overdue() == []


def test_a_server_whose_driver_went_without_listening_ends_quietly(tmp_path: Path) -> None:
    """The system resets the connection where something was left unread."""
    code = (
        "import time; from hypergrad.search.execution.server import ForkServer; server = ForkServer.take()\n"
        "while not server.control.recv(1, socket.MSG_PEEK): pass\n"
        "server.control.close(); print(server._process.wait())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", f"import socket; {code}"], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("0", "")
