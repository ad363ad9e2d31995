"""The front door: a study in a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from hypergrad.errors import ConfigurationError
from hypergrad.search.board import Board
from hypergrad.search.driver import Driver, Limits
from hypergrad.search.errors import StorageError
from hypergrad.search.execution.base import Executor
from hypergrad.search.execution.catalog import executor_of
from hypergrad.search.front import front_of
from hypergrad.search.lock import Lock
from hypergrad.search.parameter import Parameter, Scalar
from hypergrad.search.pickling import pickled
from hypergrad.search.progress import progress_of
from hypergrad.search.pruners import Pruning, pruner_of
from hypergrad.search.record import TrialRecord
from hypergrad.search.samplers.base import Sampler
from hypergrad.search.samplers.catalog import sampler_of
from hypergrad.search.space import Space
from hypergrad.search.spec import Direction, StudySpec, as_directions, as_monitors
from hypergrad.search.storage import DAMAGED, FILE, Storage
from hypergrad.search.trial import Trial

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("hypergrad.search")
Options = tuple[str, Mapping[str, Any]]


class Study:
    """A search that can be interrupted at any point, by anybody, and continued.

    `Study(folder, space=...)` makes a new study, or opens the one that is there if it was made alike; `Study(folder)`
    opens it as it is. Nothing is lost when a worker, the process that called `run`, or the machine dies: the next `run`
    or `resume` continues unfinished trials from their last checkpoints, and runs nothing again that was finished.

    Args:
        folder: where everything is kept: the storage `study.db`, and a folder per trial.
        space: `Float`, `Int`, `Categorical` and constants by name, or a `Space` with constraints.
        sampler: `"random"` (the default), `"grid"`, `"qmc"`, `"tpe"`, `"gp"`, `"cmaes"`, `"genetic"`, `"refine"` or
            `"pbt"`; such a name with options, as in `("tpe", {"n_startup_trials": 20})`; or a sampler object, of Optuna
            or of `hypergrad.search`. With random, grid, qmc and pbt the points do not depend on the number of workers.
        pruner: `"none"` (the default), `"median"`, `"asha"`, `"hyperband"`, `"patience"`, `"threshold"` or
            `"wilcoxon"`; with options as above, or a pruner object of Optuna.
        direction: `"minimize"` (the default) or `"maximize"`; one for each monitored metric if there are several.
        monitor: the metric that is the objective, by default `"val_loss"`: what `train` returns, or returns in a
            mapping under that name. A list makes several objectives.
        prune_on: the metric that trials report while they train; one of the monitored ones, by default the first.
        seed: everything random is derived from it and the trials' numbers; a non-negative integer.

    Raises:
        SpaceError, ConfigurationError: for settings that cannot work.
        StorageError: for a folder whose study was made with other settings (says which), or cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        space: Space | Mapping[str, Parameter | Scalar] | None = None,
        sampler: str | Options | BaseSampler | Sampler | None = None,
        pruner: str | Options | BasePruner | None = None,
        direction: Direction | Sequence[Direction] | None = None,
        monitor: str | Sequence[str] | None = None,
        prune_on: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._home = self.folder.absolute()  # wherever this process goes
        stored = Storage(self._home) if Storage.exists(self._home) and _has_study(self._home) else None
        before = stored.spec if stored is not None else None
        if before is None and space is None:
            raise ConfigurationError(
                f"There is no study in {self.folder} yet: give it a space, Study(folder, space=...)."
            )
        given_sampler = sampler_of(sampler if sampler is not None else before.sampler if before else "random")
        given_pruner = pruner_of(pruner if pruner is not None else before.pruner if before else "none")
        self._sampler, self._pruner = given_sampler, given_pruner
        names = as_monitors(monitor if monitor is not None else before.monitors if before else "val_loss")
        default = before.directions if before and monitor is None else ("minimize",) * len(names)
        spec = StudySpec(
            space=_as_space(space) if space is not None else before.space,  # type: ignore[union-attr]
            sampler=given_sampler.text,
            pruner=given_pruner.text,
            directions=as_directions(direction if direction is not None else default, len(names)),
            monitors=names,
            prune_on=_checked_prune_on(prune_on, names, before),
            seed=_checked_seed(seed if seed is not None else before.seed if before else 0),
        )
        given_sampler.item.check(spec)
        if before is not None and before.differences(spec):
            raise StorageError(
                f"{self.folder} holds a study that was made differently: {'; '.join(before.differences(spec))}. "
                "Open it by Study(folder) as it is, or take another folder."
            )
        self._storage = stored if stored is not None else Storage(self._home, spec)
        self._stopped: str | None = None

    @property
    def spec(self) -> StudySpec:
        """The settings."""
        return self._storage.spec

    @property
    def space(self) -> Space:
        """What is searched."""
        return self.spec.space

    @property
    def stopped(self) -> str | None:
        """Why the last `run` of this object ended before it was through, such as `"Ctrl-C"`; None if it was."""
        return self._stopped

    def enqueue(self, /, **params: Scalar) -> int:
        """Have a point tried before the sampler's own, such as the settings used so far; the trial's number.

        Raises:
            SpaceError: for a point that is not in the space.
        """
        return self._storage.create("waiting", fixed=self.space.check(params))

    def run(
        self,
        train: Callable[[Trial], Any],
        trials: int | None = None,
        *,
        workers: int = 1,
        timeout: float | None = None,
        retries: int = 0,
        trial_timeout: float | None = None,
        alike_failures: int | None = 5,
        execution: Executor | Literal["local", "ray"] = "local",
        progress: bool | None = None,
    ) -> list[TrialRecord]:
        """Run trials until the study has `trials` of them, those of earlier runs included; all of its records.

        Ctrl-C, or the end of `timeout`, stops running trials when they next report, and leaves them waiting; a second
        Ctrl-C kills them at once and raises `KeyboardInterrupt`. Both can be resumed.

        Args:
            train: called with a `Trial` in a process of its own. Returns the objective, a tuple of them, or a mapping
                of metrics that has it under the study's `monitor`. It is pickled by value with what it refers to, so
                that it may be defined anywhere, also in a notebook.
            trials: how many trials the study is to have in the end. None: as many as an earlier run said, all points
                of a grid, or as many as `timeout` allows.
            workers: trials at a time.
            timeout: seconds for the whole run.
            retries: how often a trial that fails is continued from its last checkpoint with the same parameters.
            trial_timeout: seconds after which an attempt is killed and counts as failed.
            alike_failures: stop when the first so many trials of this run, retries used up, have all failed of the same
                reason (but for the numbers in it), for then the rest would too; None never does.
            execution: `"local"`, `"ray"`, or `Local(...)`, `Ray(...)` with options of their own.
            progress: whether to show how far the study is: on a terminal one line that updates itself, elsewhere a line
                every five seconds. None: on a terminal only.

        Raises:
            ConfigurationError: for limits that are out of range, or none at all.
            ObjectiveError: if `train` cannot be sent to a worker, or returns no number, or if the first trials all fail
                of the same; trials that were under way are left waiting.
            StorageError: if another process is running the study, or the disk is full.
        """
        if not (progress is None or isinstance(progress, bool)):
            raise ConfigurationError(f"`progress` must be True, False or None, but got {progress!r}.")
        limits = _checked_limits(
            trials, timeout, retries, trial_timeout, alike_failures, self._storage, self._sampler.item
        )
        payload = pickled(train)
        executor = executor_of(execution, workers)
        with Lock(self._home):
            self._storage.target = limits.trials
            board = Board(self._home, self.spec)
            board.open(self._storage.records())
            executor.open(payload)
            pruning = Pruning(self._pruner, self._storage)
            parts = self._storage, self._sampler.item, pruning, executor, board, limits, progress_of(progress)
            driver = Driver(*parts)
            self._stopped = driver.run()
        if self._stopped is not None:
            told = "The study stopped early: %s. Study(%r).resume(train) goes on."
            log.warning(told, self._stopped, str(self.folder))
        return self.trials

    def resume(self, train: Callable[[Trial], Any], **settings: Any) -> list[TrialRecord]:
        """Run exactly the trials that an earlier run left out or unfinished; see `run`."""
        return self.run(train, **settings)

    @property
    def trials(self) -> list[TrialRecord]:
        """The records of all trials, oldest first."""
        return self._storage.records()

    @property
    def best(self) -> TrialRecord:
        """The complete trial with the best value.

        Raises:
            ConfigurationError: with several objectives; see `front`.
            LookupError: as long as no trial is complete.
        """
        if len(self.spec.directions) > 1:
            raise ConfigurationError(
                f"With the objectives {list(self.spec.monitors)} there is no one best: see `front`."
            )
        return self._front_or_raise()[0]

    @property
    def front(self) -> list[TrialRecord]:
        """The complete trials that no other one beats in every objective."""
        return front_of(self.spec, self.trials)

    def dataframe(self) -> pd.DataFrame:
        """One row per trial: number, state, value, parameters as `params_…`, metrics as `metrics_…`, and the rest.

        Raises:
            ModuleNotFoundError: without pandas.
        """
        import pandas as pd

        rows = []
        for record in self.trials:
            row: dict[str, Any] = {"number": record.number, "state": record.state}
            values = record.value if isinstance(record.value, tuple) else (record.value,)
            if len(self.spec.monitors) == 1:
                row["value"] = values[0]
            else:
                padded = (*values, *(None,) * (len(self.spec.monitors) - len(values)))
                row.update({f"values_{name}": v for name, v in zip(self.spec.monitors, padded, strict=True)})
            row.update({f"params_{name}": record.params.get(name) for name in self.space})
            row.update({f"metrics_{name}": value for name, value in record.metrics.items()})
            row.update({"attempts": record.attempts, "duration": record.duration, "reason": record.reason})
            rows.append(row)
        return pd.DataFrame(rows)

    def report(self, path: str | Path | None = None, *, png: str | Path | None = None) -> Path:
        """Draw the study: values by trial, learning curves, what was learned inside, importance, and a table.

        Args:
            path: of one HTML file that needs no network; by default `report.html` in the study's folder.
            png: a folder for the same pictures as PNGs.

        Returns:
            the path of the file.

        Raises:
            ModuleNotFoundError: without `pip install 'hypergrad-lightning[report]'`.
        """
        from hypergrad.search.analysis.report import report_of  # heavy, and partly an extra

        return report_of(self._storage, path, png=png)

    def _front_or_raise(self) -> list[TrialRecord]:
        front = self.front
        if not front:
            states = [r.state for r in self.trials]
            counted = {state: states.count(state) for state in dict.fromkeys(states)} or "no trial was run yet"
            raise LookupError(f"No trial of {self.folder} is complete: {counted}.")
        return front

    def __repr__(self) -> str:
        return f"Study({str(self.folder)!r}, sampler={self.spec.sampler!r}, pruner={self.spec.pruner!r})"


