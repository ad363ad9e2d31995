"""Two processes on one machine: ranks agree, and the hypergradient is that of one process on both ranks' data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def _run(*arguments: str) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def _numbers(found: Any) -> list[Any]:
    if isinstance(found, dict):
        return [number for value in found.values() for number in _numbers(value)]
    return [number for value in found for number in _numbers(value)] if isinstance(found, list) else [found]


def test_two_ranks_on_gloo(tmp_path: Path) -> None:
    for devices in ("1", "2"):
        _run("-m", "tests.callbacks.ddp_script", devices, str(tmp_path))
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    arm, alone = first.pop("arm"), first.pop("alone")
    assert arm == pytest.approx(alone, rel=1e-10)
    assert len(first) == 7  # six estimators and the whole default
    for name in one:
        assert len(one[name]["hypergradients"]) > 1
        assert _numbers(first[name]) == [
            pytest.approx(number, rel=1e-10) if isinstance(number, float) else number for number in _numbers(one[name])
        ]


UNEVEN = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch.utils.data import DataLoader, DistributedSampler
from hypergrad import Forward, Hold, Race, Readout, Rewind, Unrolled
from hypergrad.callbacks import EarlyStopping, HyperGradient, Patience
from tests.callbacks.modules import Net, data, trainer

rank, folder, found = int(os.environ.get("LOCAL_RANK", 0)), sys.argv[1], {}

class Forgets(Net):
    at = -1

    def on_train_batch_end(self, *_):  # its weights are as at first again
        if self.trainer.global_step == self.at:
            self.load_state_dict(self.first)

class OneSided(Net):
    def loss(self, batch):  # only the second rank has anything to complain of, and no gradient says so
        return super().loss(batch) + 4.0 * (rank == 1 and self.trainer.global_step >= 60)

def fit(name, *callbacks, at=-1, kind=Forgets, **options):
    torch.manual_seed(0)
    module, train = kind(lr=0.03 if at > 0 else 0.01), data(64).dataset
    module.at, module.first = at, {name: t.clone() for name, t in module.state_dict().items()}
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
    name, replays = type(estimator).__name__, HyperGradient(estimator=estimator, every_n_steps=2)
    fit(name, replays)
    found[name]["values"] = replays.hyperparameters
raced = HyperGradient(race=Race(rates=(1e-3, 0.1), rungs=((0.1, 2), (0.3, 1)), forks=(), least=1))
fit("race", raced, max_epochs=8)
found["race"]["values"] = [raced.race["lr"], raced.hyperparameters]
for at in (30, 60):  # of 120 steps; after 48 it is too late to begin anew
    back = HyperGradient("lr", readout=Readout(checkpoints=20, batches=2), rewind=Rewind(), controller=Hold())
    fit(f"relapse at {at}", back, at=at, max_epochs=60)
    found[f"relapse at {at}"]["rewound"] = back.rewound
back = HyperGradient("lr", readout=Readout(checkpoints=20, batches=2), rewind=Rewind(times=1), controller=Hold())
fit("one-sided", back, kind=OneSided, max_epochs=60)
found["one-sided"]["rewound"] = back.rewound
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_ranks_with_validation_shards_of_different_lengths_decide_alike(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNEVEN)
    _run(str(script), str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert {name: found["error"] for name, found in first.items() if found["error"] is not None} == {}
    for name in ("online", "Forward", "Unrolled"):
        assert first[name]["values"]["lr"] != 0.01
    assert 0 < first["stopped"]["epochs"] < 30
    assert "is better than stopping_threshold" in first["stopped"]["reason"]
    assert first["readout"]["best"][0].startswith("Best(")
    assert first["race"]["values"][0] in (1e-3, 1e-2, 0.1)
    for at, begins in ((30, range(1)), (60, range(42, 61))):
        start, end = first[f"relapse at {at}"]["rewound"][0]
        assert at < start <= at + 18
        assert end in begins
    ((start, end),) = first["one-sided"]["rewound"]
    assert 42 <= end <= 60 < start <= 78


@pytest.mark.slow
def test_two_ranks_go_on_from_a_checkpoint_as_if_nothing_had_been(tmp_path: Path) -> None:
    _run("-m", "tests.callbacks.ddp_resume", str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first) == 8
    for name, (resumed, expected) in first.items():
        assert resumed == expected, name
