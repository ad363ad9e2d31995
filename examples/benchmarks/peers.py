"""The same hypergradient by other libraries: is it right, what time and what memory does it take.

Sought is d(validation loss)/d(lr) through K optimizer steps, with the models and optimizers of `estimators.py` (dropout
off, eight batches in turn), in float32. Each library is used as its documentation says:
- higher: `innerloop_ctx` with `override={"lr": ...}`. Its Adam adds eps before the bias correction, torch's after it;
- torchopt: `MetaSGD`, and `MetaAdam` with the `eps_root` that its documentation asks for under meta-gradients: 1e-30
  does not change the run; without it, units that are off give nan;
- betty: `IterativeProblem`, whose Adam first makes a step of zero gradients and so corrects its biases as if one step
  later. `ImplicitProblem` (darts, neumann, cg) takes no lr, only what the training loss depends on;
- hypertorch: `reverse`, from a checkout: no registry has it, and its package, too, is called `hypergrad`.

The reference is a central difference in float64 with Richardson's extrapolation, at the first of three steps where the
differences over h and h/2 agree: within a larger one ReLUs switch, a smaller one is lost in rounding. *Right* is within
1%: more than float32 need cost, too little to move a hyperparameter otherwise. What is wrong is given in float64 too,
which tells rounding from a wrong formula or another run. Time is the median over rounds of the ratio to the K plain
steps of the same round. Memory is what tensors hold at their peak, beyond the peak of plain training, in copies of the
parameters.
Run: `python examples/benchmarks/peers.py --hypertorch FOLDER` in an environment of its own, with hypergrad,
scikit-learn and `pip install higher torchopt betty-ml`; what is missing is left out. With its defaults it takes most of
an hour, three quarters of it for K = 100.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from hypergrad import Estimator, FiniteDifference, Forward, Unrolled, hypergradient

sys.path.insert(0, str(Path(__file__).parent))
from estimators import OPTIMIZERS, TASKS, seconds
from memory import peak

BATCHES = 8
TOLERANCE = 1e-2
Loss = Callable[[Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]  # of a model or of whatever is called like one


@dataclass(frozen=True)
class Run:
    """A training run about to start: a training loss for each of its K steps, and the validation loss after them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: list[Loss]
    val: Loss

    @property
    def settings(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]

    def lr(self) -> torch.Tensor:
        """The learning rate as a leaf of autograd."""
        return torch.tensor(self.settings["lr"], dtype=self.settings["params"][0].dtype, requires_grad=True)

    def plain(self) -> float:
        """Train, and return the validation loss."""
        for loss in self.train:
            self.optimizer.zero_grad()
            loss(self.model).backward()
            self.optimizer.step()
        with torch.no_grad():
            return self.val(self.model).item()


Method = Callable[[Run], float]


def start(task: str, optimizer: str, steps: int, dtype: torch.dtype) -> Run:
    """The same weights and batches at every call."""
    torch.manual_seed(0)
    make, inputs, targets = TASKS[task]
    model = make().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0

    def loss() -> Loss:
        x, y = inputs(), targets().flatten()
        x = x.to(dtype) if x.is_floating_point() else x
        return lambda model: cross_entropy(model(x).flatten(0, -2), y)

    *train, val = [loss() for _ in range(BATCHES + 1)]
    return Run(model, OPTIMIZERS[optimizer](model.parameters()), [train[k % BATCHES] for k in range(steps)], val)


def ours(estimator: Estimator) -> Method:
    def method(run: Run) -> float:
        found = hypergradient(run.model, run.optimizer, run.train, run.val, ["lr"], estimator)
        return found.grads["lr"].item()

    return method


def higher(run: Run) -> float:
    import higher as library

    override = {"lr": [run.lr()]}
    with library.innerloop_ctx(run.model, run.optimizer, override=override) as (model, optimizer):
        for loss in run.train:
            optimizer.step(loss(model))
        return torch.autograd.grad(run.val(model), override["lr"])[0].item()


