"""What users do that nobody thought of: it works, or it is told clearly, and never hangs or lies."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from hypergrad import ConfigurationError
from hypergrad.search import PBT, Categorical, Float, Int, Space, SpaceError, StorageError, Study, Trial
from tests.search.objectives import DieAfterEpoch, net, square

SPACE = {"x": Float(0.0, 1.0)}


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def _step_too_large(trial: Trial) -> float:
    trial.report(1.0, 10**30)
    return 1.0


def _no_text(trial: Trial) -> float:
    raise FileNotFoundError("/data/\udcff.csv")


def _unprintable(trial: Trial) -> float:
    raise Unprintable


def _long(trial: Trial) -> float:
    raise ValueError("x" * 10**7)


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (_step_too_large, "ConfigurationError: `step` must be an integer of at least 0 and below 2**63, but got 1"),
        (_no_text, r"FileNotFoundError: /data/\udcff.csv"),
        (_unprintable, "Unprintable: it cannot be printed"),
        (_long, "ValueError: xxx"),
        (lambda _: sys.exit(0), "SystemExit: 0"),
    ],
)
def test_no_failure_of_a_trial_is_one_of_the_study(
    tmp_path: Path, train: Callable[[Trial], float], reason: str
) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    (record,) = study.run(train, 1)
    assert record.state == "failed"
    assert str(record.reason).startswith(reason)
    assert len(str(record.reason)) < 3000
    assert record.error is not None
    assert [r.state for r in study.run(square, 2)] == ["failed", "complete"]
    assert study.report().exists()


def test_metrics_may_have_any_names(tmp_path: Path) -> None:
    (record,) = Study(tmp_path / "s", space=SPACE).run(lambda _: {1: 0.5, "val_loss": 1, None: 3, "a/b é": 2}, 1)
    assert record.metrics == {"1": 0.5, "val_loss": 1.0, "null": 3.0, "a/b é": 2.0}


def test_parameters_may_have_any_names(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space={"self": Float(0.0, 1.0), "lambda": 1})
    study.enqueue(self=0.5)
    (record,) = study.run(lambda trial: trial.params["self"], 1)
    assert record.value == 0.5


@pytest.mark.parametrize("name", ["what? now", "a#b", "100%41", "a;b&c", "é ü"])
def test_folders_may_have_any_names(tmp_path: Path, name: str) -> None:
    Study(tmp_path / name, space=SPACE).run(square, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(Study(tmp_path / name).trials) == 1


def test_a_study_stays_where_it_is_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = Study("s", space=SPACE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [r.state for r in study.run(square, 2)] == ["complete"] * 2
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert len(Study(tmp_path / "s").trials) == 2


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    with pytest.raises(StorageError, match="cannot be made: File exists"):
        Study(tmp_path / "s", space=SPACE)


def test_a_path_object_in_the_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    (tmp_path / "module_of_the_user.py").write_text("VALUE = 7.0\n")

    def train(trial: Trial) -> Any:
        import module_of_the_user  # type: ignore[import-not-found]

        return module_of_the_user.VALUE

    assert Study(tmp_path / "s", space=SPACE).run(train, 1)[0].value == 7.0


def test_a_module_in_the_working_directory_does_not_take_the_place_of_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.search.objectives import kept_server

    kept_server().kill()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("raise RuntimeError('not this one')\n")
    assert [r.state for r in Study(tmp_path / "s", space=SPACE).run(lambda _: 1.0, 1)] == ["complete"]


def test_two_studies_in_threads_of_one_process(tmp_path: Path) -> None:
    ends: dict[str, list[str]] = {}

    def run(name: str) -> None:
        records = Study(tmp_path / name, space=SPACE).run(lambda _: time.sleep(0.2) or 1.0, 3)  # type: ignore[func-returns-value]
        ends[name] = [r.state for r in records]

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ends == {"a": ["complete"] * 3, "b": ["complete"] * 3}


def test_a_study_within_a_trial(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        inner = Study(trial.folder / "inner", space=SPACE, seed=trial.number)
        return float(inner.run(square, 2)[1].params["x"])

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1)
    assert record.value == Study(record.folder / "inner").trials[1].params["x"]


def test_two_objects_of_one_study_see_the_same(tmp_path: Path) -> None:
    first = Study(tmp_path / "s", space=SPACE)
    first.run(lambda _: 1.0, 1)
    second = Study(tmp_path / "s")
    second.run(lambda _: 2.0, 2)
    assert first.trials == second.trials
    assert [r.value for r in first.run(lambda _: 3.0, 3)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(-1.7e308, 1.7e308), "`high - low` must be a finite number"),
        (lambda: Int(1, 10**400), "Bounds must be integers"),
        (lambda: Space({"a": Float(0.0, 1.0), "b": Int(1, 2, when={"a": 0.5})}), r"waits for a to be \[0.5\].*chance"),
        (
            lambda: Space(
                {
                    "a": Categorical(["p", "q"]),
                    "b": Int(1, 2, when={"a": "p"}),
                    "c": Int(1, 2, when={"b": 1}),
                    "d": Int(1, 2, when={"c": 1, "a": "q"}),
                }
            ),
            "d is never active: it and c, which it waits for, need different a",
        ),
    ],
)
def test_spaces_that_cannot_be_searched(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make()


def test_conditions_that_agree_are_possible() -> None:
    space = Space(
        {
            "a": Categorical(["p", "q", "r"]),
            "b": Int(1, 2, when={"a": ["p", "q"]}),
            "c": Int(1, 2, when={"b": 1, "a": ["q", "r"]}),
        }
    )
    assert space.check({"a": "q", "b": 1, "c": 2}) == {"a": "q", "b": 1, "c": 2}


@pytest.mark.parametrize("parameter", [Int(1, 10**12), Float(0.0, 1.0, step=1e-10)])
def test_a_huge_grid_without_a_feasible_point_is_told_at_once(tmp_path: Path, parameter: Any) -> None:
    began = time.monotonic()
    with pytest.raises(SpaceError, match="None of the first 100000 points of the grid satisfies"):
        Study(tmp_path / "s", space=Space({"n": parameter}, ["n < 0"]), sampler="grid")
    assert time.monotonic() - began < 30


def test_a_population_larger_than_the_study_is_refused(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE, sampler=PBT(population=4, interval=2, steps=8))
    with pytest.raises(ConfigurationError, match="at least PBT's population, 4, but is 2"):
        study.run(square, 2)
    assert study.trials == []


def test_a_population_that_begins_anew_after_each_ranking_comes_to_an_end(tmp_path: Path) -> None:
    """It should continue from its checkpoints; there are none."""

    def train(trial: Trial) -> float:
        for step in range(1, 7):
            if not trial.report(trial.params["x"], step):
                break
        return float(trial.params["x"])

    study = Study(tmp_path / "s", space=SPACE, sampler=PBT(population=2, interval=2, steps=6))
    records = study.run(train, 3, workers=2, timeout=60)
    assert study.stopped is None
    assert sorted(r.state for r in records) == ["complete", "complete", "pruned"]


@pytest.mark.parametrize("given", [{"callbacks": [ModelCheckpoint()]}, {"enable_checkpointing": None}])
def test_the_trainers_checkpoints_beside_the_users(tmp_path: Path, given: dict[str, Any]) -> None:
    def train(trial: Trial) -> Any:
        callbacks = [*given.get("callbacks", []), DieAfterEpoch(trial, 2)]
        return net(trial, **{**given, "callbacks": callbacks}).callback_metrics["val_loss"]

    (record,) = Study(tmp_path / "s", space={"lr": Float(1e-3, 1e-1, log=True)}).run(train, 1, retries=1)
    assert (record.state, record.attempts, record.reason) == ("complete", 2, None)
    assert len(list(record.folder.glob("epoch-0-*"))) == 1
    assert ("callbacks" in given) == bool(list((record.folder / "checkpoints").glob("epoch=*.ckpt")))
