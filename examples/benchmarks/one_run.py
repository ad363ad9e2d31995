"""One run against fifty: a single training with the callback, from any start, and what else a user could do.

    .venv/bin/python examples/benchmarks/one_run.py --quick             # under 3 minutes
    .venv/bin/python examples/benchmarks/one_run.py --shard 0/4         # a quarter; what is in --out is not run again
    .venv/bin/python examples/benchmarks/one_run.py --report --plot one_run.png

Every result is a line of JSON in `--out`. Losses are those of test data that nothing saw, and the report gives them
relative to *rs50*, the best by hold-out loss of 50 random settings of lr and weight decay, each a full run with a
cosine decay (or the task's own schedule). Cost is counted in gradients, in those of one plain training. *Readout*: not
the last weights but the best of 20 checkpoints, raw or averaged over a tenth of the run, by hold-out loss.
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
from one_run.competitors import METHODS, Method, ours_from
from one_run.harness import Result
from one_run.tasks import TASKS, Task

Job = tuple[Task, int, Method, float]
QUICK = ("digits-mlp-adamw", "label-noise", "irrelevant-features")


def key(task: str, steps: int, method: str, seed: int, start: float) -> str:
    return f"{task} {steps} {method} {seed} {start:g}"


def load(path: Path) -> list[Result]:
    """Results so far. A last line that a kill cut short is left out, and so run again."""
    results = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            results.append(Result(**json.loads(line)))
        except ValueError:
            continue
    return results


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """By seed, then by task: a file that is not complete yet has all tasks of the first seeds."""
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for method in METHODS:
            if method.name not in arguments.methods:
                continue
            if method.name == "ours" and arguments.callback:
                module, _, function = arguments.callback.partition(":")
                make = getattr(importlib.import_module(module), function)
                label = arguments.label or arguments.callback
                method = Method(label, ours_from(label, make), method.starts)
            for task in TASKS:
                if task.name not in arguments.tasks:
                    continue
                task = dataclasses.replace(task, steps=arguments.steps) if arguments.steps else task
                starts = method.starts if method.name == "random" else arguments.starts
                if len(method.starts) == 1:
                    starts = method.starts
                for start in [*starts][: arguments.trials] if method.name == "random" else starts:
                    yield task, seed, method, start


def run(arguments: argparse.Namespace) -> None:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = {key(r.task, r.steps, r.method, r.seed, r.start) for r in load(arguments.out)}
    part, parts = (int(n) for n in arguments.shard.split("/"))
    for i, (task, seed, method, start) in enumerate(jobs(arguments)):
        if i % parts != part or key(task.name, task.steps, method.name, seed, start) in done:
            continue
        result = method.run(task, seed, start)
        with arguments.out.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
        if arguments.verbose:
            print(f"{task.name:20} seed {seed} {method.name} from {start:g}: test {result.test:.4f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/one_run.jsonl"), help="file of results")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only every N-th run, from the I-th")
    parser.add_argument("--tasks", nargs="+", help="names, or 'development' or 'confirmation'")
    parser.add_argument("--methods", nargs="+", choices=[m.name for m in METHODS])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--starts", type=float, nargs="+", default=[1e-6, 1e-4, 1e-2, 1.0, 10.0], help="initial lr")
    parser.add_argument("--steps", type=int, help="steps of a run (default: by task)")
    parser.add_argument("--trials", type=int, default=50, help="of the random search")
    parser.add_argument("--callback", metavar="MODULE:FUNCTION", help="makes the callback of 'ours' from task and seed")
    parser.add_argument("--label", help="name of the results of --callback")
    parser.add_argument("--quick", action="store_true", help="three tasks, short runs, few trials, one seed")
    parser.add_argument("--report", action="store_true", help="print the tables and run nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw test loss against cost and run nothing")
    parser.add_argument("--verbose", action="store_true", help="a line for each run")
    arguments = parser.parse_args()
    kinds = {"development": False, "confirmation": True}
    names = [t.name for t in TASKS]
    asked = arguments.tasks or names
    arguments.tasks = {n for n in asked if n not in kinds} | {
        t.name for t in TASKS for kind in asked if kinds.get(kind) is t.is_confirmation
    }
    if unknown := arguments.tasks - set(names):
        parser.error(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    arguments.methods = arguments.methods or [m.name for m in METHODS]
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)  # models this small gain nothing from two, and shards would wait for each other
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`|log_every_n_steps).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run(arguments)


if __name__ == "__main__":
    main()
