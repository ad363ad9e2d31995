"""What two ranks and one process run alike: `python -m tests.callbacks.ddp_script <devices> <folder>`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset

from hypergrad import (
    Cosine,
    Descent,
    Estimator,
    FiniteDifference,
    Forward,
    Frozen,
    Hold,
    Hyperparameter,
    Implicit,
    Neumann,
    Online,
    Race,
    Readout,
    Rewind,
    Timescale,
    Unrolled,
)
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer

RANK = int(os.environ.get("LOCAL_RANK", 0))
ESTIMATORS: dict[str, tuple[Estimator, tuple[str, ...], bool]] = {
    "Online": (Online(), ("lr", "weight_decay"), False),
    "Online, in the loss": (Online(), ("lr",), True),
    "Forward, exact": (Forward(), ("lr", "weight_decay"), True),
    "Forward, difference": (Forward(curvature=FiniteDifference()), ("lr",), False),
    "Unrolled": (Unrolled(3), ("lr",), True),
    "Implicit": (Implicit(Neumann(3), damping=1.0), (), True),
}
OPTIONS: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}


class Doubles(Net):
    """A learned penalty, in float64."""

    def __init__(self) -> None:
        super().__init__(lr=0.01)
        self.l2 = Hyperparameter(torch.tensor(1e-2, dtype=torch.float64))

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss((batch[0].double(), batch[1]))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        penalty: torch.Tensor = self.l2() * sum(p.square().sum() for p in self.net.parameters())
        return self.loss(batch) + penalty


class Normalized(Doubles):
    """Statistics and masks of each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, torch.nn.BatchNorm1d(self.net[0].out_features))
        self.net.append(torch.nn.Dropout(0.2))


def made(kind: type[Doubles]) -> Doubles:
    """The same weights at every call."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    module = kind().double()
    torch.set_default_dtype(torch.float32)
    return module


def fit(devices: int, module: Doubles, callback: HyperGradient | None, epochs: int = 2, **options: Any) -> Any:
    """On `devices` ranks; the union of their batches is one process's batch."""
    if devices > 1:
        options["strategy"] = "ddp"
    callbacks = [] if callback is None else [callback]
    settings = {"devices": devices, "max_epochs": epochs, "use_distributed_sampler": False, **options}
    fitted = trainer(sys.argv[2], callbacks=callbacks, **settings)
    train = data(64).dataset
    shard = DistributedSampler(train, devices, RANK, shuffle=False)
    torch.manual_seed(1 + RANK)  # masks
    fitted.fit(module, DataLoader(train, 16 // devices, sampler=shard), data(seed=1))
    return [p.sum().item() for p in module.state_dict().values()]


def held_out(devices: int) -> DataLoader[Any]:
    """One batch, of which each rank has its own part."""
    whole = data(32, 32, seed=2).dataset
    return DataLoader(Subset(whole, range(RANK, 32, devices)), batch_size=32 // devices)


def whole(devices: int) -> HyperGradient:
    """All that the default does, in 32 steps."""
    return HyperGradient(
        val_dataloaders=held_out(devices),
        race=Race(rates=(1e-3, 0.1, 100.0), rungs=((0.1, 2), (0.3, 1)), forks=(0.5,), least=1),
        controller=Frozen(Descent()),
        shape=Cosine(),
        readout=Readout(checkpoints=4, batches=1),
        rewind=Rewind(),
        timescale=Timescale(),
        every_n_steps=3,
    )


def main(devices: int) -> None:
    found: dict[str, Any] = {}
    for name, (estimator, names, in_loss) in ESTIMATORS.items():
        module = made(Doubles)
        learned = (*names, *([module.l2] if in_loss else []))
        settings = {"estimator": estimator, "controller": Descent(), "every_n_steps": 2}
        callback = HyperGradient(learned, val_dataloaders=held_out(devices), **settings)
        weights = fit(devices, module, callback, **OPTIONS)
        found[name] = {
            "weights": weights,
            "hypergradients": [u.hypergradients for u in callback.history],
            "losses": [u.val_loss for u in callback.history],
            "values": callback.hyperparameters,
        }
    module = made(Doubles)
    callback = whole(devices)
    weights = fit(devices, module, callback, epochs=8)
    assert callback.race is not None
    assert callback.ended_with is not None
    found["whole"] = {
        "weights": weights,
        "race": callback.race["lr"],
        "scores": [list(rung.values()) for rung in callback.race["scores"]],
        "ended_with": [callback.ended_with.kind, callback.ended_with.step, callback.ended_with.score],
        "cost": callback.cost,
        "values": callback.hyperparameters,
        "hypergradients": [u.hypergradients for u in callback.history],
    }
    if devices > 1:
        plain = fit(devices, made(Normalized), None, **OPTIONS)
        for name, (estimator, names, in_loss) in ESTIMATORS.items():
            module = made(Normalized)
            learned = (*names, *([module.l2] if in_loss else []))
            held = HyperGradient(learned, estimator=estimator, controller=Hold(), every_n_steps=1)
            assert fit(devices, module, held, **OPTIONS) == plain, name
            assert len(held.history) == 4, name
        # An arm takes the steps that it would take alone.
        race = Race(rates=(0.1,), rungs=((0.5, 1),), forks=(), least=1)
        module = made(Normalized)
        raced = HyperGradient("lr", race=race, controller=Hold(), every_n_steps=10**6)
        weights = fit(devices, module, raced)
        alone = made(Normalized)
        assert raced.race is not None
        alone.settings["lr"] = raced.race["lr"]
        assert raced.race["lr"] == 0.1
        found["arm"], found["alone"] = weights, fit(devices, alone, None)
    Path(f"{sys.argv[2]}/{devices}-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]))
