"""A search that prunes: Optuna's TPE with ASHA, at the gradients of the random search."""

from __future__ import annotations

import copy
import logging
import math
import time
from typing import Any

from .harness import CHECKPOINTS, Result, evaluate, finish, own_optimizer, scheduled, train
from .modules import Module
from .ranges import LR, TRIALS, WEIGHT_DECAY
from .tasks import Task


class StoppedError(Exception):
    """The pruner's word, or the end of the budget."""


def tpe_asha(task: Task, seed: int, start: float) -> Result:
    """As many full runs' worth of gradients as the random search has trials; chosen by hold-out loss at the end.

    Reported is the hold-out loss at 20 checkpoints, of which the pruner looks at the 1st, 3rd and 9th.
    """
    import optuna

    logging.getLogger("optuna").setLevel(logging.ERROR)
    began, Module.spent = time.perf_counter(), 0.0
    budget, hold = TRIALS * task.steps, task.sets(seed)[1]
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    best, best_loss, best_at = task.module(seed, *task.default), math.inf, {}
    asked = 0
    while Module.spent < budget:
        trial = study.ask()
        asked += 1
        lr = trial.suggest_float("lr", *LR, log=True)
        weight_decay = trial.suggest_float("weight_decay", *WEIGHT_DECAY[task.optimizer], log=True)
        module = task.module(seed, lr, weight_decay)
        optimizer = own_optimizer(module)

        def checkpoint(step: int, trial: Any = trial, module: Module = module) -> None:
            number = step * CHECKPOINTS // task.steps
            if number > (step - 1) * CHECKPOINTS // task.steps:
                trial.report(evaluate(module, hold), number)
                if number < CHECKPOINTS and (trial.should_prune() or Module.spent > budget):
                    raise StoppedError

        try:
            made = train(module, task, seed, optimizer, scheduled(optimizer, task), checkpoint)
            loss = evaluate(module, hold) if made == task.steps else math.inf
        except StoppedError:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        if not math.isfinite(loss):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        study.tell(trial, loss)
        if loss < best_loss:
            best, best_loss, best_at = copy.deepcopy(module), loss, dict(trial.params)
    return finish("tpe-asha", task, seed, start, best, began, asked=asked, **best_at)