def torchopt(run: Run) -> float:
    import torchopt as library

    lr, given = run.lr(), run.settings
    if "momentum" in given:
        optimizer = library.MetaSGD(run.model, lr, momentum=given["momentum"])
    else:
        optimizer = library.MetaAdam(run.model, lr, given["betas"], given["eps"], eps_root=1e-30)
    for loss in run.train:
        optimizer.step(loss(run.model))
    return torch.autograd.grad(run.val(run.model), lr)[0].item()


def betty(run: Run) -> float:
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem, IterativeProblem

    steps, found = len(run.train), []

    class Outer(ImplicitProblem):
        def get_batch(self) -> None:
            return None

        def training_step(self, batch: None) -> torch.Tensor:
            return run.val(self.inner)

        def optimizer_step(self) -> None:
            found.append(self.module[0].grad.item())

    class Inner(IterativeProblem):
        def get_batch(self) -> int:
            return self.count - 1

        def on_inner_loop_start(self) -> None:
            self.optimizer.param_groups[0]["lr"] = self.outer.module[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fmodule(self.params, self.buffers, x)

        def training_step(self, batch: int) -> torch.Tensor:
            return run.train[batch](self)

    outer = Outer("outer", Config(first_order=False, retain_graph=True), nn.ParameterList([run.lr()]))
    inner = Inner("inner", Config(unroll_steps=steps, retain_graph=True), run.model, run.optimizer)
    Engine([outer, inner], EngineConfig(train_iters=steps), {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}).run()
    return found[0]


def hypertorch(folder: str) -> Method:
    def taken_out() -> dict[str, Any]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "hypergrad"}

    ours = taken_out()
    sys.path.insert(0, folder)
    library = importlib.import_module("hypergrad")
    sys.path.remove(folder)
    taken_out()
    sys.modules.update(ours)

    def theirs(run: Run) -> float:
        if "momentum" not in run.settings:
            raise NotImplementedError("it has gradient descent, heavy ball and momentum, no Adam")
        names, weights = zip(*run.model.named_parameters(), strict=True)

        def of_weights(loss: Loss) -> Callable[..., torch.Tensor]:
            # `reverse` hands over the momentum after the weights.
            return lambda state, _: loss(
                lambda x: functional_call(run.model, dict(zip(names, state, strict=False)), (x,)),
            )

        lr, momentum = run.lr(), run.settings["momentum"]
        steps = [library.Momentum(of_weights(loss), lambda hyper: hyper[0], momentum) for loss in run.train]
        history = [steps[0].get_opt_params(weights)]
        for step in steps:
            reached = step(history[-1], [lr], create_graph=False)
            history.append([t.detach().requires_grad_() for t in reached])
        return library.reverse(history, [lr], steps, of_weights(run.val), set_grad=False)[0].item()

    return theirs


def methods(hypertorch_at: str | None) -> dict[str, Method]:
    """Ours, and the libraries that are there; prints a line for each that is not."""
    found = {
        "Forward, exact": ours(Forward()),
        "Forward, difference": ours(Forward(curvature=FiniteDifference())),
        "Unrolled, exact": ours(Unrolled()),
    }
    for method, package in ((higher, "higher"), (torchopt, "torchopt"), (betty, "betty-ml")):
        if importlib.util.find_spec(method.__name__):
            found[f"{method.__name__} {importlib.metadata.version(package)}"] = method
        else:
            print(f"{method.__name__}: not installed, `pip install {package}`")
    if hypertorch_at:
        found["hypertorch"] = hypertorch(hypertorch_at)
    else:
        print("hypertorch: not installable beside hypergrad, pass a checkout of prolearner/hypertorch to --hypertorch")
    return found


