"""Trials on a Ray cluster: one task each, with Ray's core only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from hypergrad.errors import ConfigurationError
from hypergrad.search.execution.base import Began, Ended, Event, Executor, Launched, Reported
from hypergrad.search.execution.server import search_path
from hypergrad.search.messages import Job, Report, Result, Verdict
from hypergrad.search.worker import run_job, save_result


class Ray(Executor):
    """Tasks on a Ray cluster, or on a local Ray where none runs. Needs `pip install 'hypergrad-lightning[ray]'`.

    The study's folder must be on a file system that all nodes share, and hypergrad must be installed on them. Where the
    driver dies, Ray ends its tasks.

    Args:
        workers: trials at a time, at least 1; they wait for the cluster to have room.
        cpus_per_trial, gpus_per_trial: what Ray sets aside for each; GPUs may be shared (0.5).
        address: of a cluster, as of `ray.init`. None uses the Ray that is initialized, or starts one here.

    Raises:
        ConfigurationError: for numbers out of range.
        ModuleNotFoundError: without ray.
    """

    def __init__(
        self, workers: int = 1, *, cpus_per_trial: float = 1, gpus_per_trial: float = 0, address: str | None = None
    ) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ConfigurationError(f"`workers` must be an integer of at least 1, but got {workers!r}.")
        for name, share in (("cpus_per_trial", cpus_per_trial), ("gpus_per_trial", gpus_per_trial)):
            if not isinstance(share, (int, float)) or not share >= 0:
                raise ConfigurationError(f"`{name}` must be at least 0, but got {share!r}.")
        import ray

        self._ray: Any = ray
        self.capacity = workers
        self._resources = {"num_cpus": cpus_per_trial, "num_gpus": gpus_per_trial}
        self._address = address
        self._ours = False
        self._tasks: dict[Any, Job] = {}  # by reference to the task
        self._payload: Any = None
        self._mailbox: Any = None

    def open(self, payload: bytes) -> None:
        """Start or join Ray."""
        if not self._ray.is_initialized():
            path = os.pathsep.join([os.getcwd(), *filter(None, search_path())])
            environment = {} if self._address else {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
            self._ray.init(self._address, log_to_driver=False, **environment)
            self._ours = True
        self._payload = self._ray.put(payload)
        self._mailbox = self._ray.remote(_Mailbox).options(num_cpus=0).remote()

    def submit(self, job: Job) -> None:
        """Queue a task."""
        # A process per trial, as locally: all memory is returned at its end. Retries are the driver's to decide.
        task = self._ray.remote(max_calls=1, max_retries=0, **self._resources)(_attempt)
        self._tasks[task.remote(self._payload, job.to_json(), self._mailbox)] = job

    def poll(self, timeout: float) -> list[Event]:
        """What has happened; waits up to `timeout` seconds for something to happen."""
        if not self._tasks:
            time.sleep(timeout)
            return []
        letters = self._ray.get(self._mailbox.drain.remote(timeout))
        ended, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        # Of attempts that go on. What one that has died left in the mailbox is none of the next one's.
        alive = {(job.number, job.attempt) for task, job in self._tasks.items() if task not in ended}
        events: list[Event] = [event for event, attempt in letters if (event.number, attempt) in alive]
        return events + [self._ended(task) for task in ended]

    def reply(self, number: int, verdict: Verdict) -> None:
        """Answer a report."""
        self._mailbox.reply.remote(number, verdict)

    def kill(self, number: int) -> None:
        """End a task at once."""
        for task, job in self._tasks.items():
            if job.number == number:
                self._ray.cancel(task, force=True)

    def close(self) -> None:
        """Cancel what runs, and end Ray if it was started here."""
        if self._mailbox is None:
            return
        for task in self._tasks:
            self._ray.cancel(task, force=True)
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=10.0)
        self._tasks.clear()
        self._ray.kill(self._mailbox)
        self._mailbox = self._payload = None
        if self._ours:
            self._ray.shutdown()
            self._ours = False

    def _ended(self, task: Any) -> Ended:
        number = self._tasks.pop(task).number
        try:
            return Ended(number, Result.from_json(self._ray.get(task)))
        except self._ray.exceptions.WorkerCrashedError:
            return Ended(number, None, "its Ray worker died: killed by somebody, or because memory ran out")
        except self._ray.exceptions.RayError as error:
            return Ended(number, None, f"{type(error).__name__}: {error}".splitlines()[0])


class _Mailbox:
    """An actor between the tasks and the driver, for a task cannot be talked to while it runs."""

    def __init__(self) -> None:
        self._letters: list[tuple[Event, int]] = []
        self._answers: dict[int, asyncio.Future[Verdict]] = {}
        self._news = asyncio.Event()

    async def tell(self, event: Event, attempt: int) -> None:
        self._letters.append((event, attempt))
        self._news.set()

    async def ask(self, number: int, attempt: int, report: Report) -> Verdict:
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self.tell(Reported(number, report), attempt)
        return await self._answers[number]

    async def drain(self, timeout: float) -> list[tuple[Event, int]]:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout)
        self._news.clear()
        letters, self._letters = self._letters, []
        return letters

    async def reply(self, number: int, verdict: Verdict) -> None:
        answer = self._answers.pop(number, None)
        if answer is not None and not answer.done():
            answer.set_result(verdict)

    async def ended(self) -> None:
        """Wake the driver."""
        self._news.set()


class _Channel:
    def __init__(self, job: Job, mailbox: Any) -> None:
        import ray

        self._ray: Any = ray
        self._job, self._mailbox = job, mailbox

    def launched(self) -> None:
        self._tell(Launched(self._job.number))

    def begin(self) -> None:
        self._tell(Began(self._job.number))

    def ask(self, report: Report) -> Verdict:
        verdict: Verdict = self._ray.get(self._mailbox.ask.remote(self._job.number, self._job.attempt, report))
        return verdict

    def _tell(self, event: Event) -> None:
        self._ray.get(self._mailbox.tell.remote(event, self._job.attempt))  # it is there before anything happens


def _attempt(payload: bytes, job_json: dict[str, Any], mailbox: Any) -> dict[str, Any]:
    """The task: one attempt at one trial, in a process that does nothing else before or after."""
    job = Job.from_json(job_json)
    channel = _Channel(job, mailbox)
    channel.launched()
    log = os.open(Path(job.folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    result = run_job(payload, job, channel)
    if result.traceback:
        print(result.traceback, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        save_result(result, job)
    mailbox.ended.remote()
    return result.to_json()
