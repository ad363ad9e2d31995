"""Which trials are the best ones."""

from __future__ import annotations

from collections.abc import Sequence

from hypergrad.search.record import TrialRecord
from hypergrad.search.spec import StudySpec


def front_of(spec: StudySpec, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The complete trials that no other one beats in every objective."""
    complete = [r for r in records if r.state == "complete"]
    signs = [1.0 if d == "minimize" else -1.0 for d in spec.directions]
    losses = {r.number: _losses(r, signs) for r in complete}
    beaten = {a for a, mine in losses.items() for other in losses.values() if other != mine and _no_worse(other, mine)}
    return [r for r in complete if r.number not in beaten]


def _losses(record: TrialRecord, signs: list[float]) -> tuple[float, ...]:
    values = record.value if isinstance(record.value, tuple) else (record.value,)
    return tuple(sign * value for sign, value in zip(signs, values, strict=True) if value is not None)


def _no_worse(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))
