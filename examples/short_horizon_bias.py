"""Short-horizon bias: why a learning rate must not be judged by the next step.

The noisy quadratic of Wu et al. 2018, "Understanding short-horizon bias in stochastic meta-optimization": half the sum
of h (theta - c)^2, with curvatures h from 1 down to 0.01 and targets c ~ N(0, 1/h) drawn anew in every step. Every K
steps the learning rate is set to what is best K steps later, by hypergradients. With K = 1 it collapses: a low rate
silences the noise of the steep directions at once, and gives up the flat ones, which pay off later. With K = all steps
it is one constant for the whole run, and still ends lower than a rate that is free in every step. Lower again ends a
rate that is free now and then, and sees far. Losses are exact expectations given theta, 64 independent runs share each
rate; seeds 0, 1 and 2, none chosen.
"""

import math
import statistics
import sys

import torch
from torch.utils.tensorboard import SummaryWriter

from hypergrad import Descent, Forward, Online, Reading, hypergradient

ROOT = "runs/short_horizon_bias"
RUNS, DIMENSIONS = 64, 100
CURVATURE = torch.logspace(0, -2, DIMENSIONS)
SPREAD = CURVATURE.rsqrt()  # of targets and of starts: every direction has the same share in the loss


def draw():
    """A training loss with noise of its own: what the look-ahead sees is not what the run will meet."""
    targets = SPREAD * torch.randn(RUNS, DIMENSIONS)
    return lambda model: 0.5 * (CURVATURE * (model.theta - targets).square()).sum()  # to each run its own gradient


def expected_loss(model):
    """Above the noise floor, which no learning rate changes; the mean over the runs."""
    return 0.5 * (CURVATURE * model.theta.square()).sum() / RUNS


def train(seed, steps, lr, horizon=None):
    """One run; with a horizon its learning rate is learned before every `horizon` steps. Returns losses and rates."""
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.theta = torch.nn.Parameter(SPREAD * torch.randn(RUNS, DIMENSIONS))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    controller, losses, rates = Descent(rate=0.5), [], []
    for step in range(steps):
        if horizon and step % horizon == 0:
            for _ in range(5 if step else 12):
                future = [draw() for _ in range(horizon)]
                estimator = Online() if horizon == 1 else Forward()
                found = hypergradient(model, optimizer, future, expected_loss, ("lr",), estimator)
                reading = Reading("lr", slope=lr * found.grads["lr"].item(), cosine=found.cosines["lr"].item())
                lr *= math.exp(controller.moves([reading])[0])  # moves are made in log lr
                optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        draw()(model).backward()
        optimizer.step()
        losses.append(expected_loss(model).item())
        rates.append(lr)
    return losses, rates


def plot(curves):
    """Into TensorBoard, and as a picture where matplotlib is installed."""
    for name, run in curves.items():
        with SummaryWriter(f"{ROOT}/{name}") as writer:
            for step, (loss, lr) in enumerate(zip(*run, strict=True)):
                writer.add_scalar("expected_loss", loss, step)
                writer.add_scalar("lr", lr, step)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, 2)):
        for name, run in curves.items():
            axes.semilogy(run[i], label=name)
        axes.set(title=("expected loss", "learning rate")[i], xlabel="step")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(f"{ROOT}/curves.png", dpi=150)


def main(steps, seeds, horizons):
    learned = {f"horizon {horizon}": (0.1, horizon) for horizon in horizons}
    constant = {f"constant {lr:.3g}": (lr,) for lr in torch.logspace(-2, 0.2, 23).tolist()}
    settings = {**learned, **constant}
    curves = {name: [train(seed, steps, *setting) for seed in seeds] for name, setting in settings.items()}
    final = {name: [losses[-1] for losses, _ in runs] for name, runs in curves.items()}
    shown = [*learned, min(constant, key=lambda name: sum(final[name]))]
    print(f"{'':16} {'first lr':>9} {'last lr':>9} {'final loss':>11} {'over seeds':>17}")
    for name in shown:
        first, last = (statistics.fmean(rates[i] for _, rates in curves[name]) for i in (0, -1))
        mean, low, high = statistics.fmean(final[name]), min(final[name]), max(final[name])
        print(f"{name:16} {first:9.3f} {last:9.3f} {mean:11.3f} {low:8.3f} ..{high:6.3f}")
    plot({name: curves[name][0] for name in shown})
    print(f"\nThe last line is the best of {len(constant)} constants, all tried. Curves of the first seed: {ROOT}")


if __name__ == "__main__":
    main(40, [0], [1, 40]) if "--quick" in sys.argv else main(150, [0, 1, 2], [1, 10, 50, 150])
