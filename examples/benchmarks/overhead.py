"""What the callback costs: the time of a tuned fit over that of a plain one.

The plain fit and the tuned ones run in one process and hand a baton on every few batches: each works while the others
stand still, so that a drift in the machine's speed meets all of them. Timed is the whole fit, its start, data loading,
logging and validation loop included. The figure is the median over rounds. On a CPU torch works with one thread:
two pools of threads on the same cores would wait for each other. The first task is the run of
`examples/digits.py` with its logger and its validation loop; the others train and do nothing else, the last of them in
bfloat16, with accumulation, clipping and a schedule. Measured are
hypergradients alone, every so many steps, and all that `HyperGradient()` does by default: race, readout and what its
budget leaves for hypergradients; fits of less than 400 steps are too short for that. `--floor` adds how little it could
be: a callback whose hooks do nothing, and one that takes a bare validation gradient, without isolation, every 5 steps.
Run: `make benchmark`, or `make gpu` on a machine with a CUDA device.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import platform
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hypergrad import Cautious, Descent
from hypergrad.callbacks import HyperGradient

sys.path.insert(0, str(Path(__file__).parents[1]))
import digits

WHOLE, NOTHING, BARE = 0, -1, -5
EVERY = (1, 5, 20, WHOLE)
NAMES = {WHOLE: "the default", NOTHING: "empty hooks", BARE: "bare gradient"}
TURN = 30  # batches


class Baton:
    """Lets one of several threads work at a time, and adds up how long each has worked."""

    def __init__(self, runners: int, cuda: bool) -> None:
        self.seconds = [0.0] * runners
        self._order = list(range(runners))
        self._holder, self._began = 0, time.perf_counter()
        self._cuda = cuda
        self._free = threading.Condition()

    def take(self, runner: int) -> None:
        with self._free:
            self._free.wait_for(lambda: self._holder == runner)
            self._began = time.perf_counter()

    def hand_on(self, runner: int, *, leave: bool = False) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        with self._free:
            self.seconds[runner] += time.perf_counter() - self._began
            after = self._order.index(runner) + 1
            self._holder = self._order[after % len(self._order)]
            if leave:
                self._order.remove(runner)
            self._free.notify_all()


class Turns(Dataset[Any]):
    """A dataset that hands the baton on at every `TURN`-th batch."""

    def __init__(self, dataset: Any, baton: Baton, runner: int) -> None:
        self.dataset, self.baton, self.runner, self.batches = dataset, baton, runner, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> list[Any]:
        self.batches += 1
        if self.batches % TURN == 0:
            self.baton.hand_on(self.runner)
            self.baton.take(self.runner)
        return [self.dataset[row] for row in rows]


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


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Task:
    name: str
    net: Callable[[], nn.Module]
    data: TensorDataset
    batch_size: int
    steps: int
    module: type[Classifier] = Classifier
    options: dict[str, Any] = field(default_factory=dict)


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


REAL = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}


def tasks(cuda: bool) -> list[Task]:
    vectors = TensorDataset(torch.randn(2048, 64), torch.randint(0, 10, (2048,)))
    images = TensorDataset(torch.randn(1024, 3, 32, 32), torch.randint(0, 10, (1024,)))
    if cuda:
        return [
            Task("perceptron, 2.1 M", lambda: perceptron(1400), vectors, 512, 400),
            Task("convolutional, 6.0 M", lambda: convolutional(256), images, 256, 200),
            Task("transformer, 10.8 M", lambda: Transformer(384, 6, 256), text(257), 32, 200),
            Task("the same, as trained", lambda: Transformer(384, 6, 256), text(257), 32, 200, Scheduled, REAL),
        ]
    return [
        Task("perceptron, 26 k", lambda: perceptron(128), vectors, 64, 400),
        Task("convolutional, 24 k", lambda: convolutional(16), images, 32, 150),
        Task("transformer, 0.13 M", lambda: Transformer(64, 2, 64), text(65), 16, 150),
        Task("the same, as trained", lambda: Transformer(64, 2, 64), text(65), 16, 100, Scheduled, REAL),
    ]


class Nothing(L.Callback):
    """The hooks that `HyperGradient` has, empty: what Lightning takes to call them."""

    def on_train_batch_start(self, *_: Any) -> None: ...
    def on_before_zero_grad(self, *_: Any) -> None: ...
    def on_after_backward(self, *_: Any) -> None: ...
    def on_train_batch_end(self, *_: Any) -> None: ...


class BareGradient(Nothing):
    """A validation gradient every so many steps, of the loss itself, and nothing is done with it."""

    def __init__(self, own: Any, every: int) -> None:
        self.batches, self.every = itertools.cycle(list(own)), every

    def on_train_batch_end(self, _: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every == 0:
            batch = [t.to(module.device) for t in next(self.batches)]
            loss = cross_entropy(module.net(batch[0]).flatten(0, -2), batch[1].flatten())
            torch.autograd.grad(loss, list(module.parameters()))


def callbacks(own: Any, every_n_steps: int | None, budget: float) -> list[L.Callback]:
    """None for a plain fit; hypergradients alone, every so many steps; or one of `NAMES`."""
    if every_n_steps is None:
        return []
    if every_n_steps == NOTHING:
        return [Nothing()]
    if every_n_steps == BARE:
        return [BareGradient(own, -BARE)]
    if every_n_steps == WHOLE:
        return [HyperGradient(val_dataloaders=own, budget=budget)]
    return [HyperGradient(val_dataloaders=own, every_n_steps=every_n_steps, controller=Cautious(Descent()))]


def fit(task: Task, every_n_steps: int | None, train: Any, device: str, budget: float) -> None:
    """One fit; see `callbacks`."""
    own = DataLoader(task.data, task.batch_size)
    trainer = L.Trainer(
        max_steps=task.steps,
        max_epochs=-1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks(own, every_n_steps, budget),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **task.options,
    )
    trainer.fit(task.module(task.net()), DataLoader(train, task.batch_size, shuffle=True, drop_last=True))


def fit_demo(data: Any, every_n_steps: int | None, train: Any, folder: str, epochs: int, budget: float) -> None:
    """The run of `examples/digits.py` from its hopeless learning rate."""
    torch.set_flush_denormal(True)  # as there; for the calling thread only
    own = DataLoader(data[1], digits.BATCH)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks(own, every_n_steps, budget),
        logger=TensorBoardLogger(folder, default_hp_metric=False),
        log_every_n_steps=10,
        **digits.QUIET,
    )
    loaders = DataLoader(train, digits.BATCH, shuffle=True), DataLoader(data[2], len(data[2]))
    trainer.fit(digits.Digits(1e-5, 0.01), *loaders)


def race(run: Callable[[int | None, Any], None], data: Any, every: list[int], cuda: bool) -> list[float]:
    """Seconds of work of the plain fit and of each tuned one, all at once by turns."""
    baton = Baton(1 + len(every), cuda)
    errors: list[BaseException] = []

    def work(runner: int, n: int | None) -> None:
        torch.set_num_threads(1)  # counts for the calling thread only
        baton.take(runner)
        try:
            run(n, Turns(data, baton, runner))
        except BaseException as error:
            errors.append(error)
        baton.hand_on(runner, leave=True)

    L.seed_everything(0, verbose=False)
    threads = [threading.Thread(target=work, args=(i, n)) for i, n in enumerate((None, *every))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return baton.seconds


def report(name: str, steps: int, table: list[list[float]]) -> None:
    """Print one line: the time of a plain step, and the ratios."""
    plain = statistics.median(row[0] for row in table) / steps
    cells = []
    for i in range(1, len(table[0])):
        ratios = [row[i] / row[0] for row in table]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    print(f"{name:22}{1e3 * plain:9.2f} ms" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="repeats after one warm-up (default 5)")
    parser.add_argument("--every", type=int, nargs="+", default=EVERY, help="every_n_steps to measure; 0: the default")
    parser.add_argument("--budget", type=float, default=1.25, help="of the default, in gradients (default 1.25)")
    parser.add_argument("--floor", action="store_true", help="measure also how little it could be")
    parser.add_argument("--task", default="", help="only tasks whose name starts with this")
    parser.add_argument("--steps", type=int, help="steps of each fit but the demo's (default: by task)")
    parser.add_argument("--epochs", type=int, default=digits.EPOCHS, help="of the demo")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cuda = arguments.device == "cuda"
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; median of {arguments.rounds} rounds (min-max)")
    every = [*arguments.every, *([NOTHING, BARE] if arguments.floor else [])]
    print(f"{'':22}{'plain step':>12}" + "".join(f"{NAMES.get(n, f'every {n}'):>20}" for n in every))

    def measure(name: str, steps: int, run: Callable[[int | None, Any], None], data: Any) -> None:
        table = [race(run, data, every, cuda) for _ in range(arguments.rounds + 1)]
        report(name, steps, table[1:])

    if not cuda and "demo".startswith(arguments.task):
        data = digits.load()
        steps = arguments.epochs * -(-len(data[0]) // digits.BATCH)
        with tempfile.TemporaryDirectory() as folder:
            options = folder, arguments.epochs, arguments.budget
            measure("demo", steps, lambda n, train: fit_demo(data, n, train, *options), data[0])
    for task in (t for t in tasks(cuda) if t.name.startswith(arguments.task)):
        if arguments.steps:
            task = replace(task, steps=arguments.steps)
        measure(
            task.name,
            task.steps,
            lambda n, train, t=task: fit(t, n, train, arguments.device, arguments.budget),
            task.data,
        )


if __name__ == "__main__":
    main()
