"""Learn a learning rate schedule: gradients of whole runs with respect to the knots of a curve, over repeated runs.

Handwritten digits, an MLP under SGD with momentum. Each round trains once under the present schedule; `Unrolled` gives
d(validation loss)/d(each knot) of that whole run (`Forward` would too, in constant memory), and the knots move by a
bounded step in log lr. Peaks of a constant and of a cosine get as many runs to be chosen with. The last table judges on
test data, and on other initial weights and batches than those of the search.
"""

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from hypergrad import Schedule, Unrolled, hypergradient, split

STEPS, BATCH = 200, 64


def load():
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    parts = split(dataset, (0.6, 0.2, 0.2), stratify=labels)
    return [tuple(t[part.indices] for t in dataset.tensors) for part in parts]  # train, validation, test


def start(seed, data):
    """A fresh model and its batches, both from a seed."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10)]
    x, y = data
    losses = []
    for _ in range(STEPS):
        rows = torch.randint(0, len(x), (BATCH,))
        losses.append(lambda model, rows=rows: cross_entropy(model(x[rows]), y[rows]))
    return torch.nn.Sequential(*layers), losses


def train(schedule, seed, train_data, judge_data):
    """An ordinary training loop under a schedule; the loss on other data at its end."""
    model, losses = start(seed, train_data)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, loss in enumerate(losses):
        schedule.write(sgd, step)
        sgd.zero_grad()
        loss(model).backward()
        sgd.step()
    with torch.no_grad():
        return cross_entropy(model(judge_data[0]), judge_data[1]).item()


def learn(schedule, rounds, data):
    """Moves each knot by at most `rate` a round, along the sign of its hypergradient; the rate falls to 0."""
    train_data, validation, _ = data
    for i in range(rounds):
        model, losses = start(i % 4, train_data)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        val_loss = lambda m: cross_entropy(m(validation[0]), validation[1])  # noqa: E731
        result = hypergradient(model, sgd, losses, val_loss, [schedule], Unrolled())
        slope = result.slopes["lr"]  # d(loss)/d(log lr) at each knot
        schedule = schedule.moved(-0.5 * (1 - i / rounds) * slope / slope.abs().max().clamp(min=1e-12))
        knots = "  ".join(f"{value:8.4f}" for value in schedule.values)
        print(f"{i:5} {result.value:12.4f}   {knots}   {result.status}", flush=True)
    return schedule


def constant(lr):
    return Schedule("lr", {0: lr, STEPS - 1: lr})


def cosine(lr):
    shape = {step: 0.501 + 0.499 * math.cos(math.pi * step / STEPS) for step in range(0, STEPS, 10)}
    return Schedule("lr", {step: lr * factor for step, factor in shape.items()})


def main(rounds, seeds):
    data = load()
    peaks = [10 ** (-3 + 3 * i / max(rounds - 1, 1)) for i in range(rounds)]
    best = {f: min(peaks, key=lambda lr, f=f: train(f(lr), 0, data[0], data[1])) for f in (constant, cosine)}
    first = Schedule("lr", {0: 0.01, STEPS // 3: 0.01, 2 * STEPS // 3: 0.01, STEPS - 1: 0.01})
    print(f"round  validation   lr at step {', '.join(map(str, first.knots))}")
    learned = learn(first, rounds, data)
    print(f"\nTest loss, mean of {seeds} runs from other initial weights and batches")
    for name, schedule in (
        ("constant 0.01, the start", first),
        *((f"best {f.__name__}, {lr:.3g}", f(lr)) for f, lr in best.items()),
        ("learned", learned),
    ):
        losses = [train(schedule, 100 + seed, data[0], data[2]) for seed in range(seeds)]
        print(f"{name:26} {sum(losses) / seeds:8.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few rounds")
    quick = parser.parse_args().quick
    main(4 if quick else 24, 2 if quick else 8)
