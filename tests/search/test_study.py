"""Studies end to end: records, seeds, scheduling, opening again, bad input."""

from __future__ import annotations

import logging
import math
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from hypergrad import ConfigurationError, HypergradError
from hypergrad.search import (
    Categorical,
    Float,
    Int,
    Local,
    ObjectiveError,
    Space,
    SpaceError,
    StorageError,
    Study,
    Trial,
    TrialPruned,
)
from tests.search.objectives import curve, square

SPACE = {"x": Float(-2.0, 2.0), "n": Int(1, 64, log=True), "kind": Categorical(["a", "b"]), "epochs": 3}


def test_records_of_a_small_study(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE, seed=3)
    records = study.run(curve, 5, workers=2)
    assert [r.number for r in records] == list(range(5))
    for record in records:
        assert record.state == "complete"
        assert record.finished
        assert record.attempts == 1
        assert record.failures == ()
        assert record.reason is None
        assert record.value == pytest.approx((record.params["x"] - 1) ** 2)
        assert record.curve == pytest.approx({step: record.value + 1 / step for step in range(1, 5)})
        assert record.metrics == {"val_loss": record.value}
        assert 0 < record.duration < 60
        assert study.space.check(record.params) == record.params
        assert record.folder == tmp_path / "s" / f"trial-{record.number:04}"
    assert study.best == min(records, key=lambda r: r.value)
    frame = study.dataframe()
    assert list(frame["number"]) == list(range(5))
    assert frame["params_x"].tolist() == [r.params["x"] for r in records]
    assert frame["metrics_val_loss"].tolist() == frame["value"].tolist()


def _seen(trial: Trial) -> Any:
    return {
        "val_loss": random.random(),
        "numpy": np.random.random(),
        "torch": torch.rand(()),
        "seed": trial.seed % 1000,
        "x": trial.params["x"],
    }


def test_results_depend_on_the_seed_and_not_on_workers_or_interruptions(tmp_path: Path) -> None:
    whole = Study(tmp_path / "one", space=SPACE, seed=5).run(_seen, 6)
    parts = Study(tmp_path / "two", space=SPACE, seed=5)
    parts.run(_seen, 2, workers=2)
    parts = Study(tmp_path / "two")  # another process would see the same
    parts.run(_seen, 6, workers=2)
    assert [(r.params, r.metrics) for r in parts.trials] == [(r.params, r.metrics) for r in whole]
    assert len({r.metrics["torch"] for r in whole}) == 6
    other = Study(tmp_path / "three", space=SPACE, seed=6).run(_seen, 1)
    assert other[0].params != whole[0].params
    assert other[0].metrics["torch"] != whole[0].metrics["torch"]


