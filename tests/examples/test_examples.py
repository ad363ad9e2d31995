"""Every example runs, is short, and says what it promises."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_is_under_100_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 100


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo with fewer trials and epochs: the same code, the same claim from the hopeless start."""
    monkeypatch.chdir(tmp_path)
    main: Any = runpy.run_path(str(EXAMPLES / "digits.py"))["main"]
    monkeypatch.setitem(main.__globals__, "EPOCHS", 20)
    monkeypatch.setitem(main.__globals__, "TRIALS", 2)
    monkeypatch.setitem(main.__globals__, "SPLITS", 1)
    try:
        main()
    finally:
        torch.set_flush_denormal(False)
    lines = capsys.readouterr().out.splitlines()
    losses = {line[:40].strip(): float(line[40:51]) for line in lines[1:7]}
    assert losses["tuned-from-lr-1e-05"] < 0.2 < 2.0 < losses["plain-lr-1e-05"]
    assert "tensorboard --logdir runs/digits" in lines[-1]
    events = EventAccumulator(str(tmp_path / "runs/digits/split-0/tuned-from-lr-1e-05"))
    events.Reload()
    assert {"hypergradient/lr/value", "hypergradient/weight_decay/hypergradient", "test_loss"} <= set(
        events.Tags()["scalars"]
    )


BENCHMARKS = {
    "overhead.py": ["--rounds", "1", "--steps", "5", "--every", "5", "--epochs", "2"],
    "estimators.py": ["--rounds", "1", "--steps", "2", "--task", "GRU", "--horizons"],
    "quality.py": ["--seeds", "1", "--epochs", "1", "--trials", "1", "--optimizer", "SGD"],
    "footprint.py": ["--width", "30", "--steps", "8", "--crowded"],
    "hard_starts.py": ["--seeds", "1", "--steps", "130", "--task", "five hidden, 500"],
}


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.filterwarnings("default")
def test_benchmarks_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, for to import torch and Lightning once more takes longer than most of them."""
    path = EXAMPLES / "benchmarks" / name
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), *BENCHMARKS[name]])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    if name == "hard_starts.py":  # what it finds differs from processor to processor: these networks are chaotic
        found, ratio = lines[0].rsplit(maxsplit=1)
        assert found.strip() == "five hidden, 500 steps"
        assert float(ratio) > 0.0


@pytest.mark.slow
def test_the_benchmark_of_the_search_runs(tmp_path: Path) -> None:
    options = ["--trials", "2", "--more", "5", "--peer-trials", "2", "--epochs", "1", "--seeds", "1"]
    command = [sys.executable, str(EXAMPLES / "benchmarks/search.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3


def test_search_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    main: Any = runpy.run_path(str(EXAMPLES / "search_digits.py"))["main"]
    monkeypatch.setitem(main.__globals__, "TRIALS", 3)
    monkeypatch.setitem(main.__globals__, "EPOCHS", 4)
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("momentum    real in [0.5, 0.95], when optimizer is 'sgd'")
    assert lines[-2].startswith("best: trial ")
    assert "'failed'" not in lines[-3]


def test_tabular_automl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The same code with fewer trials; the linear and the tree model are scikit-learn's, and so are their scores."""
    monkeypatch.chdir(tmp_path)
    main: Any = runpy.run_path(str(EXAMPLES / "tabular_automl.py"))["main"]
    monkeypatch.setitem(main.__globals__, "TRIALS", 2)
    monkeypatch.setitem(main.__globals__, "EPOCHS", 6)
    main()
    scores = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines() if "test accuracy" in line]
    assert len(scores) == 3
    assert all(0.85 < score <= 1.0 for score in scores)
