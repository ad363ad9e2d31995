"""What LearningRateMonitor and checkpoints show: the values that are really used, beside a schedule or without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import ExponentialLR

from hypergrad import Cosine, Hold, OptimizerHyperparameter
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer


class Groups(Net):
    """Two param groups under a schedule."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.003}, {"params": self.net[2].parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}]


def _fit(tmp: Path, module: Net, callback: HyperGradient, **monitor: Any) -> list[dict[str, float]]:
    """What was logged under lr-AdamW, line by line."""
    watch, logger = LearningRateMonitor(**monitor), CSVLogger(tmp, name="", version="")
    fitted = trainer(tmp, callbacks=[watch, callback], logger=logger)
    fitted.fit(module, data(), data(seed=1))
    assert not {"on_train_batch_start", "on_train_epoch_start"} & set(vars(watch))
    rows = logger.experiment.metrics or _rows(tmp / "metrics.csv")
    return [{k: float(v) for k, v in row.items() if k.startswith("lr-") and v} for row in rows if _has_rates(row)]


def _has_rates(row: dict[str, Any]) -> bool:
    return any(k.startswith("lr-") and v for k, v in row.items())


def _rows(path: Path) -> list[dict[str, Any]]:
    import csv

    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("module", [Net, Groups])
def test_learning_rate_monitor_shows_what_each_step_uses(tmp_path: Path, module: type[Net]) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    lines = _fit(tmp_path, module(), callback, logging_interval="step", log_weight_decay=True)
    names = {"lr-AdamW": "lr"} if module is Net else {"lr-AdamW/pg1": "lr/group_0", "lr-AdamW/pg2": "lr/group_1"}
    assert len(lines) == len(callback.history) == 18
    for name, label in names.items():
        used = [u.values[label] for u in callback.history]
        decays = [u.values[label.replace("lr", "weight_decay")] for u in callback.history]
        assert [line[name] for line in lines] == pytest.approx(used, rel=1e-6)
        assert [line[f"{name}-weight_decay"] for line in lines] == pytest.approx(decays, rel=1e-6)
        assert len(set(used)) > 10


def test_at_the_start_of_an_epoch_and_with_a_shape(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1, controller=Hold(), shape=Cosine())
    lines = _fit(tmp_path, Net(), callback, logging_interval="epoch")
    expected = [callback.history[step].values["lr"] for step in (0, 6, 12)]
    assert [line["lr-AdamW"] for line in lines] == pytest.approx(expected, rel=1e-6)
    assert expected[2] < 0.5 * expected[0]


def test_values_per_tensor_are_not_those_of_a_group(tmp_path: Path) -> None:
    learned = [OptimizerHyperparameter("lr", per="tensor"), OptimizerHyperparameter("weight_decay", per="shared")]
    callback = HyperGradient(learned, val_dataloaders=data(seed=2), every_n_steps=1)
    lines = _fit(tmp_path, Net(), callback, logging_interval="step", log_weight_decay=True)
    assert {line["lr-AdamW"] for line in lines} == {0.01}
    used = [u.values["weight_decay"] for u in callback.history]
    assert [line["lr-AdamW-weight_decay"] for line in lines] == pytest.approx(used, rel=1e-6)
    assert len(set(used)) > 10


def test_a_checkpoint_holds_the_schedule_in_the_optimizer_and_the_values_in_the_callback(tmp_path: Path) -> None:
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fitted = trainer(tmp_path, callbacks=[callback])
    fitted.fit(Groups(), data(), data(seed=1))
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    (state,) = (s for name, s in checkpoint["callbacks"].items() if name.startswith("HyperGradient"))
    assert state["run"]["values"] == callback.hyperparameters
    scheduled = [group["lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]]
    assert scheduled == pytest.approx([0.003 * 0.9**18, 0.01 * 0.9**18])
    assert state["run"]["values"]["lr/group_0"] != pytest.approx(scheduled[0], rel=0.01)
