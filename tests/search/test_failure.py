"""What a failed attempt leaves behind: its traceback, or the stack of a crash in native code."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hypergrad.cli.table import trials_table
from hypergrad.search import Float, Study, Trial
from hypergrad.search.failure import last_frame, traced_crashes

SPACE = {"x": Float(0.0, 1.0)}


def crashing_function() -> None:
    ctypes.string_at(0)


def test_a_segmentation_fault_is_told_with_its_place(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        if trial.attempt == 1:
            os.kill(os.getpid(), signal.SIGABRT)
        crashing_function()
        return 1.0

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1, retries=1)
    assert record.state == "failed"
    assert record.failures[0].startswith("killed by SIGABRT in train (search/test_failure.py, line ")
    assert str(record.reason).startswith("killed by SIGSEGV in string_at (ctypes/__init__.py, line ")
    assert str(record.reason).endswith("; the stack is in error.txt")
    assert record.error == record.folder / "error.txt"
    first, second = record.error.read_text().split("Attempt 2: ")
    assert first.startswith("Attempt 1: killed by SIGABRT")
    assert "Fatal Python error: Aborted" in first
    assert "Fatal Python error: Segmentation fault" in second
    assert "in crashing_function" in second
    assert not list(record.folder.glob("crash-*"))


def test_a_crash_while_train_is_loaded_is_told_with_its_place(tmp_path: Path) -> None:
    class Crashing:
        def __reduce__(self) -> object:
            return crashing_function, ()

    crashing = Crashing()
    (record,) = Study(tmp_path / "s", space=SPACE).run(lambda _: float(crashing is None), 1)
    assert str(record.reason).startswith("killed by SIGSEGV in string_at")


def test_every_failed_attempt_has_its_traceback_and_no_other_has_a_file(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        if trial.number == 1 and trial.attempt == 1:
            raise ValueError("as asked for")
        if trial.number == 2:
            return float("nan")
        return 1.0

    study = Study(tmp_path / "s", space=SPACE)
    records = study.run(train, 3, retries=1)
    assert [r.state for r in records] == ["complete", "complete", "failed"]
    assert records[0].error is None
    assert records[1].error is not None
    assert records[2].error is not None
    text = records[1].error.read_text()
    assert text.startswith("Attempt 1: ValueError: as asked for\nTraceback (most recent call last):")
    assert text.count("Attempt") == 1
    assert records[2].error.read_text().count("the objective is not finite: val_loss = nan") == 2
    assert not list(tmp_path.glob("s/trial-*/crash-*"))
    assert trials_table(records).endswith("\n\nTracebacks are in error.txt in the folders of trials 1, 2.")
    assert "Tracebacks" not in trials_table(records[:1])


def test_a_folder_that_cannot_be_written_costs_the_stack_only(tmp_path: Path) -> None:
    with traced_crashes(tmp_path / "missing", 1):
        done = True
    assert done


@pytest.mark.parametrize("before", [True, False])
def test_the_users_own_fault_handler_is_put_back(tmp_path: Path, before: bool) -> None:
    """In a process of its own: pytest has one, too."""
    code = (
        "import faulthandler, sys; from pathlib import Path; from hypergrad.search.failure import traced_crashes\n"
        f"if {before}: faulthandler.enable()\n"
        f"with traced_crashes(Path({str(tmp_path)!r}), 1): assert faulthandler.is_enabled()\n"
        "print(faulthandler.is_enabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(before)
    assert not list(tmp_path.iterdir())


def test_a_crash_without_a_python_frame_names_none() -> None:
    assert last_frame("Fatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n") is None
    assert last_frame("Current thread 0x1 (most recent call first):\n  <no Python frame>\n") is None
