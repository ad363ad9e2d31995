"""The benchmark of one run against fifty, at toy size: it measures what it says, and goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")  # the callback has its own

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on busy cores two threads wait for each other at every one of these small operations
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(_importable: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    def run(*options: str) -> Path:
        out = tmp_path / "results.jsonl"
        monkeypatch.setattr(sys, "argv", ["one_run.py", "--out", str(out), "--seeds", "1", "--trials", "8", *options])
        runpy.run_path(str(BENCHMARKS / "one_run.py"), run_name="__main__")
        return out

    return run


def test_runs_resumes_and_reports(command: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tasks", "digits-cnn-sgd", "--steps", "20", "--starts", "1e-2", "10"]
    options += ["--methods", "random", "default", "ours", "plain", "lr_find", "baydin"]
    out = command(*options)
    lines = out.read_text().splitlines()
    assert len(lines) == 8 + 1 + 2 + 2 + 1 + 2
    out.write_text("\n".join([*lines[:-2], lines[-1][:40]]))  # two runs fewer, one of them cut short by a kill
    command(*options)
    again = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    kept = ("task", "method", "start", "test", "hold", "cost", "readout_test")
    assert [[r[k] for k in kept] for r in again] == [[json.loads(line)[k] for k in kept] for line in lines]
    capsys.readouterr()
    command(*options, "--report")
    printed = capsys.readouterr().out
    assert "development tasks: test loss relative to rs8" in printed
    assert "| rs8 | 8.00 | 1.000 |" in printed
    assert "confirmation tasks" not in printed
    assert len(out.read_text().splitlines()) == len(lines) + 1  # reports run nothing


def test_what_the_search_chose_is_trained_again(
    command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", "teacher", "--steps", "20", "--methods"]
    out = command(*options, "again")
    assert not out.exists()
    assert "teacher of seed 0 has 0 random trials of 8; run it again later" in capsys.readouterr().out
    command(*options, "random", "again")
    results = [json.loads(line) for line in out.read_text().splitlines()]
    trials, again = results[:8], results[8:]
    chosen = min(trials, key=lambda r: r["hold"])
    assert [r["method"] for r in again] == ["again"] * 3
    assert all(r["cost"] == 9.0 for r in again)
    competitors: Any = __import__("one_run.competitors", fromlist=["at"])
    alike = competitors.at(
        "x", _task("teacher", 20), 0, 0.0, **{k: chosen["settings"][k] for k in ("lr", "weight_decay")}
    )
    assert alike.test == chosen["test"]
    assert len({chosen["test"], *(r["test"] for r in again)}) == 4
    command(*options, "random", "again", "--report")
    assert "| again | 9.00 |" in capsys.readouterr().out


def test_plots(command: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--tasks", "teacher", "--steps", "20", "--methods", "random"]
    command(*options)
    command(*options, "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.usefixtures("_importable")
@pytest.mark.parametrize("name", ["digits-cnn-sgd", "contrastive", "scheduled-steps"])
def test_the_plain_loop_is_the_trainer(name: str) -> None:
    """Same batches, same randomness, same schedule; and a readout leaves no trace in the run."""
    competitors: Any = __import__("one_run.competitors", fromlist=["plain"])
    task = _task(name, 30)
    bare = competitors.ours_from("bare", lambda task, seed: L.Callback())(task, 0, 1e-2)
    plain = competitors.plain(task, 0, 1e-2)
    assert bare.test == plain.test
    assert bare.cost == plain.cost == 1.0


@pytest.mark.usefixtures("_importable")
def test_a_readout_is_no_worse_on_the_hold_out_set_and_finite_where_the_run_is_not() -> None:
    competitors: Any = __import__("one_run.competitors", fromlist=["at"])
    task = _task("teacher", 40)
    result = competitors.at("x", task, 0, 0.0, 1e-2, 0.0)
    assert result.readout_hold <= result.hold
    lost = competitors.at("x", task, 0, 0.0, 1e6, 0.0)
    assert lost.test == lost.hold == math.inf
    assert lost.cost < 1
    assert math.isfinite(lost.readout_test)


@pytest.mark.usefixtures("_importable")
def test_every_task_trains_and_keeps_its_sets_apart() -> None:
    tasks: Any = __import__("one_run.tasks", fromlist=["TASKS"])
    assert len(tasks.TASKS) >= 10
    for task in tasks.TASKS:
        train, hold, test = task.sets(0)
        assert len(train) >= task.batch_size
        assert len(test) > len(hold)
        batch = next(iter(task.train_loader(0)))
        assert torch.isfinite(task.module(0, *task.default).training_step(batch, 0))
    pieces = [{tuple(row.tolist()) for row in rows.tensors[0]} for rows in _task("digits-mlp-sgd", 1).sets(0)]
    assert len(set.union(*pieces)) == sum(map(len, pieces))


def _task(name: str, steps: int) -> Any:
    tasks: Any = __import__("one_run.tasks", fromlist=["TASKS"])
    return dataclasses.replace(next(t for t in tasks.TASKS if t.name == name), steps=steps)
