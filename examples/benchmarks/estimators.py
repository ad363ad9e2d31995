"""What a hypergradient costs: time per inner step over that of plain training, and memory against the horizon.

For each model, optimizer and estimator, K plain steps and the hypergradient of the same K steps take turns; the figure
is the median over rounds of the ratio within a round, in time of the processor with one thread, which other processes
disturb less than time on the wall. Memory is what tensors hold at the peak, beyond the peak of plain
training, in copies of the parameters; "kept" is what `hypergradient` holds to put everything back, whatever the
estimator. Last comes implicit differentiation by a million penalties.
Run: `.venv/bin/python examples/benchmarks/estimators.py --rounds 3 --horizons 10 60` (about 10 minutes).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hypergrad import (
    CG,
    Exact,
    FiniteDifference,
    Forward,
    Hyperparameter,
    Implicit,
    Neumann,
    Nystrom,
    Online,
    Unrolled,
    hypergradient,
    preserved,
)

sys.path.insert(0, str(Path(__file__).parent))
from memory import peak
from overhead import Transformer, convolutional, perceptron


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(64, 32), nn.GRU(32, 96, batch_first=True), nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embedding(x))[0][:, -1])


# name -> model, batch, targets
TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = {
    "perceptron": (lambda: perceptron(512), lambda: torch.randn(256, 64), lambda: torch.randint(0, 10, (256,))),
    "convolutional": (
        lambda: convolutional(16),
        lambda: torch.randn(32, 3, 32, 32),
        lambda: torch.randint(0, 10, (32,)),
    ),
    "GRU": (Recurrent, lambda: torch.randint(0, 64, (32, 24)), lambda: torch.randint(0, 10, (32,))),
    "transformer": (
        lambda: Transformer(64, 2, 64),
        lambda: torch.randint(0, 256, (16, 64)),
        lambda: torch.randint(0, 256, (16, 64)),
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
}
ESTIMATORS = {
    "online": Online(),
    "no curvature": Forward(curvature=None),
    "difference": Forward(curvature=FiniteDifference()),
    "exact": Forward(curvature=Exact()),
    "unrolled": Unrolled(),
}


def problem(task: str, optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[nn.Module], torch.Tensor]]:
    torch.manual_seed(0)
    make, inputs, targets = TASKS[task]
    model, x, y = make(), inputs(), targets()
    return model, OPTIMIZERS[optimizer](model.parameters()), lambda m: cross_entropy(m(x).flatten(0, -2), y.flatten())


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[..., torch.Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def ratios(task: str, optimizer: str, estimator: str, steps: int, rounds: int) -> list[float]:
    model, opt, loss = problem(task, optimizer)
    tuned = lambda: hypergradient(model, opt, [loss] * steps, loss, ["lr"], ESTIMATORS[estimator])  # noqa: E731
    for warm_up in (lambda: plain(model, opt, loss, 2), tuned):
        warm_up()
    found = []
    for _ in range(rounds):
        base = seconds(lambda: plain(model, opt, loss, steps))
        found.append(seconds(tuned) / base)
    return found


def copies(optimizer: str, estimator: str, steps: int, width: int) -> float:
    """Peak memory above plain training, in copies of the parameters of a large perceptron."""
    torch.manual_seed(0)
    model = perceptron(width)
    opt, x, y = OPTIMIZERS[optimizer](model.parameters()), torch.randn(8, 64), torch.randint(0, 10, (8,))
    loss = lambda m: cross_entropy(m(x), y)  # noqa: E731
    plain(model, opt, loss, 2)  # with gradients and state of its own

    def there() -> Iterator[torch.Tensor]:
        for p in model.parameters():
            yield from (p, p.grad, *(t for t in opt.state[p].values()))

    before = peak(lambda: plain(model, opt, loss, steps), there())
    size = 4 * sum(p.numel() for p in model.parameters())
    if estimator == "kept":

        def kept() -> None:
            with preserved(opt, model, parameters=True):
                plain(model, opt, loss, 1)

        return (peak(kept, there()) - before) / size
    most = peak(lambda: hypergradient(model, opt, [loss] * steps, loss, ["lr"], ESTIMATORS[estimator]), there())
    return (most - before) / size


class Penalized(nn.Module):
    """A million weights, each with an L2 penalty of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 2000), nn.Tanh(), nn.Linear(2000, 430), nn.Tanh(), nn.Linear(430, 10))
        self.l2 = nn.ModuleList([Hyperparameter(torch.full_like(p, 1e-4)) for p in self.net.parameters()])

    def penalty(self) -> torch.Tensor:
        pairs = zip(self.net.parameters(), self.l2, strict=True)
        return torch.stack([(l2() * p.square()).sum() for p, l2 in pairs]).sum()


def implicit(rounds: int) -> None:
    """One update of all penalties, in training gradients and copies of the parameters."""
    torch.manual_seed(0)
    model, x, y = Penalized(), torch.randn(256, 64), torch.randint(0, 10, (256,))
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    val_loss = lambda m: cross_entropy(m.net(x), y)  # noqa: E731
    loss = lambda m: val_loss(m) + m.penalty()  # noqa: E731
    numbers = sum(h.value.numel() for h in model.l2)
    print(f"{f'{numbers:,} penalties':24}{'gradients':>20}{'copies':>12}{'products':>12}{'residual':>12}")
    for solver in (Neumann(terms=20), CG(iterations=20), Nystrom(rank=10)):
        call = lambda s=solver: hypergradient(  # noqa: E731
            model, sgd, [loss], val_loss, list(model.l2), Implicit(s, damping=1.0)
        )
        result, found = call(), []
        for _ in range(rounds):
            base = seconds(lambda: plain(model, sgd, loss, 5)) / 5
            found.append(seconds(call) / base)
        memory = (peak(call) - peak(lambda: plain(model, sgd, loss, 1))) / (4 * numbers)
        cell = f"{statistics.median(found):.1f} ({min(found):.1f}-{max(found):.1f})"
        name = type(solver).__name__
        print(f"{name:24}{cell:>20}{memory:12.1f}{result.products:12}{result.residual:12.2g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="inner steps K")
    parser.add_argument("--horizons", type=int, nargs="*", default=[10, 60], help="K of the memory figures")
    parser.add_argument("--width", type=int, default=2900, help="of the perceptron of the memory figures (2900: 36 MB)")
    parser.add_argument("--task", default="", help="only tasks whose name starts with this; 'none' for memory alone")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads; torch {torch.__version__}; K = {arguments.steps}"
    )
    print(f"{'time over plain':24}" + "".join(f"{name:>20}" for name in arguments.estimators))
    for task in (t for t in TASKS if t.startswith(arguments.task)):
        for optimizer in OPTIMIZERS:
            cells = []
            for estimator in arguments.estimators:
                found = ratios(task, optimizer, estimator, arguments.steps, arguments.rounds)
                cells.append(f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})")
            print(f"{f'{task}, {optimizer}':24}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    if arguments.horizons:
        print(f"{'copies of parameters':24}" + "".join(f"{f'K = {k}':>12}" for k in arguments.horizons))
    for optimizer in OPTIMIZERS if arguments.horizons else ():
        for estimator in ("kept", *arguments.estimators):
            cells = [copies(optimizer, estimator, steps, arguments.width) for steps in arguments.horizons]
            print(f"{f'{estimator}, {optimizer}':24}" + "".join(f"{cell:12.1f}" for cell in cells), flush=True)
    if arguments.horizons:
        implicit(arguments.rounds)


if __name__ == "__main__":
    main()
