"""Two processes on one machine: ranks agree, and the hypergradient is that of one process on both ranks' data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch.utils.data import DataLoader, DistributedSampler
from hypergrad import Hold
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer

class Doubles(Net):
    def loss(self, batch):
        return super().loss((batch[0].double(), batch[1]))

def main(devices):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    module = Doubles(lr=0.01).double()
    torch.set_default_dtype(torch.float32)
    # Rank r draws the whole hyper-validation set whichever order it comes in, so that both setups see the same.
    own = DataLoader(data(32, 32, seed=2).dataset, batch_size=32)
    learned = HyperGradient(val_dataloaders=own, every_n_steps=1)
    options = {"devices": devices, "max_epochs": 2, "use_distributed_sampler": False}
    if devices > 1:
        options["strategy"] = "ddp"
    fitted = trainer(sys.argv[2], callbacks=[learned], **options)
    train = data(64).dataset
    shard = DistributedSampler(train, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    fitted.fit(module, DataLoader(train, 32 // devices, sampler=shard), data(seed=1))
    state = {
        "rank": fitted.global_rank,
        "values": learned.hyperparameters,
        "weights": module.net[0].weight.sum().item(),
        "hypergradients": [u.hypergradients for u in learned.history],
        "losses": [u.val_loss for u in learned.history],
    }
    open(f"{sys.argv[2]}/{devices}-{fitted.global_rank}.json", "w").write(json.dumps(state))

main(int(sys.argv[1]))
"""


def _run(tmp_path: Path, text: str, *arguments: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_on_gloo(tmp_path: Path) -> None:
    for devices in ("1", "2"):
        _run(tmp_path, SCRIPT, devices, str(tmp_path))
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    for key in ("values", "weights", "hypergradients", "losses"):
        assert first[key] == second[key]
    assert len(one["losses"]) == 4
    # The global batches are the same sets of items, split between ranks.
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-8)
    for a, b in zip(first["hypergradients"], one["hypergradients"], strict=True):
        assert a == pytest.approx(b, rel=1e-8)
    assert first["values"] == pytest.approx(one["values"], rel=1e-8)


UNEVEN = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch.utils.data import DataLoader, DistributedSampler
from hypergrad import Forward, Hold, Readout, Rewind, Unrolled
from hypergrad.callbacks import EarlyStopping, HyperGradient, Patience
from tests.callbacks.modules import Net, data, trainer

rank, folder, found = int(os.environ.get("LOCAL_RANK", 0)), sys.argv[1], {}

def fit(name, *callbacks, **options):
    torch.manual_seed(0)
    module, train = Net(), data(64).dataset
    val = DataLoader(data(48 if rank == 0 else 80, seed=5 + rank).dataset, 16)  # three batches here and five there
    settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, **options}
    fitted = trainer(folder, callbacks=list(callbacks), **settings)
    shard = DistributedSampler(train, 2, rank, shuffle=False)
    error = None
    try:
        fitted.fit(module, DataLoader(train, 16, sampler=shard), val)
    except Exception as raised:
        error = str(raised)
    weights = {name: p.sum().item() for name, p in module.named_parameters()}
    found[name] = {"weights": weights, "epochs": fitted.current_epoch, "error": error}

plain = HyperGradient(every_n_steps=1)
fit("online", plain, max_epochs=4)
found["online"]["values"] = plain.hyperparameters
stopping = EarlyStopping(criterion=Patience(1), stopping_threshold=0.95)
fit("stopped", HyperGradient(every_n_steps=1), stopping, max_epochs=30)
found["stopped"]["reason"] = stopping.reason
pieces = {"readout": Readout(checkpoints=4), "rewind": Rewind(), "controller": Hold()}
read = HyperGradient("lr", **pieces)
fit("readout", read, max_epochs=8)
found["readout"]["best"] = [str(read.ended_with), len(read.history)]
for estimator in (Forward(), Unrolled(3)):
    fit(type(estimator).__name__, HyperGradient(estimator=estimator))
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_ranks_with_validation_shards_of_different_lengths_decide_alike(tmp_path: Path) -> None:
    _run(tmp_path, UNEVEN, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["online"]["error"] is None
    assert first["online"]["values"]["lr"] != 0.01
    assert 0 < first["stopped"]["epochs"] < 30
    assert "is better than stopping_threshold" in first["stopped"]["reason"]
    assert first["readout"]["best"][0].startswith("Best(")
    for name in ("Forward", "Unrolled"):
        assert "not available with DDPStrategy. Use Online()" in first[name]["error"]
