"""The LightningModule of the tasks, and its networks. Nothing here knows of hypergrad."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

FORWARD = 1 / 3  # of a gradient: what a loss without one costs
Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch, bool], Tensor]  # of net, batch, and whether this is training
Schedule = Callable[[int], float]  # step -> factor of lr


class Module(L.LightningModule):
    """An ordinary module that also counts what it is asked for, so that every method's cost is counted alike.

    `spent` is kept on the class: copies of a module that a method makes are counted too. One unit is the gradient of
    one training batch; a loss without a gradient is `FORWARD` of it, and both go by the size of the batch.
    """

    spent: ClassVar[float] = 0.0

    def __init__(
        self,
        net: nn.Module,
        criterion: Loss,
        optimizer: str,
        batch_size: int,
        lr: float,
        weight_decay: float,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.net, self.criterion, self.optimizer_name = net, criterion, optimizer
        self.batch_size, self.lr, self.weight_decay, self.schedule = batch_size, lr, weight_decay, schedule

    def loss(self, batch: Batch, training: bool = False) -> Tensor:
        Module.spent += len(batch[0]) / self.batch_size * (1 if torch.is_grad_enabled() else FORWARD)
        return self.criterion(self.net, batch, training)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch, training=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss, batch_size=len(batch[0]))
        return loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=len(batch[0]))

    def log(self, name: str, value: Any, **options: Any) -> None:
        """Outside a Trainer there is nowhere to log to; Lightning would warn at every step."""
        try:
            self.trainer  # noqa: B018 - raises where there is none
        except RuntimeError:
            return
        super().log(name, value, **options)

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "AdamW":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.parameters(), lr=self.lr, weight_decay=self.weight_decay
            )
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def classify(net: nn.Module, batch: Batch, _: bool) -> Tensor:
    """Cross-entropy; of sequences, the mean over their places."""
    return cross_entropy(net(batch[0]).flatten(0, -2), batch[1].flatten())


def regress(net: nn.Module, batch: Batch, _: bool) -> Tensor:
    return mse_loss(net(batch[0]), batch[1])


def reconstruct(net: nn.Module, batch: Batch, _: bool) -> Tensor:
    # Times 64: the error of an image, not of a pixel.
    return 64 * mse_loss(net(batch[0]), batch[0])


def contrast(net: nn.Module, batch: Batch, training: bool) -> Tensor:
    """InfoNCE between two views. Held-out data comes with its views, so that its loss is a number and not a draw."""
    a, b = (view(batch[0]), view(batch[0])) if training else batch
    logits = normalize(net(a)) @ normalize(net(b)).T / 0.2
    return cross_entropy(logits, torch.arange(len(a), device=logits.device))


def view(images: Tensor) -> Tensor:
    """A corrupted copy: a third of the pixels gone, the others noisy."""
    return (images + 0.2 * torch.randn_like(images)) * (torch.rand_like(images) > 1 / 3)


def perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(width: int) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [nn.Unflatten(1, (1, 8, 8)), *block(1, width), *block(width, 2 * width), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8 * width, 10))


class Recurrent(nn.Module):
    """A byte-level GRU."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width // 2)
        self.gru = nn.GRU(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(tokens))[0])


class Transformer(nn.Module):
    """A byte-level transformer."""

    def __init__(self, symbols: int, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(symbols, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, symbols)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens) + self.position, mask=self.mask, is_causal=True))


class Window(nn.Module):
    """The next byte from the few before it, by a perceptron."""

    def __init__(self, symbols: int, width: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 16)
        self.body = perceptron(16 * length, width, width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens).flatten(1))