def _has_study(folder: Path) -> bool:
    """Not if the process that made the file was killed before it had written the settings."""
    try:
        Storage(folder).close()
    except StorageError as error:
        if "holds no study" in str(error) or "is no study" in str(error):
            if any(folder.glob("trial-*")):
                raise StorageError(f"{folder / FILE} is empty, but there are trials beside it. {DAMAGED}.") from error
            return False
        raise
    return True


def _as_space(space: Space | Mapping[str, Parameter | Scalar]) -> Space:
    return space if isinstance(space, Space) else Space(space)


def _checked_prune_on(prune_on: str | None, monitors: tuple[str, ...], before: StudySpec | None) -> str:
    chosen = prune_on or (before.prune_on if before and before.prune_on in monitors else monitors[0])
    if chosen not in monitors:
        raise ConfigurationError(f"`prune_on` must be one of the monitored {list(monitors)}, but got {prune_on!r}.")
    return chosen


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigurationError(f"`seed` must be a non-negative integer, but got {seed!r}.")
    return seed


def _checked_limits(
    trials: int | None,
    timeout: float | None,
    retries: int,
    trial_timeout: float | None,
    alike_failures: int | None,
    storage: Storage,
    sampler: Sampler,
) -> Limits:
    for name, count, least in (("trials", trials, 1), ("retries", retries, 0), ("alike_failures", alike_failures, 1)):
        optional = count is None and name != "retries"
        if not optional and (isinstance(count, bool) or not isinstance(count, int) or count < least):
            raise ConfigurationError(f"`{name}` must be an integer of at least {least}, but got {count!r}.")
    for name, seconds in (("timeout", timeout), ("trial_timeout", trial_timeout)):
        if seconds is not None and (
            isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0
        ):
            raise ConfigurationError(f"`{name}` must be a positive number of seconds, but got {seconds!r}.")
    trials = trials if trials is not None else storage.target
    if trials is None and timeout is None and not sampler.ends:
        raise ConfigurationError("Say when the study ends: `trials=`, `timeout=`, or both.")
    sampler.check_trials(trials)
    return Limits(trials, timeout, retries, trial_timeout, alike_failures)
