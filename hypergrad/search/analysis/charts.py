"""What is drawn by ourselves: values by trial, learning curves, and what was learned inside the trials."""

from __future__ import annotations

import html
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
    last = max(r.number for r in material.records)
    best = list(itertools.accumulate(values, min if direction == "minimize" else max))
    series = [
        Series("trial", numbers, values, "markers", [_told(r) for r, _ in pairs], color=0),
        Series("best so far", [*numbers, last], [*best, best[-1]], "steps", color=1),
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
        told, ends = [_told(r) for r, _ in ended], [value for _, value in ended]
        series.append(Series("pruned, last value", [r.number for r, _ in ended], ends, "markers", told, True, color=9))
    judged = [*values, *(value for _, value in ended)]
    failed = [r for r in material.records if r.state == "failed"]
    if failed:
        low, high = min(judged), max(judged)  # below everything, on either scale
        bottom = low / 1.5 if _spans_decades(judged) else low - 0.08 * (high - low or abs(low) or 1.0)
        at, told = [r.number for r in failed], [_told(r) for r in failed]
        series.append(Series("failed, without a value", at, [bottom] * len(failed), "crosses", told, color=1))
    return Chart(f"{name} by trial", "trial", name, series, _spans_decades(judged))


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
    found = {}
    for folder in (record.folder, *sorted(record.folder.glob("fold-*"))):
        if not any(folder.glob("events.out.tfevents.*")):
            continue
        events = EventAccumulator(str(folder), size_guidance={"scalars": 500})
        events.Reload()
        fold = "" if folder == record.folder else f" in {folder.name}"
        for tag in events.Tags().get("scalars", []):
            if tag.startswith("hypergradient/") and tag.endswith("/value"):
                # A trial that was continued writes some steps again: the last word counts.
                by_time = sorted(events.Scalars(tag), key=lambda point: point.wall_time)
                points = {point.step: point.value for point in by_time if math.isfinite(point.value)}
                name = tag.removeprefix("hypergradient/").removesuffix("/value")
                found[f"{name}{fold}"] = sorted(points), [points[step] for step in sorted(points)]
    return {name: points for name, points in found.items() if points[0]}


def _told(record: TrialRecord) -> str:
    params = "<br>".join(html.escape(f"{name} = {value}") for name, value in record.params.items())
    why = f"<br>{html.escape(record.reason[:100])}" if record.reason else ""
    return f"trial {record.number}, {record.state}{why}<br>{params}"


def _spans_decades(values: Sequence[float]) -> bool:
    return len(values) > 1 and min(values) > 0.0 and max(values) > 30.0 * min(values)


def _positive(series: Sequence[Series]) -> bool:
    """Whether a logarithmic axis shows them: a weight decay starts from 0 where the optimizer has none."""
    values = [y for s in series for y in s.y if y is not None]
    return bool(values) and min(values) >= 0.0 and sum(y > 0.0 for y in values) > len(values) / 2
