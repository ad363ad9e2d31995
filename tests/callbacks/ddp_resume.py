"""Two ranks that go on from a checkpoint: `python -m tests.callbacks.ddp_resume <folder>`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, DistributedSampler

from hypergrad import Descent
from hypergrad.callbacks import HyperGradient
from tests.callbacks.ddp_script import ESTIMATORS, RANK, Doubles, held_out, made, whole
from tests.callbacks.modules import data, trainer

CHECKPOINT = Path(sys.argv[1]) / "one.ckpt"


class Save(pl.Callback):
    """A checkpoint at the end of one epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(CHECKPOINT)


def run(make: Callable[[Doubles], HyperGradient], *callbacks: pl.Callback, **options: Any) -> Any:
    """What an eight-epoch fit of 32 steps ends with."""
    module = made(Doubles)
    callback = make(module)
    settings = {"devices": 2, "strategy": "ddp", "max_epochs": 8, "use_distributed_sampler": False}
    fitted = trainer(sys.argv[1], callbacks=[callback, *callbacks], **settings)
    train = data(64).dataset
    shard = DistributedSampler(train, 2, RANK, shuffle=False)
    fitted.fit(module, DataLoader(train, 8, sampler=shard), data(seed=1), **options)
    return {
        "weights": [p.sum().item() for p in module.state_dict().values()],
        "hypergradients": [u.hypergradients for u in callback.history],
        "values": callback.hyperparameters,
        "race": callback.race,
        "ended_with": str(callback.ended_with),
    }


def estimator(name: str) -> Callable[[Doubles], HyperGradient]:
    chosen, names, in_loss = ESTIMATORS[name]
    options = {"estimator": chosen, "controller": Descent(), "every_n_steps": 2, "val_dataloaders": held_out(2)}
    return lambda module: HyperGradient((*names, *([module.l2] if in_loss else [])), **options)


def main() -> None:
    # Unrolled looks back at batches of each rank, and a checkpoint is written by the first.
    makes = {name: estimator(name) for name in ESTIMATORS if name != "Unrolled"}
    cases = [(name, make, 8) for name, make in makes.items()]
    cases += [(f"whole, {step}", lambda _: whole(2), step) for step in (4, 8, 12)]  # the race ends at step 9
    found = {}
    for name, make, step in cases:
        expected = run(make)
        assert run(make, Save(step)) == expected, name
        found[name] = [run(make, ckpt_path=CHECKPOINT), expected]
    Path(f"{sys.argv[1]}/{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
