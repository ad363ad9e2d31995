"""Where the validation loss comes from: what is logged or returned, which loader, which layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from hypergrad import Hold
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, fit, trainer


@pytest.mark.parametrize(
    "how", ["logs", "logs and returns a float", "logs a float and returns", "returns", "returns a dict", "log_dict"]
)
def test_the_validation_loss_is_what_is_logged_or_returned(tmp_path: Path, how: str) -> None:
    class Variant(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            if how == "log_dict":
                self.log_dict({"val_loss": loss, "val_twice": 2 * loss}, prog_bar=True)
            elif how == "logs a float and returns":
                self.log("val_loss", loss.item())
                return loss
            elif how.startswith("logs"):
                self.log("val_loss", loss, on_epoch=True)
                return loss.item() if "float" in how else None
            elif how == "returns":
                return loss
            else:
                return {"loss": loss, "logits": 1}
            return None

    callback = HyperGradient(val_dataloaders=data(seed=2), controller=Hold())
    fit(Variant(), callback, tmp_path)
    assert all(u.hypergradients["lr"] != 0.0 for u in callback.history)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
def test_fast_dev_run_and_no_validation_loop(tmp_path: Path) -> None:
    fit(Net(), HyperGradient(every_n_steps=1), tmp_path, fast_dev_run=True)
    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=1)
    fitted = trainer(tmp_path, callbacks=[callback], limit_val_batches=0)
    fitted.fit(Net(), data())
    assert len(callback.history) == 18


def test_datamodule_with_batch_transfer_hooks(tmp_path: Path) -> None:
    class Module(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return data()

        def val_dataloader(self) -> Any:
            return data(seed=1)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert self.trainer.validating or self.trainer.training or self.trainer.sanity_checking
            return {"x": batch[0], "y": batch[1]}

    class FromDict(Net):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss((batch["x"], batch["y"]))

    callback = HyperGradient(every_n_steps=2)
    trainer(tmp_path, callbacks=[callback]).fit(FromDict(), datamodule=Module())
    assert len(callback.history) == 9


def test_several_validation_loaders_are_told_apart_by_the_monitor(tmp_path: Path) -> None:
    indices: list[int] = []

    class Two(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if self.trainer.global_step and not self.trainer.sanity_checking:
                indices.append(dataloader_idx)
            self.log("val_loss", self.loss(batch))

    callback = HyperGradient(monitor="val_loss/dataloader_idx_1", every_n_steps=1)
    fitted = trainer(tmp_path, callbacks=[callback], max_epochs=1)
    fitted.fit(Two(), data(), [data(seed=1), data(seed=2)])
    assert indices[:5] == [1] * 5
    assert len(callback.history) == 6


@pytest.mark.parametrize("net", ["lstm", "gru", "attention", "embedding", "tied"])
def test_layers(tmp_path: Path, net: str) -> None:
    class Layers(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kind = net
            self.rnn = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(net, torch.nn.LSTM)(5, 8, batch_first=True)
            self.attention = torch.nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
            self.embedding = torch.nn.Embedding(11, 8)
            self.head = torch.nn.Linear(8, 11)
            if net == "tied":
                self.head.weight = self.embedding.weight

        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            tokens = (x * 2).round().long().clamp(-5, 5) + 5
            h = self.embedding(tokens)
            if net in ("lstm", "gru"):
                h = self.rnn(x[:, None, :])[0]
            elif net == "attention":
                h = torch.nn.functional.scaled_dot_product_attention(h, h, h) + self.attention(h, h, h)[0]
            return torch.nn.functional.cross_entropy(self.head(h.mean(1)), y)

    callback = HyperGradient(val_dataloaders=data(seed=2), every_n_steps=3)
    fit(Layers(), callback, tmp_path)
    assert all(u.hypergradients["lr"] != 0.0 and u.skipped is None for u in callback.history)
