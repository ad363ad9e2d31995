"""Sending `train` to other processes by value, and saying what in it cannot be sent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle

from hypergrad.search.errors import ObjectiveError


def pickled(train: Callable[..., Any]) -> bytes:
    """`train` with everything that it refers to.

    Raises:
        ObjectiveError: if it cannot be called with one argument, or something in it cannot be pickled; says what.
    """
    if not callable(train):
        raise ObjectiveError(f"`train` must be a function of a Trial, but got {train!r}.")
    try:
        inspect.signature(train).bind(object())
    except TypeError as error:
        raise ObjectiveError(f"`train` must take one argument, the Trial: {error}.") from None
    except ValueError:
        pass  # a builtin without a signature
    problem = _error(train)
    if problem is None:
        payload: bytes = cloudpickle.dumps(train)
        return payload
    path, culprit = _culprit("train", train, depth=6)
    raise ObjectiveError(
        f"`train` cannot be sent to a worker, because {path} is a {type(culprit).__name__}, which cannot be pickled "
        f"({problem}). Make it inside `train`, or keep it out of what `train` refers to."
    )


def _error(value: object) -> Exception | None:
    try:
        cloudpickle.dumps(value)
    except Exception as error:  # anything can be raised by a __reduce__ of the user's
        return error
    return None


def _culprit(path: str, value: object, depth: int) -> tuple[str, object]:
    """Follow the first part that cannot be pickled down to where no part of it is to blame."""
    for name, part in _parts(value) if depth else ():
        if _error(part) is not None:
            return _culprit(path + name, part, depth - 1)
    return path, value


def _parts(value: object) -> Iterator[tuple[str, object]]:
    if inspect.ismethod(value):
        yield ".__self__", value.__self__
    if inspect.isfunction(value):
        seen = inspect.getclosurevars(value)
        for kind in (seen.nonlocals, seen.globals):
            yield from ((f" → {name}", part) for name, part in kind.items())
        yield from ((f" → default {part!r}", part) for part in value.__defaults__ or ())
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple, set)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif hasattr(value, "func") and hasattr(value, "args"):
        yield from ((f".{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())
