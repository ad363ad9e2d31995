"""How good one tuned run is against a 12-trial random search: digits, several splits, two optimizers.

For each seed there is a split of its own, one search over learning rate and weight decay, and one tuned run from each
start. Figures are test losses; the search is credited with its best trial on the test data, which no real search
could pick. Run: `.venv/bin/python examples/benchmarks/quality.py` (about 15 minutes on 2 cores).
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from hypergrad import split
from hypergrad.callbacks import HyperGradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import BATCH, Digits

STARTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class WithSGD(Digits):
    """The same network with momentum, as many users train."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)


def run(kind: type[Digits], data: list[Any], lr: float, decay: float, epochs: int, seed: int, tuned: bool) -> Any:
    """(validation loss, test loss) of one training."""
    train, hyper, val, test = data
    L.seed_everything(seed, verbose=False)
    module = kind(lr, decay)
    callbacks = [HyperGradient(val_dataloaders=DataLoader(hyper, BATCH))] if tuned else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=False, **quiet)
    trainer.fit(module, DataLoader(train, BATCH, shuffle=True), DataLoader(val, len(val)))
    val_loss = trainer.callback_metrics["val_loss"].item()
    return val_loss, trainer.test(module, DataLoader(test, len(test)), verbose=False)[0]["test_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=300, help="seeds below 300 served to choose the controller")
    parser.add_argument("--optimizer", choices=("AdamW", "SGD"), help="only this one")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--trials", type=int, default=12)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    both = {"AdamW": (Digits, 1e-2), "SGD": (WithSGD, 0.0)}
    for name in [arguments.optimizer] if arguments.optimizer else both:
        kind, decay = both[name]
        rows: dict[str, list[float]] = {}
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            data = split(dataset, (0.6, 0.1, 0.1, 0.2), stratify=labels, seed=seed)
            draw = torch.Generator().manual_seed(seed)
            low = 1e-5 if kind is Digits else 1e-6  # coupled decay acts at smaller values
            trials = []
            for _ in range(arguments.trials):
                u, v = torch.rand(2, generator=draw).tolist()
                pair = math.exp(math.log(1e-5) * (1 - u)), low * math.exp(math.log(1e5) * v)
                trials.append(run(kind, data, *pair, arguments.epochs, seed, tuned=False))
            rows.setdefault("search, chosen by validation", []).append(min(trials)[1])
            best = min(test for _, test in trials)
            rows.setdefault("search, best on test", []).append(best)
            for lr in STARTS:
                for tuned in (False, True):
                    row = f"{'tuned from' if tuned else 'plain at'} lr {lr:g}"
                    rows.setdefault(row, []).append(run(kind, data, lr, decay, arguments.epochs, seed, tuned)[1])
        print(f"{name}: test loss by seed, mean, and geometric mean of the ratio to the search's best on test")
        best_by_seed = rows["search, best on test"]
        for row, values in rows.items():
            ratio = math.exp(statistics.mean(math.log(v / b) for v, b in zip(values, best_by_seed, strict=True)))
            print(f"  {row:30}" + "".join(f"{v:8.4f}" for v in values), f"{statistics.mean(values):9.4f}{ratio:7.2f}x")


if __name__ == "__main__":
    main()
