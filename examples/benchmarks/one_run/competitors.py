"""What one run is measured against; each method is a function of task, seed and start, and an entry in `METHODS`.

All train with the task's own optimizer, batches and initial weights, from the two sets that everyone gets.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning as L
import torch

from .harness import Readout, Result, evaluate, finish, number, optimizers, readout_cost, train
from .modules import Module
from .tasks import Task

TRIALS = 50
STARTS = (1e-6, 1e-4, 1e-2, 1.0, 10.0)
LR = (1e-5, 1.0)
# Coupled decay acts on the gradient and is wanted at smaller values. Both ranges hold the good values of every task.
WEIGHT_DECAY = {"AdamW": (1e-4, 10.0), "SGD": (1e-6, 1e-1)}


def between(low: float, high: float, u: float) -> float:
    """The point at the fraction `u` of the way, in logarithms."""
    return low * math.exp(math.log(high / low) * u)


def draw(task: Task, seed: int, trial: int) -> tuple[float, float]:
    """lr and weight decay of a trial of the random search: by seed the same for every task."""
    u, v = torch.rand(TRIALS, 2, generator=torch.Generator().manual_seed(1000 + seed))[trial].tolist()
    return between(*LR, u), between(*WEIGHT_DECAY[task.optimizer], v)


def trained(
    method: str, task: Task, seed: int, start: float, lr: float, weight_decay: float, *, decay: bool = True
) -> Result:
    """One plain training, and what a readout makes of the same run."""
    began, Module.spent = time.perf_counter(), 0.0
    module = task.module(seed, lr, weight_decay)
    _, hold, test = task.sets(seed)
    readout = Readout(module, hold, task.steps)
    made = train(module, task, seed, *optimizers(module, task.steps, decay), readout.after_step)
    # The run itself knows nothing of its readout, whose losses were counted with it.
    settings = {"lr": lr, "weight_decay": weight_decay, "made": made, "readout": readout.choice}
    result = finish(method, task, seed, start, module, began, **settings)
    readout.load(readout.best)
    return dataclasses.replace(
        result,
        test=result.test if made == task.steps else math.inf,
        hold=result.hold if made == task.steps else math.inf,
        cost=made / task.steps,
        readout_cost=round(readout_cost(task, seed), 4),
        readout_hold=number(readout.best_loss),
        readout_test=evaluate(module, test),
    )


def random(task: Task, seed: int, start: float) -> Result:
    """Trial number `start` of the random search; the report takes the best of the first 8, 16 and 50."""
    return trained("random", task, seed, start, *draw(task, seed, int(start)))


def default(task: Task, seed: int, start: float) -> Result:
    return trained("default", task, seed, start, *task.default)


def plain(task: Task, seed: int, start: float) -> Result:
    """What the user's module does by itself at this lr."""
    return trained("plain", task, seed, start, start, task.default[1], decay=False)


def ours_from(method: str, make_callback: Callable[[Task], L.Callback]) -> Callable[[Task, int, float], Result]:
    """A method that fits in a real Trainer with one callback more."""

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
        settings = {"reported": 1 + getattr(callback, "gradients", 0) / task.steps}
        values = getattr(callback, "hyperparameters", {})
        return finish(method, task, seed, start, module, began, **settings, learned=dict(values))

    return run


def make_callback(task: Task, seed: int) -> L.Callback:
    """`HyperGradient()` as it is by default. A candidate is another such function: `--callback module:function`."""
    from hypergrad.callbacks import HyperGradient

    return HyperGradient(val_dataloaders=task.hold_loader(seed))


@dataclass(frozen=True)
class Method:
    """An entry of the list. `starts`: the initial lr it is run from; the number of the trial for the random search."""

    name: str
    run: Callable[[Task, int, float], Result]
    starts: Sequence[float] = (0.0,)


METHODS = [
    Method("random", random, range(TRIALS)),
    Method("default", default),
    Method("ours", ours_from("ours", make_callback), STARTS),
    Method("plain", plain, STARTS),
]
