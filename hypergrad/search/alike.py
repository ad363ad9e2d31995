"""Noticing that a train function always fails, before a whole study is spent on it."""

from __future__ import annotations

import re

from hypergrad.search.failure import FILE
from hypergrad.search.record import TrialRecord


class AlikeFailures:
    """Judges the trials that a run has ended: whether the first ones have all failed of the same.

    One trial that ends otherwise, or fails of something else, and there is nothing to object to in this run. Numbers in
    a reason do not count: sizes, paths and addresses differ where the mistake is the same.

    Args:
        limit: how many it takes; None never has enough.

    >>> failures = AlikeFailures(2)
    >>> failures.ended(TrialRecord(0, {}, None, "failed", "ValueError: bad size 32"))
    >>> failures.enough
    False
    >>> failures.ended(TrialRecord(1, {}, None, "failed", "ValueError: bad size 64"))
    >>> failures.enough
    True
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._records: list[TrialRecord] = []
        self._acquitted = limit is None

    @property
    def enough(self) -> bool:
        """Whether it is no accident any more."""
        return not self._acquitted and len(self._records) == self._limit

    def ended(self, record: TrialRecord) -> None:
        """A trial is complete, pruned or failed."""
        if self._acquitted or self.enough:
            return
        self._records.append(record)
        self._acquitted = record.state != "failed" or _kind(record) != _kind(self._records[0])

    def words(self) -> str:
        """What there is to say once there are enough."""
        last = self._records[-1]
        which = (
            "trial of this run has" if len(self._records) == 1 else f"{len(self._records)} trials of this run have all"
        )
        return (
            f"The first {which} failed of the same: {last.reason}. The traceback of trial {last.number} is in "
            f"{last.folder / FILE}, what it printed in log.txt beside it. Mend it and resume for the others, or give "
            "run() a larger `alike_failures`"
        )


def _kind(record: TrialRecord) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e[-+]?\d+)?", "#", record.reason or "", flags=re.IGNORECASE)
