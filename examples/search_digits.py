"""Search what has no gradient around trainings that tune themselves: handwritten digits.

Width, depth, batch size and optimizer are searched by random sampling and successive halving; learning rate and weight
decay are learned by gradient inside every trial. Kill it at any time and start it again: it goes on where it was.
"""

import logging
from collections import Counter
from itertools import pairwise

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score

from hypergrad import split
from hypergrad.callbacks import EarlyStopping, HyperGradient
from hypergrad.search import Categorical, Float, Int, Space, Study

TRIALS, WORKERS, EPOCHS, FOLDER = 16, 2, 27, "runs/search_digits"
SPACE = Space(
    {
        "width": Int(16, 256, log=True),
        "depth": Int(1, 3),
        "batch_size": Categorical([32, 64, 128]),
        "optimizer": Categorical(["sgd", "adamw"]),
        "momentum": Float(0.5, 0.95, when={"optimizer": "sgd"}),
        "lr": 0.003,  # where every trial starts
    },
    constraints=["width * depth <= 512"],
)


class Net(L.LightningModule):
    def __init__(self, params):
        super().__init__()
        self.save_hyperparameters()
        sizes = [64] + [params["width"]] * params["depth"]
        layers = [(torch.nn.Linear(a, b), torch.nn.ReLU()) for a, b in pairwise(sizes)]
        self.net = torch.nn.Sequential(*(part for layer in layers for part in layer), torch.nn.Linear(sizes[-1], 10))
        self.params, self.f1 = params, MulticlassF1Score(10)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, stage="val"):
        logits = self.net(batch[0])
        self.f1(logits, batch[1])
        self.log(f"{stage}_loss", cross_entropy(logits, batch[1]))
        self.log(f"{stage}_f1", self.f1)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx, stage="test")

    def configure_optimizers(self):
        if self.params["optimizer"] == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.params["lr"], momentum=self.params["momentum"])
        return torch.optim.AdamW(self.parameters(), lr=self.params["lr"])


def load():
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    return split(dataset, (0.6, 0.1, 0.1, 0.2), stratify=labels)  # train, hyper-validation, validation, test


def train(trial):
    train, hyper, val, test = load()
    tuner = HyperGradient(val_dataloaders=DataLoader(hyper, 64))
    stopping = EarlyStopping(restore_best_weights=True)
    trainer = trial.trainer(max_epochs=EPOCHS, callbacks=[tuner, stopping])
    module = Net(dict(trial.params))
    loader = DataLoader(train, trial.params["batch_size"], shuffle=True)
    trainer.fit(module, loader, DataLoader(val, len(val)), ckpt_path=trial.checkpoint)
    if trial.stopped is None:
        trial.record(learned_lr=tuner.hyperparameters["lr"])
        trainer.test(module, DataLoader(test, len(test)), verbose=False)  # recorded, and nobody chooses by it
    return stopping.best_score


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    study = Study(
        FOLDER, space=SPACE, sampler="random", pruner=("asha", {"min_resource": 3, "reduction_factor": 3}), seed=0
    )
    print(study.space)
    study.run(train, TRIALS, workers=WORKERS, retries=1)
    print(Counter(trial.state for trial in study.trials))
    best = study.best
    print(f"best: trial {best.number}, val_loss {best.value:.4f}, test_f1 {best.metrics['test_f1']:.4f}, {best.params}")
    print(f"Look at it:  tensorboard --logdir {FOLDER}")


if __name__ == "__main__":
    main()
