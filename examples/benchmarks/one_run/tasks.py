"""The tasks: small, quick, and none of them downloaded.

`TASKS` was written down in this order before anything was tuned on it, and every second one (1, 3, 5, …) is a
*confirmation* task: looked at once per candidate for the callback's default, never while one is being made. The others
are for development. Neighbours are alike, so that both halves have both optimizers, BatchNorm, text, little data
and a schedule of the user's own.

Every method gets the same two sets, train and hold-out; the test set is for the final number. A seed stands for a split
(or a draw, where data is generated), the initial weights and the order of the batches.
"""

from __future__ import annotations

import functools
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from .modules import (
    Batch,
    Loss,
    Module,
    Recurrent,
    Schedule,
    Transformer,
    Window,
    classify,
    contrast,
    convolutional,
    perceptron,
    reconstruct,
    regress,
    view,
)

SYMBOLS = 128
Sets = tuple["Rows", "Rows", "Rows"]  # train, hold-out, test


class Rows(Dataset[Batch]):
    """Tensors by rows; a whole batch is taken at once, which is what keeps loading out of the timings."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, row: int) -> Batch:
        return tuple(t[row] for t in self.tensors)

    def __getitems__(self, rows: list[int]) -> Batch:
        index = torch.tensor(rows)
        return tuple(t[index] for t in self.tensors)


class Shuffled(Sampler[int]):
    """An order for each epoch that depends on the seed and the epoch only, however often it is asked for."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at every epoch; so does the plain loop."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(100_003 * self.seed + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def as_it_is(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class Task:
    """What is trained on what, for how long, and the optimizer that its user wrote."""

    name: str
    data: Callable[[int], Sets]
    net: Callable[[], nn.Module]
    criterion: Loss
    optimizer: str  # "AdamW" or "SGD" (momentum 0.9, its weight decay coupled)
    batch_size: int
    steps: int = 1000
    schedule: Callable[[int], Schedule] | None = None  # of the number of steps; None: constant lr

    @property
    def is_confirmation(self) -> bool:
        return [t.name for t in TASKS].index(self.name) % 2 == 1

    @property
    def default(self) -> tuple[float, float]:
        """The lr and weight decay of who tunes nothing: torch's own, and the usual lr for momentum."""
        return (1e-3, 1e-2) if self.optimizer == "AdamW" else (0.1, 0.0)

    def sets(self, seed: int) -> Sets:
        return _sets(self.data, seed)

    def module(self, seed: int, lr: float, weight_decay: float) -> Module:
        """The module at its initial weights; the global random stream is left at the start of a training."""
        torch.manual_seed(seed)
        schedule = self.schedule(self.steps) if self.schedule else None
        module = Module(self.net(), self.criterion, self.optimizer, self.batch_size, lr, weight_decay, schedule)
        torch.manual_seed(seed)
        return module

    def train_loader(self, seed: int) -> DataLoader[Batch]:
        train = self.sets(seed)[0]
        sampler = Shuffled(len(train), seed)
        return DataLoader(train, self.batch_size, sampler=sampler, drop_last=True, collate_fn=as_it_is)

    def hold_loader(self, seed: int) -> DataLoader[Batch]:
        return DataLoader(self.sets(seed)[1], self.batch_size, collate_fn=as_it_is)


@functools.lru_cache(maxsize=4)
def _sets(data: Callable[[int], Sets], seed: int) -> Sets:
    return data(seed)


def _cut(tensors: Batch, sizes: tuple[int, int], seed: int) -> Sets:
    """Shuffle, then cut into train, hold-out and the rest."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(seed))
    train, hold, test = order.tensor_split((sizes[0], sizes[0] + sizes[1]))
    return tuple(Rows(*(t[rows] for t in tensors)) for rows in (train, hold, test))  # type: ignore[return-value]


def _digits() -> Batch:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def digits(seed: int) -> Sets:
    return _cut(_digits(), (700, 300), seed)


def noisy_digits(seed: int) -> Sets:
    """Of the training labels 40% are replaced by another; hold-out and test are clean."""
    train, hold, test = _cut(_digits(), (700, 300), seed)
    draw = torch.Generator().manual_seed(seed)
    images, labels = train.tensors
    flipped = torch.rand(len(labels), generator=draw) < 0.4
    other = (labels + torch.randint(1, 10, labels.shape, generator=draw)) % 10
    return Rows(images, torch.where(flipped, other, labels)), hold, test


def digit_views(seed: int) -> Sets:
    train, *held_out = _cut(_digits(), (700, 320), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hold, test = (Rows(view(rows.tensors[0]), view(rows.tensors[0])) for rows in held_out)
    return Rows(train.tensors[0]), hold, test


@functools.cache
def _source(length: int) -> Tensor:
    """The Python standard library's own source in pieces; what is not ASCII becomes one symbol."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    return text.clamp(max=SYMBOLS - 1).long()[: len(text) // length * length].view(-1, length)


def _pieces(length: int, sizes: tuple[int, int, int], seed: int) -> Tensor:
    pieces = _source(length)
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[: sum(sizes)]
    return pieces[chosen]


def text(seed: int) -> Sets:
    pieces = _pieces(17, (4000, 160, 2000), seed)
    return _cut((pieces[:, :-1], pieces[:, 1:]), (4000, 160), seed)


def windows(seed: int) -> Sets:
    pieces = _pieces(9, (6000, 320, 4000), seed)
    return _cut((pieces[:, :-1], pieces[:, -1:]), (6000, 320), seed)


def friedman(seed: int) -> Sets:
    """Friedman's first function with 15 features that mean nothing, of few examples: it is learned by heart."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(100 + 160 + 4000, 20, generator=draw)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = (y + torch.randn(len(y), generator=draw) - 14.4) / 5  # about standardized
    return _cut((2 * x - 1, y.unsqueeze(1)), (100, 160), seed)


def breast_cancer(seed: int) -> Sets:
    """30 measurements of a patient among 200 numbers that mean nothing; drawn 8 times for the test, which is small."""
    x, y = load_breast_cancer(return_X_y=True)
    train, hold, test = _cut((torch.tensor(x, dtype=torch.float32), torch.tensor(y)), (200, 120), seed)
    known = train.tensors[0]
    draw = torch.Generator().manual_seed(seed)

    def widened(rows: Rows, times: int) -> Rows:
        x, y = (t.repeat(times, *[1] * (t.ndim - 1)) for t in rows.tensors)
        x = (x - known.mean(0)) / known.std(0)
        return Rows(torch.cat([x, torch.randn(len(x), 200, generator=draw)], 1), y)

    return widened(train, 1), widened(hold, 1), widened(test, 8)


def _teacher(outputs: int, sizes: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(sizes, 20, generator=draw)
    hidden = torch.tanh(x @ torch.randn(20, 16, generator=draw) / 20**0.5 * 2)
    return x, hidden @ torch.randn(16, outputs, generator=draw) / 4, draw


def teacher(seed: int) -> Sets:
    x, y, draw = _teacher(1, 1000 + 320 + 4000, seed)
    return _cut((x, y + 0.1 * torch.randn(y.shape, generator=draw)), (1000, 320), seed)


def teacher_labels(seed: int) -> Sets:
    """Labels drawn from a teacher's probabilities, so that no student can be sure."""
    x, logits, draw = _teacher(5, 1000 + 320 + 4000, seed)
    labels = torch.multinomial((4 * logits).softmax(1), 1, generator=draw).squeeze(1)
    return _cut((x, labels), (1000, 320), seed)


def steps_down(steps: int) -> Schedule:
    """A tenth at 60% and a hundredth at 85% of the run."""
    return lambda t: 1.0 if t < 0.6 * steps else 0.1 if t < 0.85 * steps else 0.01


def warm_cosine(steps: int) -> Schedule:
    """Up over 5% of the run, then a cosine down to 0."""
    warm = max(steps // 20, 1)
    return lambda t: min((t + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(t / steps, 1.0)))


# Every second one is a confirmation task: see above before changing the order.
TASKS = [
    Task("digits-mlp-adamw", digits, lambda: perceptron(64, 128, 128, 10), classify, "AdamW", 64),
    Task("digits-mlp-sgd", digits, lambda: perceptron(64, 128, 128, 10), classify, "SGD", 64),
    Task("digits-cnn-sgd", digits, lambda: convolutional(8), classify, "SGD", 64),
    Task("digits-cnn-adamw", digits, lambda: convolutional(8), classify, "AdamW", 64),
    Task("text-gru", text, lambda: Recurrent(SYMBOLS, 48), classify, "AdamW", 32),
    Task("text-transformer", text, lambda: Transformer(SYMBOLS, 32, 2, 16), classify, "AdamW", 16),
    Task("label-noise", noisy_digits, lambda: perceptron(64, 128, 128, 10), classify, "AdamW", 64),
    Task("small-regression", friedman, lambda: perceptron(20, 64, 64, 1), regress, "AdamW", 32),
    Task("irrelevant-features", breast_cancer, lambda: perceptron(230, 64, 2), classify, "SGD", 32),
    Task("teacher", teacher, lambda: perceptron(20, 64, 64, 1), regress, "SGD", 64),
    Task("autoencoder", digits, lambda: perceptron(64, 64, 16, 64, 64), reconstruct, "AdamW", 64),
    Task("contrastive", digit_views, lambda: perceptron(64, 128, 32), contrast, "AdamW", 64),
    Task("scheduled-steps", windows, lambda: Window(SYMBOLS, 64, 8), classify, "AdamW", 64, schedule=steps_down),
    Task(
        "scheduled-cosine", teacher_labels, lambda: perceptron(20, 64, 64, 5), classify, "SGD", 64,
        schedule=warm_cosine,
    ),
]  # fmt: skip
