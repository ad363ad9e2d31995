"""Trials and studies as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hypergrad.search import Study, TrialRecord


def studies_in(folder: Path) -> list[Path]:
    """`folder` if it holds a study, or else the folders directly in it that do."""
    if (folder / "study.db").exists():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/study.db"))


def trials_table(records: Sequence[TrialRecord]) -> str:
    """One line per trial, in aligned columns."""
    rows = [("trial", "state", "value", "seconds", "attempts", "parameters and reason")]
    for record in records:
        params = " ".join(f"{name}={_short(value)}" for name, value in record.params.items())
        said = f"{params}  # {record.reason}" if record.reason else params
        seconds = f"{record.duration:.1f}"
        rows.append((str(record.number), record.state, _short(record.value), seconds, str(record.attempts), said))
    return _aligned(rows)


def studies_table(folders: Sequence[Path]) -> str:
    """One line per study."""
    rows = [("study", "trials", "best", "states")]
    for folder in folders:
        study = Study(folder)
        records = study.trials
        states = ", ".join(f"{count} {state}" for state, count in Counter(r.state for r in records).items())
        values = [r.value for r in study.front]
        best = _short(values[0]) if len(values) == 1 else f"{len(values)} on the front" if values else "-"
        rows.append((str(folder), str(len(records)), best, states or "-"))
    return _aligned(rows)


def _short(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return ",".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
