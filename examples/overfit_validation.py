"""One penalty per weight overfits the validation set: more hyperparameters than data are no free lunch.

Handwritten digits, 50 training and 50 validation examples, and an L2 penalty of its own for each of the 167,178 weights
of a network, as in Lorraine et al. 2020, "Optimizing millions of hyperparameters by implicit differentiation". The
hypergradient of them all comes from one implicit differentiation, at a price that does not depend on their number.
The validation set gets fitted like a second training set: its loss goes to nearly 0, and says nothing any more about
the 1697 test examples, which no gradient and no choice has seen. For comparison: plain training on all 100 examples.
"""

import statistics
import sys
import time

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from hypergrad import Hyperparameter, Implicit, Neumann, hypergradient, split

IMAGES, LABELS = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
IMAGES = IMAGES.float() / 16


class Penalised(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(256, 10))
        self.l2 = Hyperparameter(torch.full_like(parameters_to_vector(self.net.parameters()), 1e-3))

    def loss(self, examples):
        return cross_entropy(self.net(IMAGES[examples]), LABELS[examples])

    def training_loss(self, examples):
        weights = parameters_to_vector(self.net.parameters())
        return self.loss(examples) + 0.5 * (self.l2() * weights.square()).sum()


def train(model, optimizer, examples, steps):
    """Plain training on all examples at once. Returns the seconds of each gradient."""
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        model.training_loss(examples).backward()
        seconds.append(time.perf_counter() - began)
        optimizer.step()
    return seconds


@torch.no_grad()
def measure(model, val, test):
    accuracy = [(model.net(IMAGES[part]).argmax(1) == LABELS[part]).float().mean().item() for part in (val, test)]
    return model.loss(val).item(), accuracy[0], model.loss(test).item(), accuracy[1]


def run(seed, updates):
    """What is measured before, after, and with plain training on everything; the price of a hypergradient."""
    torch.manual_seed(seed)
    n = len(LABELS)
    parts = split(range(n), (50 / n, 50 / n, (n - 100) / n), stratify=LABELS, seed=seed)
    train_set, val, test = (torch.tensor(part.indices) for part in parts)
    model, plain = Penalised(), Penalised()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # the penalties are not among the parameters
    gradients = train(model, optimizer, train_set, steps=500)
    before, hypergradients = measure(model, val, test), []
    for _ in range(updates):
        began = time.perf_counter()
        found = hypergradient(
            model,
            optimizer,
            train_losses=[lambda model: model.training_loss(train_set)],
            val_loss=lambda model: model.loss(val),
            hyperparameters=[model.l2],
            estimator=Implicit(solver=Neumann(terms=10)),
        )
        hypergradients.append(time.perf_counter() - began)
        model.l2.move(-0.1 * found.grads["l2"].sign())  # by 10% each: moves are made in the logarithm
        train(model, optimizer, train_set, steps=10)
    train(plain, torch.optim.Adam(plain.parameters(), lr=1e-3), torch.cat([train_set, val]), steps=500)
    price = statistics.median(hypergradients) / statistics.median(gradients)
    return before, measure(model, val, test), measure(plain, val, test), price


def main(seeds, updates):
    *rows, prices = zip(*(run(seed, updates) for seed in seeds), strict=True)
    print(f"{'':28} {'val loss':>9} {'val accuracy':>13} {'test loss':>10} {'test accuracy':>14}")
    for name, row in zip(("equal penalties", "learned penalties", "plain, on train + validation"), rows, strict=True):
        val_loss, val_accuracy, test_loss, test_accuracy = map(statistics.fmean, zip(*row, strict=True))
        print(f"{name:28} {val_loss:9.4f} {val_accuracy:13.1%} {test_loss:10.4f} {test_accuracy:14.1%}")
    print(f"\nMeans over seeds {seeds}. One hypergradient of {Penalised().l2.value.numel():,} hyperparameters")
    print(f"takes the time of {statistics.fmean(prices):.0f} training gradients.")


if __name__ == "__main__":
    torch.set_num_threads(1)  # more do not help a network of this size
    main(seeds=[0], updates=20) if "--quick" in sys.argv else main(seeds=[0, 1, 2], updates=60)