def test_trials_is_the_number_that_the_study_ends_with(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    study.run(square, 2)
    before = study.trials
    assert study.run(square, 2) == before
    assert study.resume(square) == before
    assert study.run(square, 3)[:2] == before
    assert len(study.trials) == 3


def test_enqueued_points_come_first(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    assert study.enqueue(x=1.0, n=7, kind="b") == 0
    with pytest.raises(SpaceError, match="outside its domain"):
        study.enqueue(x=9.0, n=7, kind="b")
    records = study.run(square, 2)
    assert records[0].params == {"x": 1.0, "n": 7, "kind": "b", "epochs": 3}
    assert records[0].value == 0.0
    assert len(records) == 2


def test_metrics_in_a_mapping_and_directions(tmp_path: Path) -> None:
    def train(trial: Trial) -> dict[str, Any]:
        trial.record(extra=1, extra_tensor=torch.tensor([2.0]))
        return {"f1": torch.tensor(trial.params["x"]), "val_loss": 1, "text": "ignored"}

    study = Study(tmp_path / "s", space=SPACE, monitor="f1", direction="maximize")
    records = study.run(train, 3)
    assert study.best.value == pytest.approx(max(r.params["x"] for r in records))
    assert records[0].metrics == {"extra": 1.0, "extra_tensor": 2.0, "f1": records[0].value, "val_loss": 1.0}


def test_several_objectives(tmp_path: Path) -> None:
    def train(trial: Trial) -> tuple[float, float]:
        for step in (1, 2):
            trial.report(abs(trial.params["x"]) if trial.number else 0.0, step)
        return trial.params["x"] ** 2, -trial.params["x"]

    settings: dict[str, Any] = {"monitor": ["loss", "gain"], "direction": ["minimize", "maximize"]}
    study = Study(tmp_path / "s", space={"x": Float(-1.0, 1.0)}, sampler="genetic", pruner="median", **settings)
    records = study.run(train, 6)
    assert all(isinstance(r.value, tuple) and len(r.value) == 2 for r in records if r.state == "complete")
    complete = [r for r in records if r.state == "complete"]
    beaten = {
        r.number
        for r in complete
        for o in complete
        if o.value[0] <= r.value[0] and o.value[1] >= r.value[1] and o.value != r.value
    }
    assert {r.number for r in study.front} == {r.number for r in complete} - beaten
    assert beaten
    with pytest.raises(ConfigurationError, match="see `front`"):
        _ = study.best
    assert "values_loss" in study.dataframe()


def test_pruning_with_several_objectives_is_on_the_named_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)

    def train(trial: Trial) -> tuple[float, float]:
        for step in range(1, 4):
            if not trial.report(float(trial.number), step):
                break
        return 1.0, float(trial.number)

    settings: dict[str, Any] = {"monitor": ["loss", "cost"], "direction": ["minimize", "minimize"], "prune_on": "cost"}
    pruner = ("median", {"n_startup_trials": 2})
    study = Study(tmp_path / "s", space={"x": Float(0.0, 1.0)}, pruner=pruner, **settings)
    study.run(train, 3)
    # A new process: what the first one saw is replayed from the storage.
    records = Study(tmp_path / "s").run(train, 5)
    assert [r.state for r in records] == ["complete", "complete", *["pruned"] * 3]
    assert "where cost was 4" in str(records[4].reason)
    assert "A new study" not in caplog.text  # of Optuna, for its own use


def test_pruned_trials_say_why_and_keep_what_they_reported(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        if trial.number == 1:
            raise TrialPruned("not worth it")
        if trial.number == 2:
            assert not trial.report(math.nan, 1)
            return None  # no longer matters
        if trial.number == 3:
            trial.report(5.0, 1)
            assert not trial.report(math.inf, 2)
            raise RuntimeError("no longer matters either")
        return 1.0

    records = Study(tmp_path / "s", space=SPACE).run(train, 4)
    assert [r.state for r in records] == ["complete", "pruned", "pruned", "pruned"]
    assert [r.reason for r in records[1:3]] == ["not worth it", "val_loss is nan at step 1"]
    assert records[3].curve == {1: 5.0, 2: math.inf}


def test_an_objective_that_is_not_finite_fails_its_trial_only(tmp_path: Path) -> None:
    records = Study(tmp_path / "s", space=SPACE).run(lambda trial: math.nan if trial.number else 1.0, 2)
    assert [r.state for r in records] == ["complete", "failed"]
    assert records[1].reason == "the objective is not finite: val_loss = nan"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None instead of one number"),
        (torch.zeros(2), r"a tensor of shape \(2,\) instead of one number"),
        ("0.5", "'0.5' instead of one number"),
        ({"val_acc": 1.0}, r"without a number under \['val_loss'\], but with \['val_acc'\].*monitor="),
        ((1.0, 2.0), "instead of one number"),
    ],
)
def test_no_trial_is_spent_on_a_train_that_returns_no_number(tmp_path: Path, returned: Any, message: str) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    with pytest.raises(ObjectiveError, match=message):
        study.run(lambda _: returned, 3)
    assert [r.state for r in study.trials] == ["waiting"]
    records = study.run(square, 3)
    assert [r.state for r in records] == ["complete"] * 3
    assert records[0].attempts == 2


class _Holder:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def train(self, trial: Trial) -> float:
        return 0.0 if self.lock else 1.0


