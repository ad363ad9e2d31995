"""The study's SQLite file, written by one process only: the one that runs the study."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.event
import sqlalchemy.exc
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState

from hypergrad.search.errors import StorageError
from hypergrad.search.record import State, TrialRecord
from hypergrad.search.spec import StudySpec

NAME = "study"
FILE = "study.db"
DAMAGED = "The file is damaged: put back a copy of it, or start a new study in another folder"
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_OPTUNA = {name: state for state, name in _STATES.items()}


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial keeps its logs, checkpoints and event files."""
    return folder / f"trial-{number:04}"


class Storage:
    """Optuna's RDB storage in the study folder, with what it does not know: attempts, reasons, metrics.

    A finished trial was written in one transaction that came last; a trial in any other state is one to run.

    Raises:
        StorageError: on every method, for a file that is damaged, too new, locked by another process, or a full disk.
    """

    def __init__(self, folder: Path, spec: StudySpec | None = None) -> None:
        self.folder = folder
        with self._errors():
            if spec is not None:
                _make(folder)
            address = sqlalchemy.URL.create("sqlite", database=str(folder.absolute() / FILE))
            backend = RDBStorage(address.render_as_string(), engine_kwargs={"connect_args": {"timeout": 60}})
            sqlalchemy.event.listen(backend.engine, "connect", _fast_commits)
            backend.engine.dispose()  # connections made from now on commit fast
            _check_integrity(backend)
            self._storage: BaseStorage = get_storage(backend)
            self._backend = backend
            directions = [optuna.study.StudyDirection[d.upper()] for d in spec.directions] if spec else []
            if spec is not None and not self._storage.get_all_studies():
                with quiet():
                    self._storage.create_new_study(directions, NAME)
            self.study = optuna.load_study(study_name=NAME, storage=self._storage)
            self._id = self._storage.get_study_id_from_name(NAME)
            stored = self._storage.get_study_user_attrs(self._id)
            if "hypergrad" not in stored:  # new, or killed right after the line that created it
                if spec is None:
                    raise StorageError(f"{folder / FILE} is no study of hypergrad.")
                self._storage.set_study_user_attr(self._id, "hypergrad", spec.to_json())
                stored = {"hypergrad": spec.to_json()}
        self.spec = StudySpec.from_json(stored["hypergrad"])

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether there is a study in `folder`."""
        return (folder / FILE).exists()

    def close(self) -> None:
        """Let go of the file."""
        self._backend.remove_session()
        self._backend.engine.dispose()

    # -------------------------------------------------------------------------------------------------- the study

    @property
    def target(self) -> int | None:
        """How many trials the study is to have; None before the first run."""
        with self._errors():
            target: int | None = self._storage.get_study_user_attrs(self._id).get("target")
            return target

    @target.setter
    def target(self, count: int | None) -> None:
        with self._errors():
            self._storage.set_study_user_attr(self._id, "target", count)

    def numbers(self, *states: State) -> list[int]:
        """The numbers of the trials in `states`, of all without an argument."""
        wanted = tuple(_OPTUNA[state] for state in states) if states else None
        with self._errors():
            return [t.number for t in self._storage.get_all_trials(self._id, deepcopy=False, states=wanted)]

    def records(self) -> list[TrialRecord]:
        """All trials, oldest first."""
        with self._errors():
            return [self._record(trial) for trial in self._storage.get_all_trials(self._id, deepcopy=False)]

    def record(self, number: int) -> TrialRecord:
        """One trial."""
        return self._record(self.frozen(number))

    def frozen(self, number: int) -> FrozenTrial:
        """One trial as Optuna's samplers and pruners see it."""
        with self._errors():
            return self._storage.get_trial(self._trial_id(number))

    # --------------------------------------------------------------------------------------------------- a trial

    def create(self, state: State = "running", **attributes: Any) -> int:
        """A new trial without parameters; its number."""
        template = optuna.trial.create_trial(state=_OPTUNA[state], user_attrs=attributes) if attributes else None
        with self._errors():
            return self._storage.get_trial(self._storage.create_new_trial(self._id, template)).number

    def set_params(self, number: int, params: Mapping[str, Any], **attributes: Any) -> None:
        """Give a trial its point; `params` as a whole comes last, so that half a point is never taken for one."""
        trial = self._trial_id(number)
        with self._errors():
            for name, distribution in self.spec.space.distributions().items():
                if name in params:
                    internal = distribution.to_internal_repr(params[name])
                    self._storage.set_trial_param(trial, name, internal, distribution)
            for key, value in {**attributes, "params": dict(params)}.items():
                self._storage.set_trial_user_attr(trial, key, value)

    def attributes(self, number: int) -> dict[str, Any]:
        """What else was kept of a trial."""
        return dict(self.frozen(number).user_attrs)

    def set_attribute(self, number: int, key: str, value: Any) -> None:
        """Keep something else of a trial; `value` as JSON can hold it."""
        with self._errors():
            self._storage.set_trial_user_attr(self._trial_id(number), key, value)

    def begin(self, number: int) -> tuple[int, dict[str, Any]]:
        """Count one more attempt; how many that makes, and the trial's attributes."""
        trial, before = self._trial_id(number), self.frozen(number)
        attempts = [*before.user_attrs.get("attempts", []), {"began": time.time()}]
        with self._errors():
            if before.state == TrialState.WAITING:
                self._storage.set_trial_state_values(trial, TrialState.RUNNING)
            self._storage.set_trial_user_attr(trial, "attempts", attempts)
        return len(attempts), dict(before.user_attrs)

    def end_attempt(
        self, number: int, reason: str | None, *, known_end: bool = True, excused: bool = False
    ) -> dict[str, Any]:
        """The attempt is over, and `reason` is why the trial is not; `excused` where that was not its fault.

        Returns:
            the trial's attributes as they were.
        """
        attributes = dict(self.frozen(number).user_attrs)
        attempts = attributes.get("attempts", [])
        if not attempts or "ended" in attempts[-1]:
            return attributes
        ended = time.time() if known_end else None
        attempts = [*attempts[:-1], {**attempts[-1], "ended": ended, "reason": reason, "excused": excused}]
        with self._errors():
            self._storage.set_trial_user_attr(self._trial_id(number), "attempts", attempts)
        return attributes

    def deaths(self, number: int) -> int:
        """Attempts that ended by the trial's own fault."""
        attempts = self.frozen(number).user_attrs.get("attempts", [])
        return sum(a.get("reason") is not None and not a["excused"] for a in attempts)

    def put_back(self, number: int) -> None:
        """Leave a trial to be continued by a later run."""
        with self._errors():
            self._storage.set_trial_state_values(self._trial_id(number), TrialState.WAITING)

    def resume_and_finish(self, number: int, state: State, reason: str) -> TrialRecord:
        """End a trial that is waiting."""
        with self._errors():
            self._storage.set_trial_state_values(self._trial_id(number), TrialState.RUNNING)
        return self.finish(number, state, reason=reason, metrics=self.record(number).metrics)

    def report(self, number: int, step: int, value: float) -> None:
        """Keep what a trial reported; a step that is reported again, after a retry, replaces what was there."""
        with self._errors():
            self._storage.set_trial_intermediate_value(self._trial_id(number), step, value)

    def finish(
        self,
        number: int,
        state: State,
        values: Sequence[float] | None = None,
        reason: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> TrialRecord:
        """End a trial; its final record. `values` only of a complete one."""
        attributes, trial = self.end_attempt(number, None), self._trial_id(number)
        with self._errors():
            if reason is not None or "reason" in attributes:
                self._storage.set_trial_user_attr(trial, "reason", reason)
            self._storage.set_trial_user_attr(trial, "metrics", dict(metrics or {}))
            self.study.tell(number, list(values) if values is not None else None, state=_OPTUNA[state])
        return self.record(number)

    # ----------------------------------------------------------------------------------------------------- inside

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        attributes = trial.user_attrs
        attempts = attributes.get("attempts", [])
        value = None if trial.values is None else tuple(trial.values)
        return TrialRecord(
            number=trial.number,
            params=attributes.get("params", {}),
            value=value[0] if value is not None and len(value) == 1 else value,
            state=_STATES[trial.state],
            reason=attributes.get("reason"),
            metrics=attributes.get("metrics", {}),
            attempts=len(attempts),
            failures=tuple(a["reason"] for a in attempts if a.get("reason")),
            duration=sum(a["ended"] - a["began"] for a in attempts if a.get("ended") is not None),
            curve=dict(sorted(trial.intermediate_values.items())),
            folder=trial_folder(self.folder, trial.number),
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        file = self.folder / FILE
        try:
            yield
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            if "full" in cause:
                cause += ". Free some space, then resume the study: nothing that was finished is lost"
            elif "malformed" in cause or "not a database" in cause:
                cause += f". {DAMAGED}"
            raise StorageError(f"{file}: {cause}.") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StorageError(f"{file} holds what nobody wrote: {error}. {DAMAGED}.") from error
        except RuntimeError as error:
            if "schema" not in str(error) and "version" not in str(error):
                raise
            raise StorageError(f"{file} was written by another version of Optuna: {error}") from error
        except KeyError as error:
            raise StorageError(f"{file} holds no study of hypergrad ({error}).") from error


def _check_integrity(backend: RDBStorage) -> None:
    """SQLite notices a page that is lost only when it reads it; a trial must not be missing because of that."""
    with backend.engine.connect() as connection:
        found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
    if found != "ok":
        lines = str(found).strip().splitlines()
        raise StorageError(f"{backend.engine.url.database}: {lines[-1]}. {DAMAGED}.")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"The folder {folder} cannot be made: {error.strerror or error}.") from error


def _fast_commits(connection: Any, _: Any) -> None:
    """Commits without waiting for the disk: 0.01 ms where it would be 20.

    Safe against every death of a process; a power failure may undo the last commits, and leaves a consistent study.
    """
    for setting in ("journal_mode=WAL", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {setting}")


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna does not say on standard error that it has made a study."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
