"""The private corners of Lightning that one adapter file uses: these break when one moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypergrad.callbacks._lightning import log_scalars, to_device, unscaled, validation_loaders
from tests.callbacks.modules import Net, data, trainer


class Looks(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.loaders = validation_loaders(trainer)
        self.batch = to_device(trainer, pl_module, next(iter(self.loaders[0])), 0)


class Hooks(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1.0, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2.0, batch[1]


def test_loaders_are_there_before_the_first_validation_and_batches_pass_all_hooks(tmp_path: Path) -> None:
    looks, val = Looks(), data(seed=1)
    trainer(tmp_path, callbacks=[looks], num_sanity_val_steps=0, max_epochs=1, precision="64-true").fit(
        Hooks(), data(), val
    )
    assert looks.loaders == [val]
    raw = next(iter(val))[0]
    assert looks.batch[0].dtype == torch.float64
    torch.testing.assert_close(looks.batch[0], (raw.double() + 1.0) * 2.0)


class TwoLoaders(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return super().validation_step(batch, batch_idx)


def test_named_loaders(tmp_path: Path) -> None:
    looks, val = Looks(), {"a": data(seed=1), "b": data(seed=2)}
    trainer(tmp_path, callbacks=[looks], num_sanity_val_steps=0, max_epochs=1).fit(TwoLoaders(), data(), val)
    assert looks.loaders == list(val.values())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_a_loss_before_it_is_differentiated_is_the_one_that_the_batch_ends_with(
    scale: float | None, accumulate: int
) -> None:
    class Compares(pl.Callback):
        before: torch.Tensor
        batches = 0

        def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
            self.scaled, self.before = loss.detach(), unscaled(trainer, loss.detach())

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            assert torch.equal(self.before, outputs["loss"])
            assert torch.equal(self.scaled, outputs["loss"] * (scale or 1.0))
            self.batches += 1

    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    precision = {} if scaler is None else {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    compares = Compares()
    trainer(None, callbacks=[compares], max_epochs=1, accumulate_grad_batches=accumulate, **precision).fit(
        Net(), data(), data(seed=1)
    )
    assert compares.batches == 6


class Shouts(TensorBoardLogger):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics({name.upper(): value for name, value in metrics.items()}, step)


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("kind", [TensorBoardLogger, Shouts])
@pytest.mark.parametrize("prefix", ["", "mine"])
def test_scalars_arrive_in_tensorboard_as_by_log_metrics(
    kind: type[TensorBoardLogger], prefix: str, tmp_path: Path
) -> None:
    numbers = {"a/value": 0.5, "b": -2.0}
    ours, theirs = (kind(tmp_path / name, version="", prefix=prefix) for name in ("ours", "theirs"))
    for step in (3, 7):
        log_scalars(ours, numbers, step)
        theirs.log_metrics(numbers, step)
    for logger in (ours, theirs):
        logger.finalize("success")
    found = scalars_in(Path(ours.log_dir))
    assert found == scalars_in(Path(theirs.log_dir))
    assert len(found) == 2


def test_scalars_arrive_after_the_writer_was_closed(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version="")
    logger.finalize("success")
    log_scalars(logger, {"a": 1.0}, 1)
    logger.experiment.close()
    log_scalars(logger, {"a": 2.0}, 2)
    logger.experiment.close()
    # In order of the step: files of one second are read by name, in which the number of the writer sorts 10 before 9.
    assert {tag: sorted(found) for tag, found in scalars_in(Path(logger.log_dir)).items()} == {
        "a": [(1, 1.0), (2, 2.0)]
    }
