"""Tables and plot from the results: test losses relative to rs50 of the same task and seed."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import Result, evaluate
from .tasks import TASKS

SEARCHES = (8, 16, 50)
READOUT = " + readout"
HALVES = {"confirmation": True, "development": False}


def size_of_search(trials: int) -> int:
    """Trials of the random search that others are relative to, where there are so many."""
    return max(size for size in SEARCHES if size <= trials)


@dataclass(frozen=True)
class Score:
    """A method's outcome from one start, and what it cost in plain trainings. Losses are those on the test set."""

    task: str
    seed: int
    method: str
    start: float
    loss: float
    cost: float


def scores(results: Iterable[Result]) -> list[Score]:
    """One per run, a second one where the run was read out; the trials of a random search become its sizes."""
    found, trials = [], defaultdict(list)
    for r in results:
        if r.method == "random":
            trials[r.task, r.seed].append(r)
            continue
        found.append(Score(r.task, r.seed, r.method, r.start, r.test, r.cost))
        if r.readout_test is not None:
            cost = r.cost + r.readout_cost
            found.append(Score(r.task, r.seed, f"{r.method}{READOUT}", r.start, r.readout_test, cost))
    for (task, seed), runs in trials.items():
        first = sorted(runs, key=lambda r: r.start)
        for size in (s for s in SEARCHES if s <= len(runs)):
            found += _search(task, seed, first[:size])
    return found


def _search(task: str, seed: int, runs: list[Result]) -> list[Score]:
    name, cost = f"rs{len(runs)}", sum(r.cost for r in runs)
    chosen = min(runs, key=lambda r: r.hold)
    read = min(runs, key=lambda r: r.readout_hold)
    more = sum(r.readout_cost for r in runs)
    return [
        Score(task, seed, name, 0.0, chosen.test, cost),
        Score(task, seed, f"{name}{READOUT}", 0.0, read.readout_test, cost + more),
    ]


@dataclass(frozen=True)
class Row:
    """A method over the tasks of one half."""

    method: str
    cost: float
    mean: float
    worst: float
    worst_task: str
    spread: float
    noise: float | None
    lost: int
    runs: int
    by_task: dict[str, float]
    by_start: dict[float, float]


class Report:
    """Ratios to the reference, means over seeds and starts first, and then over tasks.

    A run that ends worse than the untrained network, or with no number, is counted as the untrained network, which is
    kind to it; *lost* says how many those were. Of the ratios by start the worst over the best, and of those by seed
    the standard deviation of the logarithm, are medians over tasks. Where the reference is incomplete nothing is said.
    """

    def __init__(self, results: list[Result], trials: int) -> None:
        found = scores(results)
        self.name = f"rs{size_of_search(trials)}"
        reference = {(s.task, s.seed): s.loss for s in found if s.method == self.name}
        tasks = {t.name: t for t in TASKS}
        self.initial = {
            (name, seed): evaluate(tasks[name].module(seed, *tasks[name].default), tasks[name].sets(seed)[2])
            for name, seed in reference
        }
        self.reference = reference
        self.scores = [s for s in found if (s.task, s.seed) in reference]

    def loss(self, score: Score) -> float:
        return min(score.loss, self.initial[score.task, score.seed])

    def is_lost(self, score: Score) -> bool:
        return not score.loss < self.initial[score.task, score.seed]

    def rows(self, confirmation: bool) -> list[Row]:
        """One for each method, the best first."""
        names = {t.name for t in TASKS if t.is_confirmation is confirmation}
        methods: dict[str, list[Score]] = defaultdict(list)
        for score in self.scores:
            if score.task in names:
                methods[score.method].append(score)
        return sorted((self._row(name, found) for name, found in methods.items()), key=lambda row: row.mean)

    def _ratio(self, found: list[Score]) -> float:
        """Of the losses the mean over seeds and starts, as the claim is worded."""
        return statistics.mean(map(self.loss, found)) / statistics.mean(self.reference[s.task, s.seed] for s in found)

    def _row(self, method: str, found: list[Score]) -> Row:
        by_task = {task: self._ratio(group) for task, group in _grouped(found, lambda s: s.task).items()}
        spreads, noises, by_start = [], [], defaultdict(list)
        for group in _grouped(found, lambda s: s.task).values():
            logs = [math.log(self._ratio(runs)) for runs in _grouped(group, lambda s: s.seed).values()]
            noises += [statistics.stdev(logs)] if len(logs) > 1 else []
            ratios = {start: self._ratio(runs) for start, runs in _grouped(group, lambda s: s.start).items()}
            spreads.append(max(ratios.values()) / min(ratios.values()))
            for start, ratio in ratios.items():
                by_start[start].append(ratio)
        return Row(
            method=method,
            cost=statistics.mean(s.cost for s in found),
            mean=statistics.geometric_mean(by_task.values()),
            worst=max(by_task.values()),
            worst_task=max(by_task, key=lambda task: by_task[task]),
            spread=statistics.median(spreads),
            noise=statistics.median(noises) if noises else None,
            lost=sum(self.is_lost(s) for s in found),
            runs=len(found),
            by_task=by_task,
            by_start={start: statistics.geometric_mean(ratios) for start, ratios in sorted(by_start.items())},
        )

    def __str__(self) -> str:
        lines = [self._seeds()]
        for half, confirmation in HALVES.items():
            rows = self.rows(confirmation)
            if not rows:
                continue
            names = [t.name for t in TASKS if t.is_confirmation is confirmation]
            head = [
                "method",
                "cost",
                "geometric mean",
                "worst task",
                "worst/best start",
                "between seeds",
                "lost",
                *names,
            ]
            lines += [f"\n{half} tasks: test loss relative to {self.name}"]
            lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            for row in rows:
                noise = "" if row.noise is None else f"{row.noise:.2f}"
                cells = [row.method, f"{row.cost:.2f}", f"{row.mean:.3f}", f"{row.worst:.2f} {row.worst_task}"]
                cells += [f"{row.spread:.2f}", noise, f"{row.lost}/{row.runs}"]
                cells += [f"{row.by_task[name]:.2f}" if name in row.by_task else "" for name in names]
                lines.append("| " + " | ".join(cells) + " |")
            lines += ["", f"by start: geometric mean over the {half} tasks"]
            lines += [
                f"  {row.method:28}" + "".join(f"{start:>9g}: {mean:.2f}" for start, mean in row.by_start.items())
                for row in rows
                if len(row.by_start) > 1
            ]
        return "\n".join(lines)

    def _seeds(self) -> str:
        lines = [f"{self.name}: test loss by seed; of the untrained network"]
        for task in TASKS:
            seeds = sorted(seed for name, seed in self.reference if name == task.name)
            if seeds:
                values = "  ".join(f"{self.reference[task.name, seed]:.4f}" for seed in seeds)
                lines.append(f"{task.name:20} {values}; {self.initial[task.name, seeds[0]]:.2f}")
        return "\n".join(lines)


