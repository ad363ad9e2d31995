"""Running one attempt at a trial, wherever that is, and saying how it ended."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import torch

from hypergrad.search.checkpoint import raised_in
from hypergrad.search.errors import TrialPruned
from hypergrad.search.failure import traced_crashes
from hypergrad.search.messages import Job, Result
from hypergrad.search.seeding import seed_everything
from hypergrad.search.trial import Channel, Trial, as_number, set_current_trial

RESULT = "result.json"
_LONGEST = 2000  # characters of a reason; all of it is in the traceback


def run_job(payload: bytes, job: Job, channel: Channel | None) -> Result:
    """Call `train` with the trial; never raises."""
    with traced_crashes(Path(job.folder), job.attempt):
        return _attempt(payload, job, channel)


def _attempt(payload: bytes, job: Job, channel: Channel | None) -> Result:
    try:
        train: Callable[[Trial], Any] = cloudpickle.loads(payload)
    except BaseException as error:
        reason = f"the worker cannot load the train function: {_words(error)}"
        return Result("invalid", reason=reason, traceback=traceback.format_exc())
    trial = Trial(job, channel)
    set_current_trial(trial)
    seed_everything(job.seed)
    try:
        if channel is not None:
            channel.begin()
        returned = train(trial)
        result = _result(trial, returned, job.monitors)
    except TrialPruned as pruned:
        result = _ended(trial, "pruned", str(pruned) or "train raised TrialPruned")
    except BaseException as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raised_in(trial.folder)
        result = replace(_ended(trial, "failed", _words(error)), traceback=traceback.format_exc())
    finally:
        set_current_trial(None)
    if trial.stopped is not None:  # decided before, and whatever train did since then
        state: Literal["waiting", "pruned"] = "waiting" if trial.continued_later else "pruned"
        return replace(_ended(trial, state, trial.stopped), traceback=result.traceback)
    return result


def save_result(result: Result, job: Job) -> None:
    """Leave the result in the trial's folder, for a driver that may have been killed meanwhile."""
    path = Path(job.folder) / RESULT
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"attempt": job.attempt, "result": result.to_json()}))
    os.replace(temporary, path)


def saved_result(folder: Path, attempt: int) -> Result | None:
    """What `save_result` left of that attempt, if it did."""
    try:
        data = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return Result.from_json(data["result"]) if data["attempt"] == attempt else None


def _ended(trial: Trial, state: Literal["pruned", "failed", "waiting"], reason: str) -> Result:
    return Result(state, None, trial.metrics, trial.logged, reason)


def _result(trial: Trial, returned: Any, monitors: tuple[str, ...]) -> Result:
    if isinstance(returned, Mapping):
        trial.keep(returned, logged=False)
        missing = [name for name in monitors if as_number(returned.get(name)) is None]
        if missing:
            return _invalid(
                f"a mapping without a number under {missing}, but with {sorted(map(str, returned))}: name the "
                "objective by Study(..., monitor=...)"
            )
        values = [as_number(returned[name]) for name in monitors]
    else:
        several = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        values = [as_number(value) for value in several]
        if len(values) != len(monitors) or None in values:
            wanted = "one number" if len(monitors) == 1 else f"{len(monitors)} numbers, for {list(monitors)}"
            return _invalid(f"{_described(returned)} instead of {wanted}, or a mapping of metrics")
    numbers = tuple(value for value in values if value is not None)
    trial.keep({n: v for n, v in zip(monitors, numbers, strict=True) if n not in trial.metrics}, logged=False)
    if not all(map(math.isfinite, numbers)):
        shown = ", ".join(f"{name} = {value}" for name, value in zip(monitors, numbers, strict=True))
        return _ended(trial, "failed", f"the objective is not finite: {shown}")
    return Result("complete", numbers, trial.metrics, trial.logged, trial.reason)


def _invalid(what: str) -> Result:
    return Result("invalid", reason=f"train returned {what}.")


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"{value!r}"


def _words(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"CUDA out of memory: {error}".splitlines()[0]
    if isinstance(error, MemoryError):
        return "out of memory (MemoryError)"
    try:
        said = str(error)
    except Exception:  # of a __str__ of the user's
        said = "it cannot be printed"
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"
    # Names of files may contain what is no text, and cannot be stored.
    said = said.encode(errors="backslashreplace").decode()
    return f"{type(error).__name__}: {said}".strip().removesuffix(":")
