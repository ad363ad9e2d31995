"""Networks in which too high a learning rate does damage, and too low a one learns nothing.

Deep networks without normalisation stand still for some dozens of steps, in which no rate can be told from another, and
lose their units to a rate that seemed best at first. Each task is trained with `HyperGradient()` from lr 1e-2, and at
each of five fixed rates with a cosine and the default weight decay; the figure is the test loss relative to the best of
the five, chosen in hindsight *on the test data*. None of the tasks is one of `one_run.py`'s.
Run: `.venv/bin/python examples/benchmarks/hard_starts.py --seeds 3` (about 15 minutes).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import math
import statistics
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from one_run.competitors import METHODS
from one_run.harness import own_optimizer, scheduled, trained
from one_run.modules import Recurrent, Window, classify, reconstruct
from one_run.tasks import SYMBOLS, Task, digits, noisy_digits, text, windows

RATES = {"AdamW": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "SGD": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}


def chain(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def convolutions(depth: int, width: int) -> nn.Module:
    """Without normalisation."""
    channels = [1, *[width] * depth]
    layers = [x for a, b in itertools.pairwise(channels) for x in (nn.Conv2d(a, b, 3, 1, 1), nn.ReLU())]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)
    )


TASKS = [
    Task("three hidden, SGD", digits, lambda: chain(64, 96, 96, 96, 10), classify, "SGD", 32),
    Task("five hidden, SGD", digits, lambda: chain(64, *[64] * 5, 10), classify, "SGD", 32),
    Task("five hidden, 500 steps", digits, lambda: chain(64, *[64] * 5, 10), classify, "SGD", 32, steps=500),
    Task("five hidden, AdamW", digits, lambda: chain(64, *[64] * 5, 10), classify, "AdamW", 32),
    Task("tanh, SGD", digits, lambda: chain(64, *[64] * 3, 10, activation=nn.Tanh), classify, "SGD", 16),
    Task("convolutions, SGD", digits, lambda: convolutions(4, 16), classify, "SGD", 32),
    Task("convolutions, AdamW", digits, lambda: convolutions(4, 16), classify, "AdamW", 16),
    Task("wide, batches of 8", digits, lambda: chain(64, 512, 10), classify, "SGD", 8),
    Task("autoencoder, SGD", digits, lambda: chain(64, 64, 16, 64, 64), reconstruct, "SGD", 32),
    Task("windows, SGD", windows, lambda: Window(SYMBOLS, 64, 8), classify, "SGD", 64),
    Task("label noise, SGD", noisy_digits, lambda: chain(64, 128, 128, 10), classify, "SGD", 64),
    Task("GRU, SGD", text, lambda: Recurrent(SYMBOLS, 48), classify, "SGD", 32),
]


def at(task: Task, seed: int, lr: float) -> float:
    """The test loss of a fixed learning rate."""
    module = task.module(seed, lr, task.default[1])
    optimizer = own_optimizer(module)
    return trained("fixed", task, seed, lr, module, optimizer, scheduled(optimizer, task)).test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--task", default="", help="only tasks whose name starts with this")
    parser.add_argument("--steps", type=int, help="steps of each run (default: by task)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`|log_every_n_steps).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ours = next(m for m in METHODS if m.name == "ours")
    everything = []
    for task in (t for t in TASKS if t.name.startswith(arguments.task)):
        task = dataclasses.replace(task, steps=arguments.steps or task.steps)
        ratios = []
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            best = min(at(task, seed, lr) for lr in RATES[task.optimizer])
            ratios.append(ours.run(task, seed, 1e-2).test / best)
        everything += map(math.log, ratios)
        print(f"{task.name:24}" + " ".join(f"{ratio:7.2f}" for ratio in ratios), flush=True)
    print(f"geometric mean {math.exp(statistics.mean(everything)):.2f}, worst {math.exp(max(everything)):.2f}")


if __name__ == "__main__":
    main()