def reference(make: Callable[[torch.dtype], Run]) -> tuple[float, float]:
    """d(validation loss)/d(lr) by central differences, and their relative disagreement at the chosen step."""

    def slope(h: float) -> float:
        above, below = make(torch.float64), make(torch.float64)
        above.settings["lr"] += h
        below.settings["lr"] -= h
        return (above.plain() - below.plain()) / (2 * h)

    best, doubt = float("nan"), float("inf")
    for relative in (1e-6, 1e-7, 1e-8):
        h = relative * make(torch.float64).settings["lr"]
        wide, narrow = slope(h), slope(h / 2)
        if abs(wide / narrow - 1) < doubt:
            best, doubt = (4 * narrow - wide) / 3, abs(wide / narrow - 1)
        if doubt < TOLERANCE / 100:
            break
    return best, doubt


def judge(
    method: Method, make: Callable[[torch.dtype], Run], truth: float, doubt: float, note: str = ""
) -> tuple[str, str, Method | None]:
    """Verdict, a note to it, and the method as it works, if it does."""

    def decomposed(run: Run) -> float:
        with sdpa_kernel(SDPBackend.MATH):
            return method(run)

    try:
        error = abs(method(make(torch.float32)) / truth - 1)
    except Exception as raised:  # whatever a library raises is its result
        message = f"{type(raised).__name__}: {raised}".splitlines()[0]
        if "is not implemented" in message and not note:  # fused attention has no second derivative: help
            return judge(decomposed, make, truth, doubt, f"under sdpa_kernel(SDPBackend.MATH); as it stands {message}")
        return "**failed**", message, None
    if doubt > TOLERANCE / 3:
        return f"no reference ({error:.1e})", note, method
    if error < TOLERANCE:
        return f"right ({error:.1e})", note, method
    exact = abs(method(make(torch.float64)) / truth - 1)
    return f"**{'nan' if math.isnan(error) else 'wrong'}** ({error:.1e}; in float64 {exact:.1e})", note, method


def stopwatch(method: Callable[[Run], object], run: Run) -> float:
    gc.collect()
    return seconds(lambda: method(run))


def measure(make: Callable[[torch.dtype], Run], known: dict[str, Method], rounds: int) -> list[tuple[str, str]]:
    """Cell and note of each method on one run."""
    truth, doubt = reference(make)
    judged = [judge(method, make, truth, doubt) for method in known.values()]
    working = [method for _, _, method in judged if method]
    timed = [Run.plain, *working]
    memory = [peak(functools.partial(method, make(torch.float32))) for method in timed]
    times = [[stopwatch(method, make(torch.float32)) for method in timed] for _ in range(rounds)]
    size = 4 * sum(p.numel() for p in make(torch.float32).model.parameters())
    figures = iter(
        f", {statistics.median(row[i] / row[0] for row in times):.1f}x, {(memory[i] - memory[0]) / size:.0f}"
        for i in range(1, len(memory))
    )
    return [(f"{text}{next(figures) if method else ''}{'*' if note else ''}", note) for text, note, method in judged]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--horizons", type=int, nargs="+", default=[5, 20, 100], help="inner steps K")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hypertorch", metavar="FOLDER", help="a checkout of prolearner/hypertorch")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # the libraries call what torch deprecates
    logging.disable(logging.INFO)
    torch.set_num_threads(arguments.threads)
    known = methods(arguments.hypertorch)
    print(
        f"{platform.machine()} CPU, {arguments.threads} threads; torch {torch.__version__}; {arguments.rounds} rounds"
    )
    print("Verdict (relative error), time over plain training, memory beyond it in copies of the parameters\n")
    print("| |" + "|".join(known) + "|\n|---|" + "---|" * len(known))
    notes: dict[str, None] = {}
    for steps in arguments.horizons:
        for task in arguments.models:
            for optimizer in arguments.optimizers:
                cells = measure(lambda dtype: start(task, optimizer, steps, dtype), known, arguments.rounds)  # noqa: B023
                print(f"|{task}, {optimizer}, K = {steps}|" + "|".join(cell for cell, _ in cells) + "|", flush=True)
                notes |= {f"* {name}: {note}": None for name, (_, note) in zip(known, cells, strict=True) if note}
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
