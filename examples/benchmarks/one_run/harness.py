"""One training in plain torch, the readout, and what is recorded of a run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .modules import FORWARD, Batch, Module
from .tasks import Rows, Task

CHECKPOINTS = 20
AfterStep = Callable[[int], None]


@dataclass(frozen=True)
class Result:
    """One run of one method. A run whose loss was no number when it ended has infinite losses.

    Args:
        cost: gradients spent, in those of one plain training.
        readout_hold, readout_test: losses of the best of `CHECKPOINTS` × {raw, averaged} weights on the hold-out set.
        readout_cost: what the readout adds to `cost`.
    """

    task: str
    method: str
    seed: int
    start: float
    test: float
    hold: float
    cost: float
    seconds: float
    steps: int
    readout_test: float | None = None
    readout_hold: float | None = None
    readout_cost: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)


def number(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def evaluate(module: Module, rows: Rows) -> float:
    """Mean loss in eval mode, in chunks of the batch size: a contrastive loss depends on it."""
    was_training = module.training
    module.eval()
    size, total = module.batch_size, 0.0
    with torch.no_grad():
        for first in range(0, len(rows), size):
            batch = tuple(t[first : first + size] for t in rows.tensors)
            total += module.loss(batch).item() * len(batch[0])
    module.train(was_training)
    return number(total / len(rows))


def batches(task: Task, seed: int) -> Iterator[Batch]:
    """Training batches without end, in the order in which a Trainer gets them."""
    loader = task.train_loader(seed)
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from loader
        epoch += 1


class Readout:
    """Keeps the best of some checkpoints, raw and averaged, by the hold-out loss.

    The average is exponential with a window of a tenth of the run, and over a shorter run so far the plain mean.
    Running statistics of BatchNorm are averaged with the same weights as the parameters, and go with them.
    """

    def __init__(self, module: Module, hold: Rows, steps: int) -> None:
        self.module, self.hold, self.steps = module, hold, steps
        self.live = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        self.average = [t.detach().clone() for t in self.live]
        self.best_loss, self.best = math.inf, self._copy(self.live)
        self.choice = "initial"

    @staticmethod
    def _copy(tensors: list[Tensor]) -> list[Tensor]:
        return [t.detach().clone() for t in tensors]

    @torch.no_grad()
    def load(self, tensors: list[Tensor]) -> None:
        for t, value in zip(self.live, tensors, strict=True):
            t.copy_(value)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        weight = max(10 / self.steps, 1 / step)
        for average, t in zip(self.average, self.live, strict=True):
            average.lerp_(t, weight)
        if step * CHECKPOINTS // self.steps > (step - 1) * CHECKPOINTS // self.steps:
            raw = self._copy(self.live)
            self._consider(f"raw at {step}")
            self.load(self.average)
            self._consider(f"averaged at {step}")
            self.load(raw)

    def _consider(self, choice: str) -> None:
        loss = evaluate(self.module, self.hold)
        if loss < self.best_loss:
            self.best_loss, self.best, self.choice = loss, self._copy(self.live), choice


def cosine(steps: int) -> Callable[[int], float]:
    return lambda t: 0.5 + 0.5 * math.cos(math.pi * min(t / steps, 1.0))


def scheduled(optimizer: torch.optim.Optimizer, task: Task) -> LambdaLR:
    """The task's own schedule; where it has none, a cosine to 0."""
    return LambdaLR(optimizer, (task.schedule or cosine)(task.steps))


def own_optimizer(module: Module) -> torch.optim.Optimizer:
    """The optimizer that the module's user wrote, without the schedule, if there is one."""
    configured = module.configure_optimizers()
    return configured["optimizer"] if isinstance(configured, dict) else configured


def train(
    module: Module,
    task: Task,
    seed: int,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR | None,
    after_step: AfterStep,
) -> int:
    """Train for `task.steps` steps, or until the loss is no number; returns the number of steps made."""
    module.train()
    for step, batch in zip(range(1, task.steps + 1), batches(task, seed), strict=False):
        optimizer.zero_grad()
        loss = module.training_step(batch, step - 1)
        if not math.isfinite(loss.item()):
            return step - 1
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        after_step(step)
    return task.steps


def finish(method: str, task: Task, seed: int, start: float, module: Module, began: float, **settings: Any) -> Result:
    """The result of a run that has just ended; its cost is what was counted since `Module.spent` was set to 0."""
    _, hold, test = task.sets(seed)
    cost, seconds = Module.spent / task.steps, time.perf_counter() - began
    return Result(
        task=task.name,
        method=method,
        seed=seed,
        start=start,
        test=evaluate(module, test),
        hold=evaluate(module, hold),
        cost=round(cost, 4),
        seconds=round(seconds, 3),
        steps=task.steps,
        settings=settings,
    )


def trained(
    method: str,
    task: Task,
    seed: int,
    start: float,
    module: Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR | None,
    began: float | None = None,
    **settings: Any,
) -> Result:
    """One plain training, and what a readout makes of the same run.

    The run itself knows nothing of its readout: the losses that the readout asks for are in `readout_cost`, not in
    `cost`, but the seconds are those of both. What was spent before counts: set `Module.spent` to 0 at the beginning.
    """
    began, before = began or time.perf_counter(), Module.spent
    _, hold, test = task.sets(seed)
    readout = Readout(module, hold, task.steps)
    made = train(module, task, seed, optimizer, scheduler, readout.after_step)
    settings |= {"made": made, "readout": readout.choice}
    result = finish(method, task, seed, start, module, began, **settings)
    ended = {} if made == task.steps else {"test": math.inf, "hold": math.inf}
    readout.load(readout.best)
    return dataclasses.replace(
        result,
        **ended,
        cost=round((before + made) / task.steps, 4),
        readout_cost=round(CHECKPOINTS * 2 * FORWARD * len(hold) / task.batch_size / task.steps, 4),
        readout_hold=number(readout.best_loss),
        readout_test=evaluate(module, test),
    )
