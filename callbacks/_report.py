"""What a run found out, in plain language."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypergrad import Best, has_learned
from hypergrad.callbacks._history import Update

_LEAST = 5  # fewer numbers say nothing


@dataclass(frozen=True)
class Facts:
    """All that a report is made of; see `HyperGradient`.

    Args:
        first, last: values at the start and now, by label.
        race: see `HyperGradient.race`.
        readings: step, objective of the weights as they stood, and of their average, of each checkpoint.
        predicted: by checkpoint, the change of the validation loss since the last one, as hypergradients foretold it.
        monitored: step and monitored value of each validation of the Trainer that is not the hyper-validation data.
        steps: optimizer steps made.
        sign: -1 where a larger validation value is the better one.
    """

    first: Mapping[str, float]
    last: Mapping[str, float]
    history: Sequence[Update]
    race: Mapping[str, Any] | None
    readings: Sequence[tuple[int, float, float]]
    predicted: Sequence[float]
    monitored: Sequence[tuple[int, float]]
    ended_with: Best | None
    rewound: Sequence[tuple[int, int]]
    cost: float
    steps: int
    sign: float = 1.0


def report(facts: Facts) -> str:
    """Several lines: what was learned, how sure that is, what was done to the weights, and what to make of it."""
    parts = (_race(facts), _learned(facts), _agreement(facts), _weights(facts), _drift(facts))
    lines = ["HyperGradient", *(f"  {line}" for part in parts for line in part)]
    lines.append(f"  cost: {facts.cost:.2f} times that of plain training, in gradients")
    verdict = list(_verdict(facts))
    return "\n".join([*lines, *(f"  => {line}" for line in verdict)])


def summary(
    first: Mapping[str, float],
    last: Mapping[str, float],
    schedule: Mapping[str, tuple[float, float]],
    costs: str,
    history: Sequence[Update],
) -> str:
    """One line.

    Args:
        first, last: values at the start and now, by label.
        schedule: the last scheduled value and what was used in its place, by label.
        costs: what the run has cost, in words.
    """
    parts = []
    for label, value in last.items():
        begun, (scheduled, used) = first.get(label, value), schedule.get(label, (0.0, 0.0))
        parts.append(f"{label} {begun:.3g} -> {value:.3g}")
        if scheduled not in (0.0, begun):  # a schedule that ends at 0 would hide what was learned
            parts[-1] += f" ({used / scheduled:.3g} times the schedule)"
    skipped = sum(u.skipped is not None for u in history)
    tail = f"; {skipped} updates skipped, see history" if skipped else ""
    return f"HyperGradient: {', '.join(parts)}; {costs}{tail}"


def sureness(updates: Sequence[Update], label: str) -> tuple[float, float] | None:
    """(signal to noise of the last reading, share of readings whose sign is that of the one before)."""
    signs = [math.copysign(1.0, u.hypergradients[label]) for u in updates if u.hypergradients.get(label)]
    if len(signs) < _LEAST:
        return None
    snr = next((u.signal_to_noise[label] for u in reversed(updates) if label in u.signal_to_noise), 0.0)
    return snr, sum(a == b for a, b in pairwise(signs)) / (len(signs) - 1)


def correlation(predicted: Sequence[float], realised: Sequence[float]) -> float | None:
    """Pearson's, of as many pairs as there are; None where they are too few or all alike."""
    pairs = [(p, r) for p, r in zip(predicted, realised, strict=False) if math.isfinite(p) and math.isfinite(r)]
    if len(pairs) < _LEAST or len({p for p, _ in pairs}) < 2 or len({r for _, r in pairs}) < 2:
        return None
    return statistics.correlation(*zip(*pairs, strict=True))


def _race(facts: Facts) -> Iterable[str]:
    if facts.race is None:
        return
    yield f"lr {facts.race['lr']:.3g} won the race; validation losses of its rungs:"
    for rung in facts.race["scores"]:
        yield "    " + ", ".join(f"{lr:.3g}: {_score(score)}" for lr, score in sorted(rung.items()))
    placed = facts.race.get("weight_decay", [])  # a checkpoint from before there was a timescale has none
    if placed:
        span = f"{min(placed):.3g}" if min(placed) == max(placed) else f"{min(placed):.3g} to {max(placed):.3g}"
        yield f"weight decay then started at {span}, by the timescale"


