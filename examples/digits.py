"""Train once, come out tuned: handwritten digits, from a hopeless learning rate and from a good one.

Compares plain training, the same training with one callback, and a random search over learning rate and weight decay.
Every number in the table is taken on test data that no gradient, no search and no choice ever saw.
"""

import logging
import math
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

EPOCHS, BATCH, TRIALS, ROOT = 60, 64, 12, "runs/digits"
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


def load():
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    return split(dataset, (0.6, 0.1, 0.1, 0.2), stratify=labels)  # train, hyper-validation, validation, test


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


def show(row):
    print("{name:34} {test_loss:10.4f} {test_accuracy:10.1%} {gradients:10} {seconds:9.1f}".format(**row), flush=True)


def main():
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = load()
    print(f"{'':34} {'test loss':>10} {'accuracy':>10} {'gradients':>10} {'seconds':>9}")
    for lr in (1e-5, 1e-3):
        show(run(f"plain-lr-{lr:g}", data, lr, 0.01))
        callback = HyperGradient(val_dataloaders=DataLoader(data[1], BATCH))
        show(run(f"tuned-from-lr-{lr:g}", data, lr, 0.01, callback))
    draw = torch.Generator().manual_seed(0)
    trials = []
    for i in range(TRIALS):
        lr, decay = (math.exp(math.log(1e-5) * (1 - u)) for u in torch.rand(2, generator=draw).tolist())
        trials.append(run(f"search-{i:02}", data, lr, decay))
    total = {key: sum(t[key] for t in trials) for key in ("gradients", "seconds")}
    chosen = min(trials, key=lambda t: t["val_loss"])
    show({**chosen, **total, "name": f"random search, {TRIALS} trials, chosen"})
    show({**min(trials, key=lambda t: t["test_loss"]), **total, "name": "  its best trial on the test data"})
    print(f"\nLook at it:  .venv/bin/tensorboard --logdir {ROOT}")


if __name__ == "__main__":
    main()
