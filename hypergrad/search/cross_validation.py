"""Cross-validation, inside a trial or alone: folds that resume, and that are pruned one by one."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import numpy as np
from torch.utils.data import Dataset, Subset

from hypergrad.errors import ConfigurationError
from hypergrad.search.errors import ObjectiveError, TrialPruned
from hypergrad.search.messages import Job
from hypergrad.search.seeding import derived_seed, seed_everything
from hypergrad.search.trial import Trial, as_number, current_trial

FILE = "folds.json"
_used: WeakSet[Trial] = WeakSet()
TrainFold = Callable[[Trial, "Subset[Any]", "Subset[Any]"], Any]


@dataclass(frozen=True)
class CrossValidation:
    """What came out of each fold.

    Args:
        folds: the metrics of each fold, repeat after repeat.
        monitor: the name of the metric that counts.
    """

    folds: tuple[Mapping[str, float], ...]
    monitor: str

    @property
    def values(self) -> tuple[float, ...]:
        """The monitored metric, fold by fold."""
        return tuple(fold[self.monitor] for fold in self.folds)

    @property
    def mean(self) -> float:
        """The mean of the monitored metric over the folds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """The sample standard deviation of the monitored metric over the folds (divisor n - 1)."""
        return statistics.stdev(self.values)

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of every metric that all folds have under its name, and standard deviation as `…_std`: for `train`."""
        names = [name for name in self.folds[0] if all(name in fold for fold in self.folds)]
        columns = {name: [fold[name] for fold in self.folds] for name in names}
        means = {name: statistics.fmean(column) for name, column in columns.items()}
        return means | {f"{name}_std": statistics.stdev(column) for name, column in columns.items()}


def cross_validate(
    train_fold: TrainFold,
    dataset: Dataset[Any],
    folds: int = 5,
    *,
    stratify: Iterable[Any] | None = None,
    groups: Iterable[Any] | None = None,
    repeats: int = 1,
    seed: int = 0,
    trial: Trial | None = None,
    monitor: str | None = None,
    folder: str | Path | None = None,
) -> CrossValidation:
    """Train once per fold, on the others' data, with scikit-learn's splitters.

    Inside a trial every finished fold is reported: as the running mean over folds, or as the fold's own value where the
    study's pruner is `"wilcoxon"`, which compares fold by fold. If the study then stops the trial, the remaining folds
    are not trained. A trial that is continued after it was killed trains the unfinished folds only.

    Args:
        train_fold: called with a `Trial` of the fold (its own folder, checkpoint, seed and `trainer`), the training
            subset and the validation subset. Returns the monitored metric, or a mapping of metrics that has it.
        dataset: map-style, of n items.
        folds: at least 2, at most n.
        stratify: n labels; every fold gets its share of each.
        groups: n labels; items of one group are never in different folds.
        repeats: how often all is done, each time with other folds; at least 1.
        seed: of the splits, and of the trainings outside a trial. The same for all trials of a study, for they are
            compared on the same folds.
        trial: None takes the trial that this process runs, if it does. Once: see `Trial.fold` for a second time.
        monitor: the metric that counts. None takes the study's, or `"val_loss"`.
        folder: where to keep things outside a trial; None: nowhere.

    Raises:
        ConfigurationError: for numbers out of range, labels of another length, or a trial that was given before.
        ObjectiveError: if `train_fold` returns no finite number for `monitor`.
        TrialPruned: when the study stops the trial; let it pass.
        ModuleNotFoundError: without scikit-learn.
    """
    size = len(cast(Sized, dataset))
    labels, parts = _labels("stratify", stratify, size), _labels("groups", groups, size)
    for name, value, least in (("folds", folds, 2), ("repeats", repeats, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigurationError(f"`{name}` must be an integer of at least {least}, but got {value!r}.")
    if folds > size:
        raise ConfigurationError(f"`folds` must be at most the {size} items, but got {folds}.")
    splits = [s for repeat in range(repeats) for s in _splits(size, folds, labels, parts, derived_seed(seed, repeat))]
    trial = trial or current_trial()
    with _context(trial, folder, seed, monitor) as context:
        key = monitor or context.monitor
        plan = {"folds": folds, "repeats": repeats, "seed": seed, "monitor": key}
        done = _finished(context.folder, plan)
        for number, (train, val) in enumerate(splits):
            if number >= len(done):
                done.append(_run_fold(train_fold, context, number, Subset(dataset, train), Subset(dataset, val), key))
                _save(context.folder, plan, done)
            _report(context, [fold[key] for fold in done[: number + 1]])
    return CrossValidation(tuple(done), key)


def _run_fold(
    train_fold: TrainFold, context: Trial, number: int, train: Subset[Any], val: Subset[Any], monitor: str
) -> dict[str, float]:
    fold = context.fold(number)
    fold.folder.mkdir(parents=True, exist_ok=True)
    seed_everything(fold.seed)
    returned = train_fold(fold, train, val)
    fold.keep(returned if isinstance(returned, Mapping) else {monitor: returned}, logged=False)
    value = as_number(returned.get(monitor) if isinstance(returned, Mapping) else returned)
    if value is None or not math.isfinite(value):
        raise ObjectiveError(f"Fold {number} must return a finite number for {monitor!r}, but got {returned!r}.")
    return dict(fold.metrics)


def _report(context: Trial, values: list[float]) -> None:
    value = values[-1] if context.folds_apart else statistics.fmean(values)
    if not context.report(value, len(values)):
        raise TrialPruned(context.stopped)


@contextmanager
def _context(trial: Trial | None, folder: str | Path | None, seed: int, monitor: str | None) -> Iterator[Trial]:
    """The trial that the folds belong to, or one that reports to nobody."""
    if trial is not None:
        if trial in _used:
            raise ConfigurationError(
                "cross_validate was called with this trial before, whose folds are in its folder: give each call a "
                "part of its own, such as trial=trial.fold(100), and one within a fold that fold's trial."
            )
        _used.add(trial)
        yield trial
        return
    with tempfile.TemporaryDirectory(prefix="hypergrad-") as temporary:
        place = Path(folder) if folder is not None else Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        name = monitor or "val_loss"
        job = Job(0, {}, seed, 1, str(place), (name,), name, prunes=False, folds_apart=False, inherited=False)
        yield Trial(job, None)


def _splits(
    size: int, folds: int, labels: np.ndarray[Any, Any] | None, groups: np.ndarray[Any, Any] | None, seed: int
) -> Iterator[tuple[list[int], list[int]]]:
    from sklearn import model_selection

    options = {"n_splits": folds, "shuffle": True, "random_state": seed}
    if groups is not None:
        kind = model_selection.GroupKFold if labels is None else model_selection.StratifiedGroupKFold
    else:
        kind = model_selection.KFold if labels is None else model_selection.StratifiedKFold
    try:
        for train, val in kind(**options).split(np.zeros(size), labels, groups):
            yield train.tolist(), val.tolist()
    except ValueError as error:
        raise ConfigurationError(f"These folds are not possible: {error}") from error


def _labels(name: str, labels: Iterable[Any] | None, size: int) -> np.ndarray[Any, Any] | None:
    if labels is None:
        return None
    values = [getattr(label, "item", lambda label=label: label)() for label in labels]
    if len(values) != size:
        raise ConfigurationError(f"`{name}` needs one label per item: {size}, but got {len(values)}.")
    codes = {value: code for code, value in enumerate(dict.fromkeys(values))}
    return np.array([codes[value] for value in values])


def _finished(folder: Path, plan: Mapping[str, Any]) -> list[dict[str, float]]:
    try:
        stored = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return []
    return list(stored["metrics"]) if stored["plan"] == plan else []


def _save(folder: Path, plan: Mapping[str, Any], done: list[dict[str, float]]) -> None:
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(json.dumps({"plan": plan, "metrics": done}))
    os.replace(temporary, folder / FILE)
