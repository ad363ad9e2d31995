"""Thirty-two hyperparameters: one run that learns them against 50 trials of Optuna's TPE over the same ones.

Breast cancer with 200 numbers beside its 30 measurements that mean nothing: a learning rate and a weight decay per
tensor (4 each), label smoothing, and an L2 penalty per block of ten features (23). Everyone trains on the same data and
chooses by the same hold-out data; test losses are of patients that nothing saw. A trial of TPE is a whole run with a
cosine decay.
Run: `.venv/bin/python examples/benchmarks/many_hyperparameters.py --seeds 3` (about 10 minutes on 2 cores).
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings
from typing import Any

import lightning as L
import optuna
import torch
from one_run.harness import evaluate, train
from one_run.modules import Batch, perceptron
from one_run.tasks import Task, breast_cancer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hypergrad import Cosine, Hyperparameter, OptimizerHyperparameter
from hypergrad.callbacks import HyperGradient

BLOCK, FEATURES = 10, 230
# Of TPE; a run that learns starts in the middle of what it learns and at any lr.
RANGES = {"lr": (1e-4, 1.0), "weight_decay": (1e-5, 1e-1), "l2": (1e-6, 1e-1), "smoothing": (1e-3, 0.3)}


class Blocks(L.LightningModule):
    """A perceptron whose loss has a penalty per block of features and smoothed labels."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net, self.lr, self.batch_size = perceptron(FEATURES, 64, 2), lr, 32
        self.l2 = Hyperparameter(torch.full((FEATURES // BLOCK,), 1e-4), lower=1e-6, upper=0.1)
        self.smoothing = Hyperparameter(0.02, transform="logit", lower=1e-3, upper=0.3)

    def loss(self, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        log_p = self.net(batch[0]).log_softmax(1)
        picked, smoothing = log_p.gather(1, batch[1].unsqueeze(1)).mean(), self.smoothing()
        squares = self.net[0].weight.square().view(64, -1, BLOCK).sum((0, 2))
        return -(1 - smoothing) * picked - smoothing * log_p.mean() + (self.l2() * squares).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)


def task(steps: int) -> Task:
    return Task("blocks", breast_cancer, lambda: perceptron(FEATURES, 64, 2), lambda *_: None, "SGD", 32, steps)  # type: ignore[arg-type, return-value]


def learned(steps: int, seed: int, start: float) -> tuple[float, float, str]:
    """Test loss, cost in gradients of one run, and the report of a run that learns all of them."""
    what = task(steps)
    torch.manual_seed(seed)
    module = Blocks(start)
    per_tensor = [OptimizerHyperparameter(name, per="tensor") for name in ("lr", "weight_decay")]
    tuner = HyperGradient([*per_tensor, module.l2, module.smoothing], val_dataloaders=what.hold_loader(seed))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=[tuner], logger=False, **quiet)
    trainer.fit(module, what.train_loader(seed))
    return evaluate(module, what.sets(seed)[2]), tuner.cost, tuner.report()  # type: ignore[arg-type]


def searched(steps: int, seed: int, trials: int) -> list[tuple[float, float]]:
    """Hold-out and test loss of each trial."""
    what, found = task(steps), []
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(trials):
        trial = study.ask()

        def pick(kind: str, name: str, trial: Any = trial) -> float:
            return trial.suggest_float(name, *RANGES[kind], log=True)

        torch.manual_seed(seed)
        module = Blocks(0.0)
        module.l2.value.copy_(torch.tensor([pick("l2", f"l2_{i}") for i in range(FEATURES // BLOCK)]))
        module.smoothing.value.fill_(pick("smoothing", "smoothing"))
        groups = [
            {"params": [p], "lr": pick("lr", f"lr/{n}"), "weight_decay": pick("weight_decay", f"decay/{n}")}
            for n, p in module.named_parameters()
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        shape = LambdaLR(optimizer, lambda t: Cosine().factor(t / steps))
        made = train(module, what, seed, optimizer, shape, lambda _: None)  # type: ignore[arg-type]
        hold, test = (evaluate(module, rows) for rows in what.sets(seed)[1:])  # type: ignore[arg-type]
        hold = hold if made == steps and math.isfinite(hold) else 1e6
        study.tell(trial, hold)
        found.append((hold, test))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--starts", type=float, nargs="+", default=[1e-5, 1e-2, 1.0])
    parser.add_argument("--report", action="store_true", help="print what each learning run says of itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows: dict[str, list[float]] = {}
    costs = []
    for seed in range(arguments.seeds):
        for start in arguments.starts:
            test, cost, report = learned(arguments.steps, seed, start)
            rows.setdefault(f"learned, from lr {start:g}", []).append(test)
            costs.append(cost)
            if arguments.report:
                print(report)
        trials = searched(arguments.steps, seed, arguments.trials)
        for count in sorted({min(10, arguments.trials), arguments.trials}):
            rows.setdefault(f"TPE, {count} trials", []).append(min(trials[:count])[1])
    print(f"test loss by seed and mean; a learning run costs {statistics.mean(costs):.2f} plain ones")
    for name, losses in rows.items():
        print(f"{name:24}" + "".join(f"{loss:9.4f}" for loss in losses) + f"{statistics.mean(losses):11.4f}")


if __name__ == "__main__":
    main()
