"""Learned weights find wrong labels: one hyperparameter per training example.

Handwritten digits, 1078 for training, 40% of whose labels are flipped to another class at random. Each example has a
weight in the training loss, 0.5 at first. Every five steps the weights move along the gradient of the loss on 100 clean
validation examples after these steps (data cleaning in Franceschi et al. 2017, "Forward and reverse gradient-based
hyperparameter optimization"; for batches Ren et al. 2018 and Shu et al. 2019). Weights that end below 0.5 are taken for
wrong labels. All is judged on 619 clean test examples that no gradient and no choice has seen. The 100 clean examples
are worth something without us, too: the table has training on them alone, and stopping by them early.
"""

import statistics
import sys

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from hypergrad import Hyperparameter, Unrolled, hypergradient, split

IMAGES, LABELS = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
IMAGES = IMAGES.float() / 16
HORIZON = 5


class Weighted(torch.nn.Module):
    def __init__(self, examples, labels):
        super().__init__()
        self.images, self.labels = IMAGES[examples], labels
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        self.weight = Hyperparameter(torch.full((len(examples),), 0.5), transform="logit")

    def training_loss(self):
        losses = cross_entropy(self.net(self.images), self.labels, reduction="none")
        return (self.weight() * losses).mean() / 0.5  # at equal weights the plain mean

    def loss(self, examples):
        return cross_entropy(self.net(IMAGES[examples]), LABELS[examples])

    @torch.no_grad()
    def accuracy(self, examples):
        return (self.net(IMAGES[examples]).argmax(1) == LABELS[examples]).float().mean().item()


def fit(model, val, test, rounds, learn=False):
    """Train; returns the test accuracy at the end and where the validation accuracy was best."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # the weights are not among the parameters
    history = []
    for _ in range(rounds):
        if learn:
            losses = [lambda model: model.training_loss()] * HORIZON
            found = hypergradient(model, optimizer, losses, lambda model: model.loss(val), [model.weight], Unrolled())
            slope = found.grads["weight"]
            model.weight.move(-0.1 * slope / slope.abs().mean())  # in the logit: weights stay between 0 and 1
        for _ in range(HORIZON):
            optimizer.zero_grad()
            model.training_loss().backward()
            optimizer.step()
        history.append((model.accuracy(val), model.accuracy(test)))
    return history[-1][1], max(history, key=lambda accuracies: accuracies[0])[1]


def run(seed, rounds):
    torch.manual_seed(seed)
    n = len(LABELS)
    parts = split(range(n), (0.6, 100 / n, 0.4 - 100 / n), stratify=LABELS, seed=seed)
    train, val, test = (torch.tensor(part.indices) for part in parts)
    flipped = torch.zeros(len(train), dtype=torch.bool)
    flipped[torch.randperm(len(train))[: round(0.4 * len(train))]] = True
    noisy = torch.where(flipped, (LABELS[train] + torch.randint(1, 10, train.shape)) % 10, LABELS[train])
    model = Weighted(train, noisy)
    learned, _ = fit(model, val, test, rounds, learn=True)
    found = model.weight.value < 0.5
    cleaned = Weighted(train[~found], noisy[~found])
    at_end, stopped = fit(Weighted(train, noisy), val, test, rounds)
    return {
        "recall: flipped labels found": (found & flipped).sum().item() / flipped.sum().item(),
        "precision: found labels flipped": (found & flipped).sum().item() / max(1, found.sum().item()),
        "test accuracy, learned weights": learned,
        "test accuracy, without found ones": fit(cleaned, val, test, rounds)[0],
        "test accuracy, noisy labels": at_end,
        "test accuracy, stopped early": stopped,
        "test accuracy, 100 clean only": fit(Weighted(val, LABELS[val]), val, test, rounds)[0],
        "test accuracy, all labels clean": fit(Weighted(train, LABELS[train]), val, test, rounds)[0],
    }


def main(seeds, rounds):
    results = [run(seed, rounds) for seed in seeds]
    print(f"{'':35}{'mean':>7}   seeds {', '.join(map(str, seeds))}")
    for name in results[0]:
        values = [result[name] for result in results]
        print(f"{name:35}{statistics.fmean(values):7.1%}   {'  '.join(f'{value:.1%}' for value in values)}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # more do not help a network of this size
    main(seeds=[0], rounds=30) if "--quick" in sys.argv else main(seeds=[0, 1, 2], rounds=100)
