"""One run against fifty: a single training with the callback, from any start, and what else a user could do.

    .venv/bin/python examples/benchmarks/one_run.py --quick             # under 3 minutes
    .venv/bin/python examples/benchmarks/one_run.py --shard 0/4         # a quarter; what is in --out is not run again
    .venv/bin/python examples/benchmarks/one_run.py --report --plot one_run.png

Every result is a line of JSON in `--out`. Losses are those of test data that nothing saw, and the report gives them
relative to *rs50*, the best by hold-out loss of 50 random settings of lr and weight decay, each a full run with a
cosine decay (or the task's own schedule). Cost is counted in gradients, in those of one plain training. *Readout*: not
the last weights but the best of 20 checkpoints, raw or averaged over a tenth of the run, by hold-out loss. *Again*: the
setting that rs50 chose, trained anew from other initial weights, for the best of fifty runs is lucky, too.
Half of the tasks are for confirmation only: see `one_run/tasks.py`. To try a candidate, write a function of task and
seed that returns a callback: `--methods ours --callback module:function --label my-candidate`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from one_run.competitors import METHODS, Method, NotYetError, again_from, ours_from
from one_run.harness import Result
from one_run.ranges import REPEATS, STARTS, TRIALS
from one_run.report import Report, plot, size_of_search
from one_run.tasks import TASKS, Task

Job = tuple[Task, int, Method, float]
AGAIN = "again"
QUICK = ("digits-mlp-adamw", "label-noise", "irrelevant-features")


def key(task: str, steps: int, method: str, seed: int, start: float) -> str:
    return f"{task} {steps} {method} {seed} {start:g}"


def identity(result: Result) -> str:
    return key(result.task, result.steps, result.method, result.seed, result.start)


def load(path: Path) -> list[Result]:
    """Results so far. A last line that a kill cut short is left out, and so run again."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = Result(**json.loads(line))
        except ValueError:
            continue
        results[identity(result)] = result  # what two processes ran at once counts once
    return list(results.values())


def everything(arguments: argparse.Namespace) -> list[Result]:
    """What is in `--out` and in the files of `--also`."""
    return [r for path in (arguments.out, *arguments.also) for r in load(path)]


def methods(arguments: argparse.Namespace) -> list[Method]:
    """Those asked for; prints a line for each that is not installed."""
    found = []
    for method in METHODS:
        if method.name not in arguments.methods:
            continue
        if not method.is_installed:
            print(f"{method.name}: not installed, `pip install {method.package}`")
        elif method.name == "ours" and arguments.callback:
            module, _, function = arguments.callback.partition(":")
            make = getattr(importlib.import_module(module), function)
            label = arguments.label or arguments.callback
            found.append(Method(label, ours_from(label, make), method.starts))
        else:
            found.append(method)
    if AGAIN in arguments.methods:
        run = again_from(lambda: everything(arguments), size_of_search(arguments.trials))
        found.append(Method(AGAIN, run, "repeats"))
    return found


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """By seed, then by method: a file that is not complete yet has all tasks of the first seeds."""
    starts = {"once": [0.0], "lr": arguments.starts, "trials": range(arguments.trials)}
    starts["repeats"] = range(1, REPEATS + 1)
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for method in methods(arguments):
            for task in TASKS:
                if task.name in arguments.tasks:
                    task = dataclasses.replace(task, steps=arguments.steps or task.steps)
                    for start in starts[method.starts]:
                        yield task, seed, method, start


def run(arguments: argparse.Namespace) -> None:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.exists() and arguments.out.read_text()[-1:] not in ("", "\n"):
        arguments.out.write_text(arguments.out.read_text() + "\n")  # after a line that a kill cut short
    done = {identity(result) for result in load(arguments.out)}
    part, parts = (int(n) for n in arguments.shard.split("/"))
    for i, (task, seed, method, start) in enumerate(jobs(arguments)):
        if i % parts != part or key(task.name, task.steps, method.name, seed, start) in done:
            continue
        try:
            result = method.run(task, seed, start)
        except NotYetError as reason:
            print(f"{method.name}: {reason}; run it again later")
            continue
        with arguments.out.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
        if arguments.verbose:
            print(f"{task.name:20} seed {seed} {method.name} from {start:g}: test {result.test:.4f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of results (default: runs/one_run.jsonl)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only every N-th run, from the I-th")
    parser.add_argument("--tasks", nargs="+", help="names, or 'development' or 'confirmation'")
    parser.add_argument("--methods", nargs="+", choices=[*(m.name for m in METHODS), AGAIN])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--starts", type=float, nargs="+", default=list(STARTS), help="initial lr")
    parser.add_argument("--steps", type=int, help="steps of a run (default: by task)")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of the random search")
    parser.add_argument("--callback", metavar="MODULE:FUNCTION", help="makes the callback of 'ours' from task and seed")
    parser.add_argument("--label", help="name of the results of --callback")
    parser.add_argument("--quick", action="store_true", help="three tasks, short runs, few trials, one seed")
    parser.add_argument("--report", action="store_true", help="print the tables and run nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw test loss against cost and run nothing")
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], metavar="FILE", help="more results to report and build on"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each run")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tasks, arguments.steps, arguments.seeds, arguments.starts = QUICK, 300, 1, [1e-4, 1.0]
        arguments.methods = [m.name for m in METHODS if m.name != "tpe-asha"]
    arguments.out = arguments.out or Path("runs/one_run_quick.jsonl" if arguments.quick else "runs/one_run.jsonl")
    kinds = {"development": False, "confirmation": True}
    names = [t.name for t in TASKS]
    asked = arguments.tasks or names
    arguments.tasks = {n for n in asked if n not in kinds} | {
        t.name for t in TASKS for kind in asked if kinds.get(kind) is t.is_confirmation
    }
    if unknown := arguments.tasks - set(names):
        parser.error(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    arguments.methods = arguments.methods or [*(m.name for m in METHODS), AGAIN]
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)  # models this small gain nothing from two, and shards would wait for each other
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`|log_every_n_steps).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not (arguments.report or arguments.plot):
        run(arguments)
    steps = {t.name: arguments.steps or t.steps for t in TASKS if t.name in arguments.tasks}
    results = [r for r in everything(arguments) if r.steps == steps.get(r.task)]
    if arguments.report or arguments.quick:
        print(Report(results, arguments.trials))
    if arguments.plot:
        plot(Report(results, arguments.trials), arguments.plot)


if __name__ == "__main__":
    main()
