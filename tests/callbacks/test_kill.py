"""A run killed by SIGKILL and started again by the same command ends bit-identically to one that was left alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")

# From a setting and the option that makes it pause: a process to be killed, and its successor.
Start = Callable[..., tuple["subprocess.Popen[str]", "subprocess.Popen[str]"]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the training script twice, and leaves no process behind."""
    # Checkpoints are written to a temporary file first, which only a rename on one file system moves at once.
    temporary, root = tmp_path / "temporary", Path(__file__).parents[2]
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:

        def _process(*arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "tests.callbacks.restartable", *arguments]
            child = stack.enter_context(subprocess.Popen(command, cwd=root, env=environment, **pipes))
            stack.callback(child.kill)
            return child

        def _start(setting: str, *pause: str) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
            killed, alone = str(tmp_path / "killed"), str(tmp_path / "alone")
            # The successor continues first, in a process as fresh as can be, and then does the whole run alone.
            return _process(setting, killed, *pause), _process(setting, killed, alone)

        yield _start


def _go(child: subprocess.Popen[str]) -> None:
    print("go", file=child.stdin, flush=True)


def _until_paused(child: subprocess.Popen[str]) -> None:
    _go(child)
    assert "paused\n" in child.stdout, "ended without a pause"


def _kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def _results(child: subprocess.Popen[str], tmp: Path) -> list[dict[str, Any]]:
    """Of the run that was killed, once it has been continued, and of the one that was left alone."""
    _go(child)
    assert child.wait() == 0
    return [torch.load(tmp / name / "result.pt", weights_only=True) for name in ("killed", "alone")]


def _assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in ("weights", "optimizer"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    assert a["hyperparameters"] == b["hyperparameters"]
    assert a["history"] == b["history"]


def _assert_plain(state: Any) -> None:
    """Tensors, numbers and strings in dictionaries and lists."""
    if type(state) is dict:
        assert all(type(key) is str for key in state)
        state = list(state.values())
    if type(state) is list:
        for item in state:
            _assert_plain(item)
    else:
        assert state is None or type(state) in (torch.Tensor, bool, int, float, str)


# An epoch has 6 batches and a checkpoint is written every 4 steps: those of steps 4 and 8 are mid-epoch.
@pytest.mark.parametrize(
    ("setting", "batches", "saved", "measured"),
    [
        ("adamw-scheduled", 10, 8, range(3, 25, 3)),  # the update of step 9 is lost and made again
        ("sgd-accumulated", 11, 4, range(1, 13)),  # the update of step 5, and half of the gradient of step 6
    ],
)
def test_between_two_checkpoints(
    tmp_path: Path, start: Start, setting: str, batches: int, saved: int, measured: range
) -> None:
    killed, successor = start(setting, "--pause-before-batch", str(batches))
    _until_paused(killed)
    _kill(killed)
    checkpoint = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == saved
    _assert_plain(checkpoint["callbacks"]["HyperGradient"])
    assert not (tmp_path / "killed" / "result.pt").exists()
    continued, alone = _results(successor, tmp_path)
    assert (continued["first_step"], alone["first_step"]) == (saved, 0)
    assert [update["step"] for update in alone["history"]] == list(measured)
    _assert_identical(continued, alone)


def test_while_a_checkpoint_is_written(tmp_path: Path, start: Start) -> None:
    killed, successor = start("adamw-scheduled", "--pause-in-save", "2")
    _until_paused(killed)
    (half,) = (path for path in (tmp_path / "temporary").iterdir() if path.is_file())
    assert half.stat().st_size > 0
    assert not zipfile.is_zipfile(half)
    _kill(killed)
    # What was being written, that of step 8, would have taken the place of this one.
    assert torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)["global_step"] == 4
    continued, alone = _results(successor, tmp_path)
    assert (continued["first_step"], alone["first_step"]) == (4, 0)
    _assert_identical(continued, alone)
