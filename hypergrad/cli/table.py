"""Trials and studies as text."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypergrad.errors import HypergradError
from hypergrad.search import Storage, TrialRecord
from hypergrad.search.failure import FILE
from hypergrad.search.front import front_of


def studies_in(folder: Path) -> Iterator[Path]:
    """`folder` if it holds a study, or else the folders in it that do, at any depth."""
    for name, folders, _ in os.walk(folder):
        if Storage.exists(Path(name)):
            yield Path(name)
            folders.clear()  # not into its trials
        folders.sort()


def study_table(storage: Storage) -> str:
    """What is searched and how, and one line per trial."""
    spec = storage.spec
    goals = ", ".join(f"{d} {m}" for d, m in zip(spec.directions, spec.monitors, strict=True))
    head = f"{storage.folder}: {goals}; sampler {spec.sampler}, pruner {spec.pruner}, seed {spec.seed}"
    return f"{head}\n{spec.space}\n\n{trials_table(storage.records())}"


def trials_table(records: Sequence[TrialRecord]) -> str:
    """One line per trial, in aligned columns."""
    if not records:
        return "No trial was run yet."
    rows = [("trial", "state", "value", "seconds", "attempts", "parameters", "reason")]
    for record in records:
        params = " ".join(f"{name}={_short(value)}" for name, value in record.params.items())
        reason = record.reason or (f"to be continued: {record.failures[-1]}" if _unfinished(record) else "")
        seconds = f"{record.duration:.1f}"
        rows.append(
            (str(record.number), record.state, _short(record.value), seconds, str(record.attempts), params, reason)
        )
    traced = [str(record.number) for record in records if record.error is not None]
    said = f"\n\nTracebacks are in {FILE} in the folders of trials {', '.join(traced)}." if traced else ""
    return _aligned(rows) + said


def studies_table(folders: Sequence[Path]) -> str:
    """One line per study; one that cannot be read says why."""
    rows = [("study", "trials", "best", "states")]
    for folder in folders:
        try:
            rows.append(_summary(folder))
        except HypergradError as error:
            rows.append((str(folder), "-", "-", str(error).splitlines()[0]))
    return _aligned(rows)


def _summary(folder: Path) -> tuple[str, str, str, str]:
    storage = Storage(folder)
    records, target = storage.records(), storage.target
    storage.close()
    states = ", ".join(f"{count} {state}" for state, count in Counter(r.state for r in records).items())
    values = [r.value for r in front_of(storage.spec, records)]
    best = f"{len(values)} on the front" if len(storage.spec.monitors) > 1 else _short(values[0]) if values else "-"
    return str(folder), f"{len(records)}{f'/{target}' if target is not None else ''}", best, states or "-"


def _unfinished(record: TrialRecord) -> bool:
    return not record.finished and bool(record.failures)


def _short(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return ",".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(" ".join(c.split("\n")).ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return "\n".join(_cut(line.rstrip(), room) for line in lines)


def _cut(line: str, room: int | None) -> str:
    """A terminal would break it, and the columns with it; what is piped is left whole."""
    return line if room is None or len(line) <= room else f"{line[: room - 1]}…"
