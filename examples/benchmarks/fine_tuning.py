"""Fine-tuning: does it harm trained weights that weight decay starts where they are forgotten within a tenth of a run?

A network is trained on 600 digits, and then on a few other ones that are shifted by a pixel or noisy, by
`HyperGradient()` and by `HyperGradient(timescale=None)`. Printed is the ratio of their losses on test data that nothing
saw, geometric mean and each seed's.
Run: `.venv/bin/python examples/benchmarks/fine_tuning.py`
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings

import lightning as L
import torch
from one_run.harness import evaluate, own_optimizer, scheduled, train
from one_run.modules import classify, convolutional, perceptron
from one_run.tasks import Rows, Sets, Task, digits

from hypergrad.callbacks import HyperGradient

STEPS, SOURCE, QUIET = 1000, 600, {"enable_checkpointing": False, "enable_progress_bar": False}
FEW = {"shifted": 100, "noisy": 50}
NETS = {"perceptron": lambda: perceptron(64, 128, 128, 10), "convolutional": lambda: convolutional(8)}


def source(seed: int) -> Sets:
    train, hold, test = digits(seed)
    return Rows(*(t[:SOURCE] for t in train.tensors)), hold, test


def target(change: str, seed: int) -> Sets:
    """Few examples that were not in the source, all of them changed."""
    draw = torch.Generator().manual_seed(seed)

    def changed(rows: Rows, first: int = 0, last: int | None = None) -> Rows:
        x, y = (t[first:last] for t in rows.tensors)
        if change == "shifted":
            return Rows(x.view(-1, 8, 8).roll(1, 2).flatten(1), y)
        return Rows(x + 0.3 * torch.randn(x.shape, generator=draw), y)

    train, hold, test = digits(seed)
    return changed(train, SOURCE, SOURCE + FEW[change]), changed(hold, 0, 100), changed(test)


def fine_tuned(task: Task, seed: int, trained: dict[str, torch.Tensor], **settings: None) -> float:
    """Test loss."""
    module = task.module(seed, 1e-3, task.default[1])
    module.load_state_dict(trained)
    tuner = HyperGradient(val_dataloaders=task.hold_loader(seed), **settings)
    options = {"max_steps": STEPS, "max_epochs": -1, "accelerator": "cpu", "devices": 1, "logger": False, **QUIET}
    trainer = L.Trainer(callbacks=[tuner], enable_model_summary=False, **options)  # type: ignore[arg-type]
    trainer.fit(module, task.train_loader(seed))
    return evaluate(module, task.sets(seed)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--changes", nargs="+", choices=list(FEW), default=list(FEW))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*(many workers|no `val_dataloader`).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for change in arguments.changes:
        for name, net in NETS.items():
            for optimizer, lr in (("AdamW", 1e-3), ("SGD", 0.05)):
                before = Task("source", source, net, classify, optimizer, 64, STEPS)
                after = Task("target", lambda seed, c=change: target(c, seed), net, classify, optimizer, 50, STEPS)  # type: ignore[misc]
                ratios = []
                for seed in range(arguments.seeds):
                    first = before.module(seed, lr, 1e-4)
                    own = own_optimizer(first)
                    train(first, before, seed, own, scheduled(own, before), lambda _: None)
                    losses = [fine_tuned(after, seed, first.state_dict(), **kw) for kw in ({}, {"timescale": None})]
                    ratios.append(losses[0] / losses[1])
                mean = math.exp(statistics.mean(map(math.log, ratios)))
                print(f"{change:8} {name:14} {optimizer:6} {mean:.3f}  ", *(f"{r:.2f}" for r in ratios), flush=True)


if __name__ == "__main__":
    main()
