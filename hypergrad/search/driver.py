"""The loop that owns a running study: it starts, hears, stops, retries and records trials."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass

from hypergrad.search.alike import AlikeFailures
from hypergrad.search.board import Board
from hypergrad.search.clock import Clocks
from hypergrad.search.errors import ObjectiveError, StorageError
from hypergrad.search.execution.base import Began, Ended, Event, Executor, Launched, Reported
from hypergrad.search.failure import FILE, keep_error, last_frame, stack_of
from hypergrad.search.interrupt import ctrl_c
from hypergrad.search.messages import Job, Result, Verdict
from hypergrad.search.progress import Pace, Progress
from hypergrad.search.pruners import Pruning
from hypergrad.search.samplers.base import Sampler
from hypergrad.search.seeding import derived_seed
from hypergrad.search.storage import Storage, trial_folder
from hypergrad.search.worker import saved_result

log = logging.getLogger("hypergrad.search")
_INTERRUPTED = "interrupted"
_PAUSED = "paused"


@dataclass(frozen=True)
class Limits:
    """How much a run may do; see `Study.run`."""

    trials: int | None
    timeout: float | None
    retries: int
    trial_timeout: float | None
    alike_failures: int | None = None


class Driver:
    """Runs the trials of one study until it has as many as it should, or is told to stop.

    Every trial is in one of three places: finished in the storage; running here; or unfinished in the storage, as the
    state "waiting", or "running" if an earlier driver was killed. `run` leaves none in the last of these.
    """

    def __init__(
        self,
        storage: Storage,
        sampler: Sampler,
        pruning: Pruning,
        executor: Executor,
        board: Board,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._storage, self._sampler, self._pruning = storage, sampler, pruning
        self._executor, self._board, self._limits = executor, board, limits
        self._progress, self._pace = progress, _pace(storage, limits)
        self._alike = AlikeFailures(limits.alike_failures)
        self._clocks = Clocks(limits.trial_timeout)  # of the running trials
        self._stopped: dict[int, str] = {}  # what a running trial was told
        self._killed: dict[int, str] = {}  # why we killed it
        self._retries: deque[int] = deque()
        self._stopping: str | None = None
        self._invalid: str | None = None

    def run(self) -> str | None:
        """Everything that there is to do; why it stopped early, or None.

        Raises:
            ObjectiveError: if `train` returns what is no objective, or always fails; what runs is then left waiting.
            KeyboardInterrupt: at the second Ctrl-C; the running trials are then left waiting.
        """
        self._adopt_orphans()
        until = time.monotonic() + self._limits.timeout if self._limits.timeout is not None else None
        with ctrl_c(self._interrupt), self._progress:
            try:
                while True:
                    if until is not None and time.monotonic() > until and self._stopping is None:
                        self._stopping = f"the timeout of {self._limits.timeout:g} s is over"
                    self._fill()
                    if not self._clocks:
                        break
                    for event in self._executor.poll(0.2):
                        self._handle(event)
                    self._enforce()
                    if self._progress.is_due:
                        self._progress.show(self._pace.standing(len(self._clocks)))
            finally:
                self._executor.close()
                with suppress(StorageError):  # a full disk: the next driver finds them running, and takes them on
                    for number in self._clocks:
                        self._leave_waiting(number, "the study was stopped")
            self._progress.show(self._pace.standing(0))
        if self._invalid is not None:
            raise ObjectiveError(self._invalid)
        return self._stopping

    # ---------------------------------------------------------------------------------------------------- start

    def _adopt_orphans(self) -> None:
        """Trials that a killed driver left running: record those that had ended meanwhile, queue the others."""
        for number in self._storage.numbers("running"):
            record = self._storage.record(number)
            result = saved_result(trial_folder(self._storage.folder, number), record.attempts)
            if result is not None and result.state in ("complete", "pruned"):
                self._finish(number, result)
            else:
                self._leave_waiting(number, "the driver was killed", known_end=False)

    def _fill(self) -> None:
        while self._stopping is None and len(self._clocks) < self._executor.capacity:
            number = self._next()
            if number is None:
                return
            self._start(number)

    def _next(self) -> int | None:
        if self._retries:
            return self._retries.popleft()
        if self._sampler.urgent(self._storage) and self._room():
            return self._create()
        waiting = self._storage.numbers("waiting")
        if waiting:
            able = self._sampler.continuable(self._storage, waiting, len(self._clocks))
            if able:
                return able[0]
            if self._sampler.urgent(self._storage) and self._room():
                return self._create()
        if self._room() and not self._sampler.exhausted(self._storage):
            return self._create()
        return None

    def _room(self) -> bool:
        return self._limits.trials is None or len(self._storage.numbers()) < self._limits.trials

    def _create(self) -> int:
        number = self._storage.create()
        self._propose(number)
        return number

    def _propose(self, number: int) -> None:
        fixed = self._storage.attributes(number).get("fixed")
        if fixed is not None:
            self._storage.set_params(number, fixed)
            return
        proposal = self._sampler.propose(self._storage, number)
        if proposal.parent is not None:
            source = trial_folder(self._storage.folder, proposal.parent) / "checkpoints"
            if source.exists():
                target = trial_folder(self._storage.folder, number) / "checkpoints"
                shutil.copytree(source, target, dirs_exist_ok=True)
        self._storage.set_params(number, proposal.params, **proposal.attributes)

    def _start(self, number: int) -> None:
        record = self._storage.record(number)
        if not record.params:  # enqueued, or its driver was killed before it had drawn them
            self._propose(number)
            record = self._storage.record(number)
        (attempt, attributes), spec = self._storage.begin(number), self._storage.spec
        try:
            record.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"Cannot make the folder of trial {number}: {error}.") from error
        job = Job(
            number=number,
            params=record.params,
            seed=derived_seed(spec.seed, number),
            attempt=attempt,
            folder=str(record.folder.resolve()),
            monitors=spec.monitors,
            prune_on=spec.prune_on,
            prunes=spec.pruner != "none" or self._sampler.needs_reports,
            folds_apart=spec.pruner.startswith("wilcoxon") or spec.pruner == "WilcoxonPruner object",
            inherited="parent" in attributes and not record.curve,
        )
        self._board.started(record)
        self._clocks.submitted(number)
        self._executor.submit(job)

    # ---------------------------------------------------------------------------------------------------- hear

    def _handle(self, event: Event) -> None:
        if event.number not in self._clocks:
            return
        match event:
            case Launched(number):
                self._clocks.launched(number)
            case Began(number):
                self._clocks.began(number)
            case Ended():
                self._ended(event)
            case Reported(number, report):
                self._reported(number, report.step, report.value)

    def _reported(self, number: int, step: int, value: float) -> None:
        pauses = self._sampler.pauses(step) and self._is_news(number, step)
        self._storage.report(number, step, value)
        self._board.reported(number, step, value, trial_folder(self._storage.folder, number))
        reason = self._pruning.decide(number, step, value)
        if reason is None and self._stopping is not None:
            reason = _INTERRUPTED
        elif reason is None and pauses:
            reason = _PAUSED
        if reason is not None:
            self._stopped[number] = reason
        self._executor.reply(number, Verdict(reason, later=reason in (_INTERRUPTED, _PAUSED)))

    def _is_news(self, number: int, step: int) -> bool:
        """A training that begins anew instead of going on has been at a step before, and would pause there for ever."""
        return step > max(self._storage.record(number).curve, default=-1)

    def _ended(self, event: Ended) -> None:
        number, result = event.number, event.result
        self._clocks.ended(number)
        stopped, killed = self._stopped.pop(number, None), self._killed.pop(number, None)
        if stopped in (_INTERRUPTED, _PAUSED):
            self._leave_waiting(number, None if stopped == _PAUSED else self._stopping)
        elif stopped is not None:
            self._finish(number, result or Result("pruned", reason=stopped))
        elif result is not None and result.state in ("complete", "pruned"):
            self._finish(number, result)
        elif result is not None and result.state == "invalid":
            self._invalid = self._stopping = f"Trial {number}: {result.reason}"
            self._leave_waiting(number, result.reason)
        else:
            reason = killed or (result.reason if result is not None else event.reason) or "unknown"
            self._failed(number, result, self._explained(number, result, reason))

    def _explained(self, number: int, result: Result | None, reason: str) -> str:
        """The reason, with the place of a crash; all that is known goes into the trial's folder."""
        record = self._storage.record(number)
        stack = stack_of(record.folder, record.attempts)
        if result is None and stack is not None:
            frame = last_frame(stack)
            reason = f"{reason}{f' in {frame}' if frame else ''}; the stack is in {FILE}"
        parts = (result.traceback if result is not None else None, stack)
        keep_error(record.folder, record.attempts, reason, "\n".join(filter(None, parts)))
        return reason

    def _failed(self, number: int, result: Result | None, reason: str) -> None:
        if self._alike.enough:  # it was under way when that became clear, and waits for the mended function
            self._leave_waiting(number, reason)
            return
        if self._storage.deaths(number) < self._limits.retries:
            log.warning("Trial %d: %s. It is continued.", number, reason)
            self._leave_waiting(number, reason, counts=True)
            if self._stopping is None:
                self._retries.append(number)
            return
        self._storage.end_attempt(number, reason)
        known = result or Result("failed")
        self._finish(number, Result("failed", None, known.metrics, known.logged, reason))

    def _finish(self, number: int, result: Result) -> None:
        assert result.state in ("complete", "pruned", "failed")
        record = self._storage.finish(number, result.state, result.values, result.reason, result.metrics)
        self._pruning.finished(record)
        self._board.finished(record, result.logged)
        self._pace.finished(record.state, record.value)
        log.info("%s", record.line())
        self._alike.ended(record)
        if self._alike.enough and self._stopping is None:
            self._invalid = self._stopping = self._alike.words()

    def _leave_waiting(self, number: int, reason: str | None, *, known_end: bool = True, counts: bool = False) -> None:
        self._storage.end_attempt(number, reason, known_end=known_end, excused=not counts)
        self._storage.put_back(number)

    # ---------------------------------------------------------------------------------------------------- stop

    def _enforce(self) -> None:
        for number, reason in self._clocks.overdue():
            if number not in self._killed:
                self._killed[number] = reason
                self._executor.kill(number)

    def _interrupt(self) -> None:
        """Ctrl-C: once to stop when the trials next report, twice to stop at once."""
        if self._stopping is not None:
            raise KeyboardInterrupt
        self._stopping = "Ctrl-C"
        log.warning("Ctrl-C: running trials stop when they next report; once more to kill them. Both can be resumed.")


def _pace(storage: Storage, limits: Limits) -> Pace:
    records, single = storage.records(), len(storage.spec.directions) == 1
    sign = 1.0 if storage.spec.directions[0] == "minimize" else -1.0
    values = [r.value for r in records if single and r.state == "complete" and isinstance(r.value, float)]
    counts = Counter[str](r.state for r in records if r.finished)
    return Pace(counts, limits.trials, min(values, key=lambda v: sign * v, default=None), sign, limits.timeout)
