"""What a study says of itself while it runs, and when it gives up early."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from hypergrad import ConfigurationError
from hypergrad.search import Float, ObjectiveError, Study, Trial, TrialRecord
from hypergrad.search.alike import AlikeFailures
from hypergrad.search.progress import Pace, Silent, Standing, Tolerant, progress_of

SPACE = {"x": Float(-2.0, 2.0)}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def square(trial: Trial) -> float:
    if trial.number == 1:
        raise RuntimeError("just this one")
    return float(trial.params["x"] ** 2)


def test_lines_say_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    study = Study(tmp_path / "study", space=SPACE)
    study.run(square, 4, progress=True)
    last = said.getvalue().splitlines()[-1]
    assert last == f"4/4 trials, best {study.best.value:.4g}, 0 running, 0 pruned, 1 failed, 0:00 left"


def test_nothing_is_said_where_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    Study(tmp_path / "study", space=SPACE).run(square, 2)
    assert said.getvalue() == ""
    assert isinstance(progress_of(None), Silent)
    assert isinstance(progress_of(True), Tolerant)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(progress_of(None), Tolerant)
    assert isinstance(progress_of(False), Silent)


def test_a_terminal_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    Study(tmp_path / "study", space=SPACE).run(square, 3)
    text = terminal.getvalue()
    assert "3/3 trials" in text
    assert text.count("\n") == 1  # at the very end


def test_pace() -> None:
    pace = Pace({"complete": 2, "failed": 1}, 10, 0.5, sign=1.0)
    assert pace.standing(2) == Standing({"complete": 2, "failed": 1, "running": 2}, 10, 0.5, None)
    pace.finished("complete", 0.7)
    pace.finished("pruned", 0.1)  # a value on the way is no result
    now = pace.standing(1)
    assert (now.finished, now.best) == (5, 0.5)
    assert now.seconds_left is not None
    pace.finished("complete", 0.4)
    assert pace.standing(0).best == 0.4
    largest = Pace({}, None, None, sign=-1.0)
    largest.finished("complete", 1.0)
    largest.finished("complete", 2.0)
    assert largest.standing(0) == Standing({"complete": 2, "running": 0}, None, 2.0, None)


def test_a_timeout_bounds_the_time_left() -> None:
    pace = Pace({}, None, None, sign=1.0, timeout=60.0)
    left = pace.standing(1).seconds_left
    assert left is not None
    assert 50.0 < left <= 60.0
    assert Pace({}, 10, None, sign=1.0, timeout=1e-9).standing(1).seconds_left == 0.0


class Gone(Terminal):
    """Breaks when `after` lines have been written."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def write(self, text: str) -> int:
        self.after -= 1
        if self.after < 0:
            raise BrokenPipeError("the terminal is gone")
        return super().write(text)


class NoTerminal(Gone):
    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("stream", [Gone(0), Gone(1), NoTerminal(0)])
def test_a_terminal_that_is_gone_costs_the_line_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: Gone
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    records = Study(tmp_path / "study", space=SPACE).run(square, 3, progress=True)
    assert [r.state for r in records] == ["complete", "failed", "complete"]
    assert stream.after < 0
    assert caplog.text.count("the terminal is gone") == 1


def test_progress_must_be_a_bool_or_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`progress` must be"):
        Study(tmp_path / "study", space=SPACE).run(square, 1, progress="yes")  # type: ignore[arg-type]


def broken(trial: Trial) -> float:
    raise FileNotFoundError("data.csv is not here")


def test_an_objective_that_always_fails_is_told_early(tmp_path: Path) -> None:
    study = Study(tmp_path / "study", space=SPACE)
    with pytest.raises(ObjectiveError, match=r"first 3 trials .* data.csv is not here.*error.txt, what .* log.txt"):
        study.run(broken, 20, alike_failures=3)
    assert [r.state for r in study.trials] == ["failed"] * 3
    assert "FileNotFoundError" in (study.trials[-1].folder / "error.txt").read_text()
    study.resume(square)
    assert sum(r.state == "complete" for r in study.trials) == 17
    assert len(study.trials) == 20


def test_failures_that_differ_or_come_later_stop_nothing(tmp_path: Path) -> None:
    def differs(trial: Trial) -> float:
        raise RuntimeError("odd" if trial.number % 2 else "even")

    def later(trial: Trial) -> float:
        if trial.number:
            raise RuntimeError("not the first")
        return 1.0

    for i, train in enumerate((differs, later)):
        study = Study(tmp_path / str(i), space=SPACE)
        study.run(train, 4, alike_failures=2)
        assert len(study.trials) == 4
    study = Study(tmp_path / "all", space=SPACE)
    study.run(broken, 4, alike_failures=None)
    assert len(study.trials) == 4


def test_those_under_way_when_it_becomes_clear_are_left_waiting(tmp_path: Path) -> None:
    study = Study(tmp_path / "study", space=SPACE)
    with pytest.raises(ObjectiveError, match="first 3 trials"):
        study.run(broken, 20, workers=3, alike_failures=3)
    states = [r.state for r in study.trials]
    assert states.count("failed") == 3
    assert set(states) <= {"failed", "waiting"}
    for record in study.trials:
        if record.state == "failed":
            assert "Traceback (most recent call last)" in (record.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("ends", "enough"),
    [
        ([("failed", "E: at 1"), ("failed", "E: at 0x7f00"), ("failed", "E: at 2.5e-3")], True),
        ([("failed", "E"), ("failed", "F"), ("failed", "E"), ("failed", "E")], False),
        ([("complete", None), *[("failed", "E")] * 5], False),
        ([("failed", "E"), ("pruned", "stopped"), *[("failed", "E")] * 5], False),
        ([("failed", "E")] * 2, False),
        ([*[("failed", "E")] * 3, ("complete", None)], True),
    ],
)
def test_what_counts_as_the_same(ends: list[tuple[Any, str | None]], enough: bool) -> None:
    failures = AlikeFailures(3)
    for state, reason in ends:
        failures.ended(TrialRecord(0, {}, None, state, reason))
    assert failures.enough is enough
