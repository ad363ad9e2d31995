"""The process of a trial: what it finds, what it leaves behind, and which GPUs are its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from hypergrad import ConfigurationError
from hypergrad.search import Float, Local, Study, Trial
from tests.search.objectives import square

SPACE = {"x": Float(-2.0, 2.0)}


def _environment(trial: Trial) -> dict[str, float]:
    print("printed by the trial")
    return {
        "val_loss": 0.0,
        "pid": os.getpid(),
        "group": os.getpgrp(),
        "threads": torch.get_num_threads(),
        "variable": float(os.environ["HYPERGRAD_TEST"]),
        "leaked": float(os.environ.get("LEAKED", "0")),
    }


def test_each_trial_has_a_process_group_of_its_own_and_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERGRAD_TEST", "7")

    def train(trial: Trial) -> dict[str, float]:
        found = _environment(trial)
        os.environ["LEAKED"] = "1"
        return found

    records = Study(tmp_path / "s", space=SPACE).run(train, 3, execution=Local(2, threads=1))
    assert len({r.metrics["pid"] for r in records} | {os.getpid()}) == 4
    for record in records:
        assert record.metrics["group"] == record.metrics["pid"]
        assert (record.metrics["threads"], record.metrics["variable"], record.metrics["leaked"]) == (1, 7, 0)
        assert "printed by the trial" in (record.folder / "log.txt").read_text()


def test_preloaded_modules_are_there_and_wrong_names_do_no_harm(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        import sys

        return float("wave" in sys.modules)

    before = Study(tmp_path / "s", space=SPACE).run(train, 1)
    after = Study(tmp_path / "t", space=SPACE).run(train, 1, execution=Local(preload=["wave", "no_such_module"]))
    assert (before[0].value, after[0].value) == (0.0, 1.0)
    with pytest.raises(ConfigurationError, match="`preload` must be names"):
        Local(preload="wave")


def test_what_is_registered_to_run_at_exit_runs(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        import atexit

        atexit.register(lambda: (trial.folder / "at exit").touch())
        return 0.0

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1)
    assert (record.folder / "at exit").exists()


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert Local(2)._gpus == ["3,5", "6,7"]
    assert Local(4)._gpus == ["3", "5", "6", "7"]
    assert Local(6)._gpus == ["3", "5", "6", "7", "3", "5"]
    assert Local(3, gpus_per_trial=2)._gpus == ["3,5", "6,7", "3,5"]
    assert Local(2, gpus_per_trial=0)._gpus == ["", ""]
    with pytest.raises(ConfigurationError, match="only 4 GPUs"):
        Local(1, gpus_per_trial=5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Local(2)._gpus is None
    with pytest.raises(ConfigurationError, match="no GPU is visible"):
        Local(1, gpus_per_trial=1)


def test_a_result_is_plain_json(tmp_path: Path) -> None:
    (record,) = Study(tmp_path / "s", space=SPACE).run(square, 1)
    stored = json.loads((record.folder / "result.json").read_text())
    assert stored["attempt"] == 1
    assert stored["result"]["values"] == [record.value]


def test_a_trial_takes_down_what_it_has_made_and_not_what_the_server_has(tmp_path: Path) -> None:
    def train(trial: Trial) -> dict[str, float]:
        import tempfile
        import weakref

        inherited = sum(finalizer.atexit for finalizer in weakref.finalize._registry)  # type: ignore[attr-defined]
        folder = tempfile.TemporaryDirectory(dir=trial.folder, prefix="temporary-")
        globals()["kept until the end"] = folder
        return {"val_loss": 0.0, "inherited": inherited, "there": len(list(trial.folder.glob("temporary-*")))}

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1)
    assert record.metrics["there"] == 1
    assert not list(record.folder.glob("temporary-*"))
    assert record.metrics["inherited"] == 0
