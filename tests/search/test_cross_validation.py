"""Folds: what is in them, what comes out of them, and that they resume and are pruned one by one."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.model_selection import StratifiedKFold
from torch.utils.data import Subset, TensorDataset

from hypergrad import ConfigurationError
from hypergrad.search import Float, ObjectiveError, Study, Trial, cross_validate
from tests.search.objectives import die

X = torch.arange(30.0).unsqueeze(1)
LABELS = [0] * 20 + [1] * 10
GROUPS = [i // 3 for i in range(30)]
DATASET = TensorDataset(X, torch.tensor(LABELS))


def _items(subset: Any) -> list[int]:
    return [int(subset[i][0]) for i in range(len(subset))]


class Recorder:
    def __init__(self) -> None:
        self.folds: list[tuple[list[int], list[int]]] = []
        self.seeds: list[int] = []
        self.draws: list[float] = []

    def __call__(self, fold: Trial, train: Subset[Any], val: Subset[Any]) -> dict[str, float]:
        self.folds.append((_items(train), _items(val)))
        self.seeds.append(fold.seed)
        self.draws.append(torch.rand(()).item())
        return {"val_loss": float(sum(_items(val))), "accuracy": 0.5}


@pytest.mark.parametrize(
    "options", [{}, {"stratify": LABELS}, {"groups": GROUPS}, {"stratify": LABELS, "groups": GROUPS}]
)
def test_folds_are_a_partition_with_the_promised_properties(options: Any) -> None:
    recorder = Recorder()
    result = cross_validate(recorder, DATASET, 5, repeats=2, **options)
    assert len(recorder.folds) == len(result.folds) == 10
    for train, val in recorder.folds:
        assert sorted(train + val) == list(range(30))
        if "stratify" in options and "groups" not in options:
            assert sum(LABELS[i] for i in val) == 2
        if "groups" in options:
            assert not {GROUPS[i] for i in train} & {GROUPS[i] for i in val}
    for repeat in (recorder.folds[:5], recorder.folds[5:]):
        assert sorted(i for _, val in repeat for i in val) == list(range(30))
    assert recorder.folds[:5] != recorder.folds[5:]
    assert len(set(recorder.seeds)) == len(set(recorder.draws)) == 10
    again = Recorder()
    cross_validate(again, DATASET, 5, repeats=2, **options)
    assert (again.folds, again.draws) == (recorder.folds, recorder.draws)
    assert result.values == tuple(float(sum(val)) for _, val in recorder.folds)
    assert result.mean == pytest.approx(statistics.mean(result.values))
    assert result.std == pytest.approx(statistics.stdev(result.values))
    assert result.metrics == {"val_loss": result.mean, "val_loss_std": result.std, "accuracy": 0.5, "accuracy_std": 0.0}


def test_it_agrees_with_scikit_learn_on_a_real_model() -> None:
    from sklearn.datasets import load_wine
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    from hypergrad.search.seeding import derived_seed

    x, y = load_wine(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)

    def train_fold(fold: Trial, train: Subset[Any], val: Subset[Any]) -> float:
        model = LogisticRegression().fit(x[train.indices], y[train.indices])
        return float(model.score(x[val.indices], y[val.indices]))

    ours = cross_validate(train_fold, TensorDataset(torch.tensor(x)), 5, stratify=y, monitor="accuracy")
    splitter = StratifiedKFold(5, shuffle=True, random_state=derived_seed(0, 0))
    assert ours.values == pytest.approx(cross_val_score(LogisticRegression(), x, y, cv=splitter))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "`folds` must be an integer of at least 2"),
        ({"folds": 31}, "at most the 30 items"),
        ({"repeats": 0}, "`repeats` must be"),
        ({"stratify": [1, 2]}, "`stratify` needs one label per item: 30, but got 2"),
        ({"groups": [1]}, "`groups` needs one label"),
        ({"groups": [0] * 30}, "These folds are not possible"),
    ],
)
def test_mistakes(options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        cross_validate(Recorder(), DATASET, **options)


@pytest.mark.parametrize("returned", [None, float("nan"), {"accuracy": 1.0}])
def test_a_fold_that_returns_no_number(returned: Any) -> None:
    with pytest.raises(ObjectiveError, match="Fold 0 must return a finite number for 'val_loss'"):
        cross_validate(lambda *_: returned, DATASET)


def test_a_trial_killed_in_a_fold_trains_only_what_is_left(tmp_path: Path) -> None:
    def train_fold(fold: Trial, train: Subset[Any], val: Subset[Any]) -> float:
        (fold.folder / f"attempt-{fold.attempt}").touch()
        if fold.attempt == 1 and fold.folder.name == "fold-2":
            die("kill")
        return float(len(val)) + fold.params["x"]

    def train(trial: Trial) -> dict[str, float]:
        return cross_validate(train_fold, DATASET, 5).metrics

    (record,) = Study(tmp_path / "s", space={"x": Float(0.0, 1.0)}).run(train, 1, retries=1)
    assert (record.state, record.attempts) == ("complete", 2)
    begun = sorted(str(p.relative_to(record.folder)) for p in record.folder.glob("fold-*/attempt-*"))
    assert begun == [f"fold-{i}/attempt-{a}" for i, a in ((0, 1), (1, 1), (2, 1), (2, 2), (3, 2), (4, 2))]
    assert record.value == pytest.approx(6.0 + record.params["x"])
    assert record.metrics["val_loss_std"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("pruner", "curve"),
    [
        (("median", {"n_startup_trials": 1}), {1: 10.0}),
        (("wilcoxon", {"p_threshold": 0.2}), {1: 10.0, 2: 11.0, 3: 12.0}),
    ],
)
def test_bad_trials_do_not_get_all_folds(tmp_path: Path, pruner: Any, curve: dict[int, float]) -> None:
    def train_fold(fold: Trial, train: Subset[Any], val: Subset[Any]) -> float:
        return 10.0 * fold.number + int(fold.folder.name[-1])

    def train(trial: Trial) -> dict[str, float]:
        return cross_validate(train_fold, DATASET, 5).metrics

    good, bad = Study(tmp_path / "s", space={"x": Float(0.0, 1.0)}, pruner=pruner).run(train, 2)
    assert good.value == 2.0
    assert bad.state == "pruned"
    assert bad.curve == curve
    assert len(list(bad.folder.glob("fold-*"))) == len(curve)


def test_a_second_cross_validation_is_refused_rather_than_given_the_folds_of_the_first(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        first = cross_validate(lambda *_: 1.0, DATASET, 2).mean
        if trial.number == 0:
            return first + cross_validate(lambda *_: 2.0, DATASET, 2).mean
        return first + cross_validate(lambda *_: 2.0, DATASET, 2, trial=trial.fold(100)).mean

    records = Study(tmp_path / "s", space={"x": Float(0.0, 1.0)}).run(train, 2)
    assert [(r.state, r.value) for r in records] == [("failed", None), ("complete", 3.0)]
    assert "such as trial=trial.fold(100)" in str(records[0].reason)


def test_nested_cross_validation_has_folds_within_folds(tmp_path: Path) -> None:
    def outer(fold: Trial, train: Subset[Any], val: Subset[Any]) -> float:
        inner = cross_validate(lambda *_: 2.0, train, 2, trial=fold if fold.number else None).mean
        return inner + int(fold.folder.name[-1])

    def train(trial: Trial) -> float:
        return cross_validate(outer, DATASET, 2).mean

    records = Study(tmp_path / "s", space={"x": Float(0.0, 1.0)}).run(train, 2)
    assert [(r.state, r.value) for r in records] == [("failed", None), ("complete", 2.5)]
    assert "within a fold that fold's trial" in str(records[0].reason)
    assert (records[1].folder / "fold-1" / "fold-0").is_dir()
