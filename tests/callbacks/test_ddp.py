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


def test_two_ranks_on_gloo(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for devices in ("1", "2"):
        command = [sys.executable, str(script), devices, str(tmp_path)]
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    for key in ("values", "weights", "hypergradients", "losses"):
        assert first[key] == second[key]
    assert len(one["losses"]) == 4
    # The global batches are the same sets of items, split between ranks.
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-8)
    for a, b in zip(first["hypergradients"], one["hypergradients"], strict=True):
        assert a == pytest.approx(b, rel=1e-8)
    assert first["values"] == pytest.approx(one["values"], rel=1e-8)
