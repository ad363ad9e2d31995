"""What is drawn by ourselves: values by trial, learning curves, and what was learned inside the trials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypergrad.search.analysis.chart import Chart, NothingToDrawError, Series
from hypergrad.search.analysis.material import Material
from hypergrad.search.record import TrialRecord

_SHOWN = 10  # trials whose learned hyperparameters are drawn


def history(material: Material, objective: int) -> Chart:
    """The value of each trial, and the best so far."""
    name, direction = material.spec.monitors[objective], material.spec.directions[objective]
    pairs = material.values(objective)
    if not pairs:
        raise NothingToDrawError("No trial is complete yet.")
    numbers, values = [r.number for r, _ in pairs], [v for _, v in pairs]
    best = list(itertools.accumulate(values, min if direction == "minimize" else max))
    series = [
        Series("trial", numbers, values, "markers", [_told(r) for r, _ in pairs], color=0),
        Series("best so far", numbers, best, color=1),
    ]
    ended = [
        (r, r.value)
        for r in material.records
        if r.state == "pruned"
        and name == material.spec.prune_on
        and isinstance(r.value, float)
        and math.isfinite(r.value)
    ]
    if ended:
        told, last = [_told(r) for r, _ in ended], [value for _, value in ended]
        series.append(Series("pruned, last value", [r.number for r, _ in ended], last, "markers", told, True, color=9))
    return Chart(f"{name} by trial", "trial", name, series, _spans_decades(values))


def curves(material: Material) -> Chart:
    """What trials reported while they trained; pruned ones end in a cross."""
    series = []
    for record in material.records:
        points = [(step, value) for step, value in record.curve.items() if math.isfinite(value)]
        if points:
            pruned = record.state == "pruned"
            x, y = zip(*points, strict=True)
            title = f"trial {record.number}, {record.state}"
            series.append(Series(title, x, y, faint=pruned, marker="x" if pruned else "", color=record.number))
    if not series:
        raise NothingToDrawError("No trial has reported while it trained: trial.trainer(...) does, once an epoch.")
    values = [y for s in series for y in s.y]
    title = f"{material.spec.prune_on} during training; a cross marks where a trial was pruned"
    return Chart(title, "step reported", material.spec.prune_on, series, _spans_decades(values))


def learned(material: Material) -> list[Chart]:
    """Values of hyperparameters that `HyperGradient` moved inside the best trials, by name."""
    found: dict[str, list[Series]] = {}
    for record in material.ranked()[:_SHOWN]:
        for name, (steps, values) in _trajectories(record).items():
            found.setdefault(name, []).append(Series(f"trial {record.number}", steps, values))
    if not found:
        raise NothingToDrawError(
            "No complete trial has learned a hyperparameter: put HyperGradient() into its callbacks."
        )
    return [
        Chart(
            f"{name}, learned inside the best {len(series)} trials", "optimizer step", name, series, _positive(series)
        )
        for name, series in sorted(found.items())
    ]


def _trajectories(record: TrialRecord) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values by hyperparameter, from the trial's event files; nothing where its folder is gone."""
    if not record.folder.is_dir():
        return {}
    events = EventAccumulator(str(record.folder), size_guidance={"scalars": 500})
    events.Reload()
    found = {}
    for tag in events.Tags().get("scalars", []):
        if tag.startswith("hypergradient/") and tag.endswith("/value"):
            points = events.Scalars(tag)
            found[tag.removeprefix("hypergradient/").removesuffix("/value")] = (
                [point.step for point in points],
                [point.value for point in points],
            )
    return found


def _told(record: TrialRecord) -> str:
    params = "<br>".join(f"{name} = {value}" for name, value in record.params.items())
    return f"trial {record.number}, {record.state}<br>{params}"


def _spans_decades(values: Sequence[float]) -> bool:
    return len(values) > 1 and min(values) > 0.0 and max(values) > 30.0 * min(values)


def _positive(series: Sequence[Series]) -> bool:
    return all(y > 0.0 for s in series for y in s.y)
