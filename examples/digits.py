"""Train once, come out tuned: handwritten digits, from a hopeless learning rate and from a good one.

Compares plain training, the same training with one callback, and a random search over learning rate and weight decay.
Every number is taken on test data that no gradient, no search and no choice ever saw, and is the mean over three
splits of the data: on one, the luck of 360 test images moves a loss by a tenth.
"""

import logging
import math
import statistics
import time
import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hypergrad import split
from hypergrad.callbacks import HyperGradient

EPOCHS, BATCH, TRIALS, SPLITS, ROOT = 60, 64, 12, 3, "runs/digits"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Digits(L.LightningModule):
    """An ordinary module: it knows nothing of hypergrad."""

    def __init__(self, lr, weight_decay):
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        layers = [torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(128, 10))

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


def run(name, data, lr, weight_decay, callback=None):
    train, _, val, test = data
    L.seed_everything(0, verbose=False)
    logger = TensorBoardLogger(ROOT, name=name, version="", default_hp_metric=False)
    options = {"max_epochs": EPOCHS, "devices": 1, "logger": logger, "log_every_n_steps": 10, **QUIET}
    trainer = L.Trainer(callbacks=[callback] if callback else [], **options)
    began = time.perf_counter()
    trainer.fit(Digits(lr, weight_decay), DataLoader(train, BATCH, shuffle=True), DataLoader(val, len(val)))
    seconds = time.perf_counter() - began
    val_loss = trainer.callback_metrics["val_loss"].item()
    metrics = trainer.test(trainer.lightning_module, DataLoader(test, len(test)), verbose=False)[0]
    logger.log_hyperparams({"lr": lr, "weight_decay": weight_decay, "tuned": "yes" if callback else "no"}, metrics)
    logger.finalize("success")
    spent = round(trainer.global_step * (callback.cost if callback else 1))
    return {"name": name, "val_loss": val_loss, "gradients": spent, "seconds": seconds, **metrics}


def one_split(seed):
    """One row per method, all on the same split of the data."""
    data, rows = load(seed), []
    for lr in (1e-5, 1e-3):
        rows.append(run(f"split-{seed}/plain-lr-{lr:g}", data, lr, 0.01))
        callback = HyperGradient(val_dataloaders=DataLoader(data[1], BATCH))
        rows.append(run(f"split-{seed}/tuned-from-lr-{lr:g}", data, lr, 0.01, callback))
    draw, trials = torch.Generator().manual_seed(seed), []
    for i in range(TRIALS):
        lr, decay = (math.exp(math.log(1e-5) * (1 - u)) for u in torch.rand(2, generator=draw).tolist())
        trials.append(run(f"split-{seed}/search-{i:02}", data, lr, decay))
    total = {key: sum(t[key] for t in trials) for key in ("gradients", "seconds")}
    chosen, best = (min(trials, key=lambda t, by=by: t[by]) for by in ("val_loss", "test_loss"))
    rows.append({**chosen, **total, "name": f"random search, {TRIALS} trials, chosen"})
    return [*rows, {**best, **total, "name": "  its best trial on the test data"}]


def show(rows):
    """The mean over splits."""
    name = rows[0]["name"].rpartition("/")[2]
    means = (
        statistics.mean(row[key] for row in rows) for key in ("test_loss", "test_accuracy", "gradients", "seconds")
    )
    print("{:34} {:10.4f} {:10.1%} {:10.0f} {:9.1f}".format(name, *means))


def main():
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    splits = []
    for seed in range(SPLITS):
        splits.append(one_split(seed))
        print(f"split {seed + 1} of {SPLITS} done", flush=True)
    print(f"{'mean over splits':34} {'test loss':>10} {'accuracy':>10} {'gradients':>10} {'seconds':>9}")
    for rows in zip(*splits, strict=True):
        show(rows)
    print(f"\nLook at it:  .venv/bin/tensorboard --logdir {ROOT}")


if __name__ == "__main__":
    main()
