"""What the callback costs: the time of a tuned fit over that of a plain one.

Plain and tuned fits take turns within every round, so that a drift in the machine's speed cancels in the ratio; the
figure is the median over rounds of the ratio within a round. Data loading, logging and everything else that a fit does
is in both. Run: `make benchmark`, or `make gpu` on a machine with a CUDA device.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hypergrad.callbacks import HyperGradient

EVERY = (1, 5, 20)


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, batch: Any) -> torch.Tensor:
        return cross_entropy(self.net(batch[0]).flatten(0, -2), batch[1].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Task:
    name: str
    net: Callable[[], nn.Module]
    data: TensorDataset
    batch_size: int
    steps: int


class Transformer(nn.Module):
    """A byte-level language model."""

    def __init__(self, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, max(width // 32, 1), 4 * width, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(tokens) + self.position, mask=self.mask, is_causal=True))


def convolutional(width: int) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*block(3, width), *block(width, 2 * width), *block(2 * width, 4 * width)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    )


def text(length: int) -> TensorDataset:
    """Bytes of the Python standard library's own source, in pieces of `length`."""
    source = b"".join(p.read_bytes() for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40])
    tokens = torch.tensor(list(source[: len(source) // length * length])).view(-1, length)
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def tasks(cuda: bool) -> list[Task]:
    vectors = TensorDataset(torch.randn(2048, 64), torch.randint(0, 10, (2048,)))
    images = TensorDataset(torch.randn(1024, 3, 32, 32), torch.randint(0, 10, (1024,)))
    if cuda:
        return [
            Task("perceptron, 2.1 M", lambda: perceptron(1400), vectors, 512, 400),
            Task("convolutional, 6.0 M", lambda: convolutional(256), images, 256, 200),
            Task("transformer, 10.8 M", lambda: Transformer(384, 6, 256), text(257), 32, 200),
        ]
    return [
        Task("perceptron, 26 k", lambda: perceptron(128), vectors, 64, 400),
        Task("convolutional, 24 k", lambda: convolutional(16), images, 32, 150),
        Task("transformer, 0.13 M", lambda: Transformer(64, 2, 64), text(65), 16, 150),
    ]


def fit(task: Task, every_n_steps: int | None, device: str) -> float:
    """Seconds of one fit; with the callback if `every_n_steps` is given."""
    L.seed_everything(0, verbose=False)
    loader = DataLoader(task.data, task.batch_size, shuffle=True, drop_last=True)
    own = DataLoader(task.data, task.batch_size)
    callbacks = [HyperGradient(val_dataloaders=own, every_n_steps=every_n_steps)] if every_n_steps else []
    module = Classifier(task.net())
    trainer = L.Trainer(
        max_steps=task.steps,
        max_epochs=-1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    began = time.perf_counter()
    trainer.fit(module, loader)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved repeats after one warm-up (default 9)")
    parser.add_argument("--every", type=int, nargs="+", default=EVERY, help="every_n_steps to measure")
    parser.add_argument("--task", default="", help="only tasks whose name starts with this")
    parser.add_argument("--steps", type=int, help="steps of each fit (default: by task)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cuda = arguments.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; median of {arguments.rounds} rounds (min-max)")
    print(f"{'':22}{'plain step':>12}" + "".join(f"{f'every {n}':>20}" for n in arguments.every))
    for task in (t for t in tasks(cuda) if t.name.startswith(arguments.task)):
        if arguments.steps:
            task = Task(task.name, task.net, task.data, task.batch_size, arguments.steps)
        rounds = [
            [fit(task, every, arguments.device) for every in (None, *arguments.every)]
            for _ in range(arguments.rounds + 1)
        ][1:]
        plain = statistics.median(r[0] for r in rounds) / task.steps
        cells = []
        for i in range(1, len(arguments.every) + 1):
            ratios = [r[i] / r[0] for r in rounds]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        print(f"{task.name:22}{1e3 * plain:9.2f} ms" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
