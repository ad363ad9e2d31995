"""A run killed by SIGKILL and started again by the same command ends bit-identically to one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks import restartable

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")

# Runs a setting in a process of its own: killed where it pauses, if it is told to, and to its end otherwise.
Start = Callable[..., None]


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Makes processes that have their libraries loaded: each is forked from one that does nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.callbacks.restartable"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


@pytest.fixture
def start(tmp_path: Path, processes: Any) -> Start:
    """Runs the training script."""
    (tmp_path / "temporary").mkdir()

    def _start(setting: str, folder: str, *, before_batch: int | None = None, in_save: int | None = None) -> None:
        ours, theirs = processes.Pipe()
        child = processes.Process(
            target=restartable.main, args=(theirs, setting, tmp_path / folder, before_batch, in_save), daemon=True
        )
        child.start()
        theirs.close()
        if before_batch is not None or in_save is not None:
            assert ours.recv() == "paused"
            child.kill()
        child.join()
        assert child.exitcode == (0 if before_batch is None and in_save is None else -signal.SIGKILL)

    return _start


def _results(start: Start, setting: str, tmp: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the run that was killed, once it has been continued, and of one that is left alone."""
    assert not (tmp / "killed" / "result.pt").exists()
    for folder in ("killed", "alone"):
        start(setting, folder)
    continued, alone = (torch.load(tmp / name / "result.pt", weights_only=True) for name in ("killed", "alone"))
    assert alone["first_step"] == 0
    return continued, alone


def _assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in ("weights", "optimizer", "tensors"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    for name in ("hyperparameters", "history", "race", "ended_with"):
        assert a[name] == b[name], name


def _assert_plain(state: Any) -> None:
    """Tensors, numbers and strings in dictionaries, lists and tuples."""
    if type(state) is dict:
        _assert_plain(list(state))
        state = list(state.values())
    if type(state) in (list, tuple):
        for item in state:
            _assert_plain(item)
    else:
        assert state is None or type(state) in (torch.Tensor, bool, int, float, str)


def _last(tmp: Path) -> dict[str, Any]:
    """The last checkpoint of the run that was killed."""
    checkpoint: dict[str, Any] = torch.load(tmp / "killed" / "last.ckpt", weights_only=True)
    _assert_plain(checkpoint["callbacks"]["HyperGradient"])
    return checkpoint


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
    start(setting, "killed", before_batch=batches)
    assert _last(tmp_path)["global_step"] == saved
    continued, alone = _results(start, setting, tmp_path)
    assert continued["first_step"] == saved
    assert [update["step"] for update in alone["history"]] == list(measured)
    _assert_identical(continued, alone)


# Epochs of 7 batches and 4 steps, a checkpoint every 3 steps: that of step 6 is 4 batches into the second epoch.
@pytest.mark.parametrize("estimator", restartable.ESTIMATORS)
def test_every_estimator(tmp_path: Path, start: Start, estimator: str) -> None:
    start(estimator, "killed", before_batch=12)  # half of the gradient of step 7 is lost
    assert _last(tmp_path)["global_step"] == 6
    continued, alone = _results(start, estimator, tmp_path)
    assert continued["first_step"] == 6
    assert [update["step"] for update in alone["history"]] == list(range(2, 17, 2))
    assert all(update["skipped"] is None for update in alone["history"])
    _assert_identical(continued, alone)


@pytest.mark.parametrize(
    ("setting", "batches", "saved", "racing"),
    [
        ("composition", 5, 2, True),
        ("composition", 19, 10, False),
        ("composition, unrolled", 19, 10, False),
        pytest.param("default", 17, 7, True, marks=pytest.mark.slow),
        pytest.param("default", 400, 224, False, marks=pytest.mark.slow),
    ],
)
def test_race_shape_readout_and_rewind(
    tmp_path: Path, start: Start, setting: str, batches: int, saved: int, racing: bool
) -> None:
    start(setting, "killed", before_batch=batches)
    checkpoint = _last(tmp_path)
    assert checkpoint["global_step"] == saved
    assert (checkpoint["callbacks"]["HyperGradient"]["run"]["pieces"]["heat"] is not None) == racing
    continued, alone = _results(start, setting, tmp_path)
    assert continued["first_step"] == saved
    assert alone["race"] is not None
    assert alone["ended_with"] is not None
    assert alone["history"]
    _assert_identical(continued, alone)


def test_while_a_checkpoint_is_written(tmp_path: Path, start: Start) -> None:
    start("adamw-scheduled", "killed", in_save=2)
    (half,) = (path for path in (tmp_path / "temporary").iterdir() if path.is_file())
    assert half.stat().st_size > 0
    assert not zipfile.is_zipfile(half)
    # What was being written, that of step 8, would have taken the place of this one.
    assert _last(tmp_path)["global_step"] == 4
    continued, alone = _results(start, "adamw-scheduled", tmp_path)
    assert continued["first_step"] == 4
    _assert_identical(continued, alone)