def test_what_cannot_be_sent_to_a_worker_is_named(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    holder = _Holder()
    for train, where in ((holder.train, r"train\.__self__\.lock"), (lambda trial: holder, r"train → holder\.lock")):
        message = rf"{where} is a lock, which cannot be pickled.*Make it inside `train`"
        with pytest.raises(ObjectiveError, match=message):
            study.run(train, 1)
    with pytest.raises(ObjectiveError, match="must take one argument"):
        study.run(lambda: 1.0, 1)
    with pytest.raises(ObjectiveError, match="must be a function"):
        study.run(3, 1)
    assert study.trials == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "bayes"}, "`sampler` must be one of"),
        ({"sampler": 3}, "`sampler` must be a name"),
        ({"sampler": ("tpe", {"startup": 1})}, "unexpected keyword argument 'startup'"),
        ({"sampler": "grid"}, "is infinite"),
        ({"sampler": ("refine", {"shrink": 2.0})}, "`shrink` must lie in"),
        ({"pruner": "sha"}, "`pruner` must be one of"),
        ({"pruner": "threshold"}, "lower or upper must be specified.*Pass options"),
        ({"direction": "min"}, "`direction` must be"),
        ({"direction": ["minimize", "maximize"]}, "one direction per monitored"),
        ({"monitor": []}, "`monitor` must be"),
        ({"monitor": ["a", "a"]}, "`monitor` must be"),
        ({"prune_on": "acc"}, "`prune_on` must be one of"),
        ({"seed": -1}, "`seed` must be"),
        ({"sampler": "cmaes", "monitor": ["a", "b"], "direction": ["minimize"] * 2}, "CMA-ES has one objective"),
        ({"space": None}, "give it a space"),
    ],
)
def test_wrong_settings_leave_no_folder_behind(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HypergradError, match=message):
        Study(tmp_path / "s", **{"space": SPACE, **settings})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Say when the study ends"),
        ({"trials": 0}, "`trials` must be an integer of at least 1"),
        ({"trials": 1, "workers": 0}, "`workers` must be"),
        ({"trials": 1, "retries": -1}, "`retries` must be"),
        ({"trials": 1, "timeout": 0}, "`timeout` must be a positive"),
        ({"trials": 1, "trial_timeout": "1 h"}, "`trial_timeout` must be a positive"),
        ({"trials": 1, "execution": "slurm"}, "`execution` must be"),
        ({"trials": 1, "workers": 2, "execution": Local(3)}, "workers=2, but .* runs 3 trials"),
    ],
)
def test_wrong_limits(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    with pytest.raises(ConfigurationError, match=message):
        study.run(square, **settings)
    assert study.trials == []


def test_best_without_a_complete_trial_says_what_there_is(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    with pytest.raises(LookupError, match="no trial was run yet"):
        _ = study.best


def test_opening_again(tmp_path: Path) -> None:
    first = Study(
        tmp_path / "s", space=Space(SPACE, ["n <= 32"]), sampler="tpe", pruner=("median", {"n_warmup_steps": 2})
    )
    again = Study(tmp_path / "s")
    assert again.spec == first.spec
    assert Study(tmp_path / "s", space=Space(SPACE, ["n <= 32"]), sampler="tpe").spec == first.spec
    with pytest.raises(StorageError, match=r"made differently: n: integer in \[1, 64\].*became integer in \[1, 128\]"):
        Study(tmp_path / "s", space=Space({**SPACE, "n": Int(1, 128, log=True)}, ["n <= 32"]))
    with pytest.raises(StorageError, match="sampler: 'tpe' became 'random'"):
        Study(tmp_path / "s", sampler="random")
    with pytest.raises(StorageError, match="seed: 0 became 1"):
        Study(tmp_path / "s", seed=1)


def test_a_sampler_object_must_be_passed_again(tmp_path: Path) -> None:
    Study(tmp_path / "s", space=SPACE, sampler=optuna.samplers.RandomSampler(seed=1)).run(square, 1)
    with pytest.raises(ConfigurationError, match=r"RandomSampler object.*pass it again"):
        Study(tmp_path / "s")
    assert len(Study(tmp_path / "s", sampler=optuna.samplers.RandomSampler(seed=2)).run(square, 2)) == 2


def test_a_study_from_the_future_and_a_foreign_file(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space=SPACE)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 's' / 'study.db'}")
    storage.set_study_user_attr(1, "hypergrad", {**study.spec.to_json(), "version": 99})
    with pytest.raises(StorageError, match=r"format 99.*install a newer one"):
        Study(tmp_path / "s")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "study.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match=r"not a database.*The file is damaged"):
        Study(tmp_path / "t")
