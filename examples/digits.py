"""Train once, come out tuned: handwritten digits, from a hopeless learning rate and from a good one.

Plain training, the same with one callback, and a random search, judged on test data that nothing ever saw.
"""

import logging
import statistics
import time
import warnings
from operator import itemgetter

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hypergrad import split
from hypergrad.callbacks import HyperGradient

EPOCHS, BATCH, TRIALS, SPLITS, ROOT = 60, 64, 12, 4, "runs/digits"
COLUMNS = "test_loss", "test_accuracy", "gradients", "seconds"
QUIET = {"devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Digits(L.LightningModule):
    """An ordinary module: it knows nothing of hypergrad."""

    def __init__(self, lr, weight_decay):
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, stage="val"):
        logits = self.net(batch[0])
        self.log(f"{stage}_loss", cross_entropy(logits, batch[1]))
        self.log(f"{stage}_accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx, stage="test")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


def load(seed=0):
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    return split(dataset, (0.6, 0.1, 0.1, 0.2), stratify=labels, seed=seed)  # train, hyper-validation, validation, test


def run(name, data, lr, weight_decay, *callbacks):
    train, _, val, test = data
    L.seed_everything(0, verbose=False)
    logger = TensorBoardLogger(ROOT, name=name, version="", default_hp_metric=False)
    trainer = L.Trainer(max_epochs=EPOCHS, logger=logger, callbacks=[*callbacks], log_every_n_steps=10, **QUIET)
    began = time.perf_counter()
    trainer.fit(Digits(lr, weight_decay), DataLoader(train, BATCH, shuffle=True), DataLoader(val, len(val)))
    row = {"seconds": time.perf_counter() - began, "val_loss": trainer.callback_metrics["val_loss"].item()}
    metrics = trainer.test(trainer.lightning_module, DataLoader(test, len(test)), verbose=False)[0]
    logger.log_hyperparams({"lr": lr, "weight_decay": weight_decay, "tuned": "yes" if callbacks else "no"}, metrics)
    logger.finalize("success")
    return {"name": name, "gradients": trainer.global_step * (callbacks[0].cost if callbacks else 1), **row, **metrics}


def one_split(seed):
    """One row per method, all on the same split of the data."""
    data, rows, trials, name = load(seed), [], [], f"split-{seed}"
    for lr in (1e-5, 1e-3):
        rows.append(run(f"{name}/plain-lr-{lr:g}", data, lr, 0.01))
        tuner = HyperGradient(val_dataloaders=DataLoader(data[1], BATCH), budget=1.1)  # gradients, over plain ones
        rows.append(run(f"{name}/tuned-from-lr-{lr:g}", data, lr, 0.01, tuner))
    for i, drawn in enumerate(10.0 ** (-5 * torch.rand(TRIALS, 2, generator=torch.Generator().manual_seed(seed)))):
        trials.append(run(f"{name}/search-{i:02}", data, *drawn.tolist()))
    total = {key: sum(t[key] for t in trials) for key in ("gradients", "seconds")}
    for title, key in ("chosen by validation", "val_loss"), ("its best trial on the test data", "test_loss"):
        rows.append({**min(trials, key=itemgetter(key)), **total, "name": f"search: {title}"})
    return rows


def main():
    torch.set_flush_denormal(True)  # Adam's averages for units that have died are subnormal, and slow, numbers
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    splits = [one_split(seed) for seed in range(SPLITS)]
    print("{:40} {:>10} {:>14} {:>10} {:>8}".format("mean over splits", *COLUMNS))
    for rows in zip(*splits, strict=True):
        means = [statistics.mean(row[column] for row in rows) for column in COLUMNS]
        print("{:40} {:10.4f} {:14.1%} {:10.0f} {:8.1f}".format(rows[0]["name"].rpartition("/")[2], *means))
    print(f"\nLook at it:  .venv/bin/tensorboard --logdir {ROOT}")


if __name__ == "__main__":
    main()
