"""Every point once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from hypergrad.search.errors import SpaceError
from hypergrad.search.samplers.base import Proposal, Sampler
from hypergrad.search.spec import StudySpec
from hypergrad.search.storage import Storage

_TRIES = 100_000  # points that are looked at for a feasible one, before a trial is spent


class Grid(Sampler):
    """Enumerates the space, the last parameter changing fastest, and skips what the study has a trial for.

    Failed and pruned trials have been visited and keep their points; one that was killed is continued under its own.
    """

    ends = True

    def __init__(self) -> None:
        self._points: Iterator[dict[str, Any]] | None = None
        self._next: dict[str, Any] | None = None

    def check(self, spec: StudySpec) -> None:
        """Raise `SpaceError` for a grid that is infinite or empty."""
        points = islice(spec.space.grid(feasible=False), _TRIES + 1)
        count = 0
        for count, point in enumerate(points, 1):  # noqa: B007 - it is how many there were
            if spec.space.is_feasible(point):
                return
        which = f"None of the first {_TRIES} points" if count > _TRIES else "No point"
        raise SpaceError(f"{which} of the grid satisfies {[c.text for c in spec.space.constraints]}.")

    def exhausted(self, storage: Storage) -> bool:
        """Whether every point has a trial."""
        return self._upcoming(storage) is None

    def propose(self, storage: Storage, number: int) -> Proposal:  # noqa: ARG002
        """The first point that no trial has."""
        point = self._upcoming(storage)
        assert point is not None, "asked although exhausted"
        return Proposal(point)

    def _upcoming(self, storage: Storage) -> dict[str, Any] | None:
        if self._points is None:
            self._points = storage.spec.space.grid()
            self._next = next(self._points, None)
        taken = {_key(record.params) for record in storage.records()}
        # The points never come back, so that all before this one are taken for good.
        while self._next is not None and _key(self._next) in taken:
            self._next = next(self._points, None)
        return self._next


def _key(params: Any) -> str:
    return json.dumps(dict(params), sort_keys=True)