def _score(score: float) -> str:
    return f"{score:.4g}" if math.isfinite(score) else "blew up"


def _learned(facts: Facts) -> Iterable[str]:
    for label, value in facts.last.items():
        line = f"{label}: {facts.first.get(label, value):.3g} -> {value:.3g}"
        sure = sureness(facts.history, label)
        if sure is not None:
            line += f" (signal to noise {sure[0]:.2f}; {sure[1]:.0%} of hypergradients agree in sign with the last one)"
        yield line


def _agreement(facts: Facts) -> Iterable[str]:
    realised = [b[1] - a[1] for a, b in pairwise(facts.readings)]
    found = correlation(facts.predicted[1:], realised)
    if found is not None:
        yield f"changes of the validation loss, foretold by hypergradients and realised: correlation {found:.2f}"


def _weights(facts: Facts) -> Iterable[str]:
    for start, end in facts.rewound:
        yield f"at step {start} the run went back to the weights of step {end}, with smaller learning rates"
    best = facts.ended_with
    if best is not None and best.kind:
        line = f"the module holds the {best.kind} weights of step {best.step} (score {best.score:.4g})"
        if facts.readings:
            line += f"; those of the last step have {facts.readings[-1][1]:.4g}"
        yield line


def _has_gained(facts: Facts) -> bool:
    """Whether the validation loss fell over the updates; True while there are few of them."""
    losses = [facts.sign * u.val_loss for u in facts.history if math.isfinite(u.val_loss)]
    third = len(losses) // 3
    return third < _LEAST or statistics.mean(losses[-third:]) < statistics.mean(losses[:third])


def _drift(facts: Facts) -> Iterable[str]:
    """Meta-overfitting: what was tuned on becomes better than what was not."""
    scores = {step: raw for step, raw, _ in facts.readings} or {u.step: u.val_loss for u in facts.history}
    gaps = [value - min(scores.items(), key=lambda s: abs(s[0] - step))[1] for step, value in facts.monitored if scores]
    gaps = [gap for gap in gaps if math.isfinite(gap)]
    if len(gaps) < _LEAST:
        return
    third = max(len(gaps) // 3, 1)
    begin, end = statistics.mean(gaps[:third]), statistics.mean(gaps[-third:])
    yield f"monitored value minus that of the hyper-validation data: {begin:.3g} at first, {end:.3g} in the end"


def _verdict(facts: Facts) -> Iterable[str]:
    untrained = math.nan
    if facts.race is not None:
        rungs = facts.race["scores"]
        untrained = rungs[0][min(rungs[0])] if rungs else math.nan  # hardly anything moves there
        rates = {rate for rung in rungs for rate in rung}  # with the forks, and with those that blew up
        if rates and not min(rates) < facts.race["lr"] < max(rates):
            yield "the best learning rate is at the edge of those that raced: give Race(rates=...) a wider range"
    best = facts.ended_with
    if facts.readings and not has_learned(facts.readings[-1][1], untrained):
        yield (
            "in the end the network was no better than an untrained one: its learning rate was too high, or learning "
            "begins later than the race looks; give Race(rates=...) lower rates, or the run more steps"
        )
    elif best is not None and best.kind and facts.steps and best.step <= facts.steps // 2:
        yield (
            f"the best weights came at {best.step} of {facts.steps} steps: the run overfits, and a shorter one or more "
            "regularisation would do"
        )
    if not facts.readings and not _has_gained(facts):
        yield (
            "in the end the validation loss was no better than at first: a run of at least some 400 steps also races "
            "learning rates and goes back when it goes wrong; or learn less, or start from a lower learning rate"
        )
    for label in facts.last:
        sure = sureness(facts.history, label)
        if sure is not None and label.partition("/")[0] != "lr" and sure[0] < 0.1 and sure[1] < 0.6:
            yield f"{label} hardly matters here, or its hypergradient is lost in noise"
    if facts.rewound:
        yield "the run went wrong on its way: look at the data and the schedule around those steps"
