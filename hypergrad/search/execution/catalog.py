"""The places by name."""

from __future__ import annotations

from hypergrad.errors import ConfigurationError
from hypergrad.search.execution.base import Executor
from hypergrad.search.execution.local import Local
from hypergrad.search.execution.ray import Ray


def executor_of(execution: object, workers: int) -> Executor:
    """What `Study.run(execution=...)` was given, as an executor.

    Raises:
        ConfigurationError: for anything else, or for `workers` beside an executor that has its own.
    """
    if isinstance(execution, Executor):
        if workers not in (1, execution.capacity):
            raise ConfigurationError(
                f"{workers=}, but {execution!r} runs {execution.capacity} trials: give one of them."
            )
        return execution
    if execution == "local":
        return Local(workers)
    if execution == "ray":
        return Ray(workers)
    raise ConfigurationError(f"`execution` must be 'local', 'ray', Local(...) or Ray(...), but got {execution!r}.")
