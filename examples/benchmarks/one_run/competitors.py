"""What one run is measured against; each method is a function of task, seed and start, and an entry in `METHODS`.

All get the same batches and initial weights and the two sets that everyone gets. Those that bring no schedule of their
own have the task's, or else a cosine to 0.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import lightning as L
import torch

from . import search, single
from .harness import Result, finish, own_optimizer, scheduled, trained
from .modules import Module
from .ranges import LR, TRIALS, WEIGHT_DECAY
from .tasks import TASKS, Task

Run = Callable[[Task, int, float], Result]  # of task, seed and start


def between(low: float, high: float, u: float) -> float:
    """The point at the fraction `u` of the way, in logarithms."""
    return low * math.exp(math.log(high / low) * u)


def draw(task: Task, seed: int, trial: int) -> tuple[float, float]:
    """lr and weight decay of a trial of the random search.

    Each task has its own draws, so that one draw's luck does not count for all of them; but for seed 0, of which all
    have the same.
    """
    position = [t.name for t in TASKS].index(task.name)
    generator = torch.Generator().manual_seed(1000 + seed * (1 + position))
    u, v = torch.rand(TRIALS, 2, generator=generator)[trial].tolist()
    return between(*LR, u), between(*WEIGHT_DECAY[task.optimizer], v)


def at(
    method: str, task: Task, seed: int, start: float, lr: float, weight_decay: float, *, weights: int | None = None
) -> Result:
    """The task's optimizer at these settings; `weights` is another seed for the initial ones."""
    Module.spent = 0.0
    module = task.module(seed if weights is None else weights, lr, weight_decay)
    optimizer = own_optimizer(module)
    decay = scheduled(optimizer, task)
    return trained(method, task, seed, start, module, optimizer, decay, lr=lr, weight_decay=weight_decay)


def random(task: Task, seed: int, start: float) -> Result:
    """Trial number `start` of the random search; the report takes the best of the first 8, 16 and 50."""
    return at("random", task, seed, start, *draw(task, seed, int(start)))


class NotYetError(Exception):
    """What a method builds on has not been run."""


def again_from(results: Callable[[], list[Result]], trials: int) -> Run:
    """What the random search chose, trained once more from other initial weights: its setting, without its luck.

    Args:
        results: so far.
        trials: of the search that is meant.

    Raises:
        NotYetError: while the search is not complete.
    """

    def run(task: Task, seed: int, start: float) -> Result:
        of_search = ("random", task.name, seed, task.steps)
        found = [r for r in results() if (r.method, r.task, r.seed, r.steps) == of_search and r.start < trials]
        if len(found) < trials:
            raise NotYetError(f"{task.name} of seed {seed} has {len(found)} random trials of {trials}")
        chosen = min(found, key=lambda r: r.hold).settings
        setting = chosen["lr"], chosen["weight_decay"]
        result = at("again", task, seed, start, *setting, weights=seed + 1000 * int(start))
        return dataclasses.replace(result, cost=result.cost + sum(r.cost for r in found))

    return run


def default(task: Task, seed: int, start: float) -> Result:
    return at("default", task, seed, start, *task.default)


def plain(task: Task, seed: int, start: float) -> Result:
    """What the user's module does by itself at this lr: its own schedule, or none."""
    Module.spent = 0.0
    module = task.module(seed, start, task.default[1])
    optimizer = own_optimizer(module)
    own = scheduled(optimizer, task) if task.schedule else None
    return trained("plain", task, seed, start, module, optimizer, own)


def make_callback(task: Task, seed: int) -> L.Callback:
    """`HyperGradient()` as it is by default. A candidate is another such function: `--callback module:function`."""
    from hypergrad.callbacks import HyperGradient

    return HyperGradient(val_dataloaders=task.hold_loader(seed))


def ours_from(method: str, make_callback: Callable[[Task, int], L.Callback]) -> Run:
    """A method that fits in a real Trainer with one callback more, and takes the weights that the run ends with."""

    def run(task: Task, seed: int, start: float) -> Result:
        began, Module.spent = time.perf_counter(), 0.0
        callback = make_callback(task, seed)
        module = task.module(seed, start, task.default[1])
        trainer = L.Trainer(
            max_steps=task.steps,
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, task.train_loader(seed))
        return finish(
            method,
            task,
            seed,
            start,
            module,
            began,
            reported=1 + getattr(callback, "gradients", 0) / task.steps,
            learned=dict(getattr(callback, "hyperparameters", {})),
        )

    return run


@dataclass(frozen=True)
class Method:
    """An entry of the list.

    Args:
        name: what its results are called.
        run: one run of it.
        starts: what the third argument of `run` goes over: "once" for nothing, "lr" for the initial lr, "trials" for
            the numbers of the random search's trials, "repeats" for those of what it chose.
        package: what has to be installed for it.
    """

    name: str
    run: Run
    starts: Literal["once", "lr", "trials", "repeats"] = "once"
    package: str | None = None

    @property
    def is_installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


METHODS = [
    Method("random", random, "trials"),
    Method("default", default),
    Method("ours", ours_from("ours", make_callback), "lr"),
    Method("plain", plain, "lr"),
    Method("lr_find", single.lr_find),
    Method("prodigy", single.prodigy, package="prodigyopt"),
    Method("schedule-free", single.schedule_free, package="schedulefree"),
    Method("d-adaptation", single.d_adaptation, package="dadaptation"),
    Method("baydin", single.baydin, "lr"),
    Method("tpe-asha", search.tpe_asha, package="optuna"),
]
