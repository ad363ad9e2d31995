"""A run killed by SIGKILL and started again by the same command ends bit-identically to one that was left alone."""

from __future__ import annotations

import contextlib
import functools
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

Start = Callable[..., "subprocess.Popen[str]"]
LeftAlone = Callable[[str], tuple["subprocess.Popen[str]", Path]]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts processes of the training script, and leaves none behind."""
    with contextlib.ExitStack() as stack:

        def _start(setting: str, folder: Path, *options: str) -> subprocess.Popen[str]:
            # Checkpoints are written to a temporary file first, which only a rename on one file system moves at once.
            temporary = folder / "temporary"
            temporary.mkdir(parents=True, exist_ok=True)
            root = Path(__file__).parents[2]
            environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
            command = [sys.executable, "-m", "tests.callbacks.restartable", setting, str(folder), *options]
            child = stack.enter_context(
                subprocess.Popen(
                    command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            stack.callback(child.kill)
            return child

        yield _start


@pytest.fixture(scope="module")
def left_alone(start: Start, tmp_path_factory: pytest.TempPathFactory) -> LeftAlone:
    """Starts the run of a setting that nobody kills, once, beside whatever the test does."""

    @functools.cache
    def _left_alone(setting: str) -> tuple[subprocess.Popen[str], Path]:
        folder = tmp_path_factory.mktemp(setting)
        child = start(setting, folder)
        _go(child)
        return child, folder

    return _left_alone


def _go(child: subprocess.Popen[str]) -> None:
    print("go", file=child.stdin, flush=True)


def _until_paused(child: subprocess.Popen[str]) -> None:
    assert "paused\n" in child.stdout, "ended without a pause"


def _kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def _result(child: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    assert child.wait() == 0
    return torch.load(folder / "result.pt", weights_only=True)


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
    tmp_path: Path, start: Start, left_alone: LeftAlone, setting: str, batches: int, saved: int, measured: range
) -> None:
    whole, killed = left_alone(setting), start(setting, tmp_path, "--pause-before-batch", str(batches))
    resumed = start(setting, tmp_path)
    _go(killed)
    _until_paused(killed)
    _kill(killed)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == saved
    _assert_plain(checkpoint["callbacks"]["HyperGradient"])
    assert not (tmp_path / "result.pt").exists()
    _go(resumed)
    result, expected = _result(resumed, tmp_path), _result(*whole)
    assert (result["first_step"], expected["first_step"]) == (saved, 0)
    assert [update["step"] for update in expected["history"]] == list(measured)
    _assert_identical(result, expected)


def test_while_a_checkpoint_is_written(tmp_path: Path, start: Start, left_alone: LeftAlone) -> None:
    setting = "adamw-scheduled"
    whole, killed, resumed = (
        left_alone(setting),
        start(setting, tmp_path, "--pause-in-save", "2"),
        start(setting, tmp_path),
    )
    _go(killed)
    _until_paused(killed)
    (half,) = (path for path in (tmp_path / "temporary").iterdir() if path.is_file())
    assert half.stat().st_size > 0
    assert not zipfile.is_zipfile(half)
    _kill(killed)
    # What was being written, that of step 8, would have taken the place of this one.
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    _go(resumed)
    result, expected = _result(resumed, tmp_path), _result(*whole)
    assert (result["first_step"], expected["first_step"]) == (4, 0)
    _assert_identical(result, expected)
