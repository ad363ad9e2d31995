"""Gradient inside and random search outside, against TPE over everything, at the same budget of gradients.

Three tasks, searched over network and optimizer. *Inside*: lr and weight decay are learned in every trial, and only the
rest is searched. *Everything*: lr and weight decay are two more dimensions. All train the same modules under the same
cosine schedule, are pruned by ASHA after the same epochs, and start trials until they have spent as many gradients as
`--budget` full runs. Everybody sees training and hold-out data; figures are losses on test data, of the trial with the
best hold-out loss. What the callback spends beside training counts.
Run: `.venv/bin/python examples/benchmarks/inside_outside.py` (about half an hour on 2 cores).
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from hypergrad import split
from hypergrad.callbacks import HyperGradient
from hypergrad.search import Categorical, Float, Int, Local, Study, Trial, TrialRecord

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
OUTSIDE = {
    "width": Int(16, 256, log=True),
    "depth": Int(1, 3),
    "activation": Categorical(list(ACTIVATIONS)),
    "dropout": Float(0.0, 0.5),
    "batch_size": Categorical([16, 32, 64]),
    "optimizer": Categorical(["sgd", "adamw"]),
}
EVERYTHING = {**OUTSIDE, "lr": Float(1e-5, 1.0, log=True), "weight_decay": Float(1e-6, 0.1, log=True)}
START = {"lr": 1e-3, "weight_decay": 1e-4}  # of what is learned


def digits() -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))


def irrelevant() -> TensorDataset:
    """Breast cancer among a hundred columns of noise."""
    x, y = load_breast_cancer(return_X_y=True)
    columns = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    noise = torch.randn(len(x), 100, generator=torch.Generator().manual_seed(0))
    return TensorDataset(torch.cat([columns, noise], 1), torch.tensor(y))


def teacher() -> TensorDataset:
    """A random network of ten inputs, to be imitated through noise."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 10, generator=draw)
    first, second = torch.randn(10, 16, generator=draw) / 10**0.5, torch.randn(16, 1, generator=draw) / 4
    y = (2 * x @ first).tanh() @ second * 2
    return TensorDataset(x, y + 0.1 * torch.randn(y.shape, generator=draw))


@dataclass(frozen=True)
class Task:
    name: str
    data: Callable[[], TensorDataset]
    outputs: int
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


TASKS = [
    Task("digits", digits, 10, cross_entropy),
    Task("irrelevant features", irrelevant, 2, cross_entropy),
    Task("teacher", teacher, 1, mse_loss),
]


class Net(L.LightningModule):
    """A perceptron as the trial says, under a cosine schedule."""

    def __init__(self, task: Task, inputs: int, params: dict[str, Any], steps: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(params["depth"]):
            layers += [nn.Linear(inputs, params["width"]), ACTIVATIONS[params["activation"]]()]
            layers.append(nn.Dropout(params["dropout"]))
            inputs = params["width"]
        self.net = nn.Sequential(*layers, nn.Linear(inputs, task.outputs))
        self.criterion, self.params, self.steps = task.criterion, params, steps

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.criterion(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.criterion(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.criterion(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        settings = {name: self.params[name] for name in START}
        if self.params["optimizer"] == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), momentum=0.9, **settings)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), **settings)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class Spent(L.Callback):
    """Logs how many full runs' worth of gradients the trial has spent so far."""

    def __init__(self, epochs: int, tuner: HyperGradient | None) -> None:
        self.epochs, self.tuner = epochs, tuner

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            cost = self.tuner.cost if self.tuner is not None else 1.0
            pl_module.log("spent", cost * (trainer.current_epoch + 1) / self.epochs)


def objective(task: Task, epochs: int, seed: int, inside: bool) -> Callable[[Trial], Any]:
    def train(trial: Trial) -> Any:
        data = task.data()
        train, hold, test = split(data, (0.5, 0.2, 0.3), seed=seed)
        size = trial.params["batch_size"]
        loaders = DataLoader(train, size, shuffle=True, drop_last=True), DataLoader(hold, 64), DataLoader(test, 1024)
        module = Net(task, data.tensors[0].shape[1], {**START, **trial.params}, epochs * (len(train) // size))
        tuner = HyperGradient() if inside else None
        ours = [tuner] if tuner is not None else []
        options = {"max_epochs": epochs, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
        trainer = trial.trainer(callbacks=[*ours, Spent(epochs, tuner)], **options)
        trainer.fit(module, *loaders[:2])
        spent = float(trainer.callback_metrics["spent"])
        # With the weights that the fit ended with: the readout puts them there after the last validation.
        held = trainer.validate(module, loaders[1], verbose=False)[0]["val_loss"]
        tested = trainer.test(module, loaders[2], verbose=False)[0]["test_loss"]
        return {"val_loss": held, "test_loss": tested, "spent": spent}

    return train


def spent(records: list[TrialRecord]) -> float:
    return sum(record.metrics.get("spent", 0.0) for record in records)


def search(
    folder: Path, task: Task, method: str, budget: float, epochs: int, seed: int, workers: int
) -> tuple[float, float, int, float]:
    """Test loss of the chosen trial, gradients spent, trials, seconds."""
    inside = method.startswith("inside")
    study = Study(
        folder,
        space=OUTSIDE if inside else EVERYTHING,
        sampler="random" if method.endswith("random") else "tpe",
        pruner=("asha", {"min_resource": max(epochs // 9, 1), "reduction_factor": 3}),
        seed=seed,
    )
    train, began, trials = objective(task, epochs, seed, inside), time.perf_counter(), 0
    while spent(study.trials) < budget:
        trials += workers
        study.run(train, trials, execution=Local(workers, threads=1, preload=["sklearn.datasets"]))
    return study.best.metrics["test_loss"], spent(study.trials), trials, time.perf_counter() - began


METHODS = ("inside, outside random", "inside, outside TPE", "everything TPE", "everything random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=16.0, help="in full runs")
    parser.add_argument("--epochs", type=int, default=54)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ratios: dict[str, list[float]] = {method: [] for method in METHODS}
    print(f"{'task':20} seed  {'method':24} {'test loss':>9} {'spent':>7} {'trials':>7} {'seconds':>8}")
    for task in TASKS:
        for seed in range(arguments.seeds):
            losses = {}
            for method in METHODS:
                with tempfile.TemporaryDirectory() as folder:
                    losses[method], cost, trials, seconds = search(
                        *(Path(folder), task, method, arguments.budget, arguments.epochs, seed, arguments.workers)
                    )
                line = f"{losses[method]:9.4f} {cost:7.1f} {trials:7} {seconds:8.1f}"
                print(f"{task.name:20} {seed:4}  {method:24} {line}", flush=True)
            for method, loss in losses.items():
                ratios[method].append(loss / losses["everything TPE"])
    print("\ntest loss relative to TPE over everything, geometric mean over tasks and seeds (worst)")
    for method, found in ratios.items():
        print(f"{method:24} {math.exp(statistics.fmean(map(math.log, found))):6.3f} ({max(found):.2f})")


if __name__ == "__main__":
    main()