def _grouped(found: Iterable[Score], key: Callable[[Score], Any]) -> dict[Any, list[Score]]:
    groups: dict[Any, list[Score]] = defaultdict(list)
    for score in found:
        groups[key(score)].append(score)
    return groups


def plot(report: Report, path: Path) -> None:
    """Cost against the geometric mean over tasks, one panel for each half; a bar reaches up to the worst task.

    A ring is the same run with a readout. Labels stand beside their points, apart from each other.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    halves = {half: rows for half, kind in HALVES.items() if (rows := report.rows(kind))}
    figure, axes = pyplot.subplots(1, len(halves), figsize=(7 * len(halves), 7), sharey=True, squeeze=False)
    for axis, (half, rows) in zip(axes[0], halves.items(), strict=True):
        floor = {True: 0.0, False: 0.0}  # of the next label, cheap and dear
        for row in rows:  # the lowest first
            read_out = row.method.endswith(READOUT)
            colour = "tab:blue" if row.method.startswith("rs") else "tab:red" if "ours" in row.method else "tab:gray"
            axis.plot([row.cost, row.cost], [row.mean, row.worst], color=colour, alpha=0.2)
            axis.plot(row.cost, row.mean, "o", color=colour, mfc="white" if read_out else colour)
            if read_out:
                raw = next(r for r in rows if r.method == row.method.removesuffix(READOUT))
                axis.plot([raw.cost, row.cost], [raw.mean, row.mean], ":", color=colour, lw=0.8, zorder=0)
            if not read_out:
                cheap = row.cost < 4
                at = floor[cheap] = max(row.mean, floor[cheap] * 1.09)
                axis.annotate(
                    row.method,
                    (row.cost, row.mean),
                    xytext=(2.0 if cheap else 1.15 * row.cost, at),
                    fontsize=8,
                    va="center",
                    arrowprops={"arrowstyle": "-", "lw": 0.3, "color": colour},
                )
        axis.axhline(1.0, color="black", lw=0.5)
        axis.set(xscale="log", yscale="log", xlim=(0.7, 120), title=f"{half} tasks", xlabel="cost in plain trainings")
    axes[0][0].set_ylabel(f"test loss relative to {report.name}: geometric mean, up to the worst task")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
