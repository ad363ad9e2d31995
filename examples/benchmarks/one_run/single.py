"""Single runs that choose their own learning rate. Weight decay is the default of the task's optimizer."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from .harness import Result, batches, finish, own_optimizer, scheduled, train, trained
from .modules import Module
from .tasks import Task


def lr_find(task: Task, seed: int, start: float) -> Result:
    """Lightning's range test as it is by default, 100 steps, then a run at what it suggests."""
    began, Module.spent = time.perf_counter(), 0.0
    lr, weight_decay = task.default
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=task.steps,
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,  # it saves the weights and takes them back
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = task.module(seed, lr, weight_decay)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            found = Tuner(trainer).lr_find(module, task.train_loader(seed), update_attr=False)
    suggested = found.suggestion() if found is not None else None
    module = task.module(seed, suggested or lr, weight_decay)
    optimizer = own_optimizer(module)
    decay = scheduled(optimizer, task)
    return trained("lr_find", task, seed, start, module, optimizer, decay, began=began, lr=suggested)


def prodigy(task: Task, seed: int, start: float) -> Result:
    from prodigyopt import Prodigy

    Module.spent = 0.0
    lr, weight_decay = task.default
    module = task.module(seed, lr, weight_decay)
    optimizer = Prodigy(module.parameters(), lr=1.0, weight_decay=weight_decay)
    return trained("prodigy", task, seed, start, module, optimizer, scheduled(optimizer, task))


def d_adaptation(task: Task, seed: int, start: float) -> Result:
    from dadaptation import DAdaptAdam

    Module.spent = 0.0
    lr, weight_decay = task.default
    module = task.module(seed, lr, weight_decay)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = DAdaptAdam(module.parameters(), lr=1.0, weight_decay=weight_decay, decouple=True)
    return trained("d-adaptation", task, seed, start, module, optimizer, scheduled(optimizer, task))


def schedule_free(task: Task, seed: int, start: float) -> Result:
    """Its own lr, 0.0025, a warm-up of 5% as its documentation advises, and no schedule, not even the task's."""
    from schedulefree import AdamWScheduleFree

    began, Module.spent = time.perf_counter(), 0.0
    lr, weight_decay = task.default
    module = task.module(seed, lr, weight_decay)
    optimizer = AdamWScheduleFree(module.parameters(), weight_decay=weight_decay, warmup_steps=task.steps // 20)
    optimizer.train()
    train(module, task, seed, optimizer, None, lambda _: None)
    optimizer.eval()
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        # The running statistics are those of other weights than the averaged ones: 50 batches make them anew.
        with torch.no_grad():
            for batch in itertools.islice(batches(task, seed), 50):
                module.training_step(batch, 0)
    return finish("schedule-free", task, seed, start, module, began)


def baydin(task: Task, seed: int, start: float) -> Result:
    """Hypergradient descent (Baydin et al. 2018), with the betas of its paper; a task's own schedule multiplies it.

    lr_t = lr_{t-1} + beta · g_t·u_{t-1}, where the optimizer's last step was -lr·u: algorithms 5 and 6 there.
    """
    Module.spent = 0.0
    module = task.module(seed, start, task.default[1])
    optimizer = own_optimizer(module)
    beta = 1e-7 if task.optimizer == "AdamW" else 1e-3
    factor = task.schedule(task.steps) if task.schedule else lambda _: 1.0
    lr, step = start, 0

    def adapt(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal lr, step
        group = optimizer.param_groups[0]
        if step:
            # This step's gradients meet the last step's direction, which is what the state still holds.
            lr += beta * sum(torch.sum(p.grad * _direction(optimizer.state[p], group)).item() for p in group["params"])
        group["lr"] = max(lr * factor(step), 0.0)  # torch's rules take no negative lr
        step += 1

    optimizer.register_step_pre_hook(adapt)
    result = trained("baydin", task, seed, start, module, optimizer, None, beta=beta)
    result.settings["learned"] = lr
    return result


def _direction(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if "momentum_buffer" in state:
        return state["momentum_buffer"]
    t, (beta1, beta2) = state["step"].item(), group["betas"]
    scale = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
    return state["exp_avg"] / (1 - beta1**t) / scale
