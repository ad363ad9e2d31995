"""What a fit with the callback holds in memory: the peak over its steps, in copies of the parameters.

A perceptron whose batches are small, so that hardly anything but parameters, gradients and optimizer state counts. On a
CPU the bytes of all tensors are counted; on a CUDA device those that its allocator has handed out, so that what stands
by on the host is not in them: `--crowded` makes the callback believe that the device is full. The phases of the default
are its race of learning rates, and what comes after. Run:
`.venv/bin/python examples/benchmarks/footprint.py [--device cuda]`
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import lightning as L
import torch
from memory import Held
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from hypergrad import Cautious, Descent, Race
from hypergrad.callbacks import HyperGradient

CALLBACKS: dict[str, Callable[[], list[L.Callback]]] = {
    "plain": list,
    "hypergradients alone": lambda: [HyperGradient(controller=Cautious(Descent()))],
    "the default": lambda: [HyperGradient()],
}


class Perceptron(L.LightningModule):
    def __init__(self, optimizer: str, width: int) -> None:
        super().__init__()
        hidden = [nn.Linear(20, width), *(nn.Linear(width, width) for _ in range(2))]
        self.net = nn.Sequential(*(part for layer in hidden for part in (layer, nn.Tanh())), nn.Linear(width, 1))
        self.optimizer = optimizer

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("val_loss", mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Peaks(L.Callback):
    """The most that was held in each step."""

    def __init__(self, held: Held | None) -> None:
        self.held = held
        self.bytes: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        if self.held is not None:
            self.bytes.append(self.held.restart())
        else:
            self.bytes.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()


def loader(rows: int, seed: int) -> DataLoader[Any]:
    x = torch.randn(rows, 20, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x[:, :1] + x[:, 1:2].sin()), batch_size=16)


def peaks(optimizer: str, callbacks: list[L.Callback], arguments: argparse.Namespace) -> list[float]:
    """By step, in copies of the parameters."""
    torch.manual_seed(0)
    module = Perceptron(optimizer, arguments.width)
    size = sum(p.nbytes for p in module.parameters())
    held = Held() if arguments.device == "cpu" else None
    probe = Peaks(held)
    with contextlib.ExitStack() as stack:
        if held is not None:
            stack.enter_context(held)
            for p in module.parameters():
                held.count(p.untyped_storage())
        if arguments.crowded:
            stack.enter_context(mock.patch("hypergrad.callbacks._race.room", return_value=0.0))
        trainer = L.Trainer(
            max_steps=arguments.steps,
            accelerator="gpu" if arguments.device == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            check_val_every_n_epoch=10**6,
            callbacks=[*callbacks, probe],
        )
        trainer.fit(module, loader(512, seed=0), loader(256, seed=1))
    return [b / size for b in probe.bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, default=2100, help="of a hidden layer (default: parameters of 35 MB)")
    parser.add_argument("--steps", type=int, default=512, help="of a fit; less than 400 have no race")
    parser.add_argument("--crowded", action="store_true", help="as on a device without room for the race")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|log_every_n_steps|no `val_dataloader`).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    race = max((end for end, _ in Race().ends(arguments.steps)), default=0)
    print("| | optimizer | in the race | after it, at most | in most steps |")
    print("|---|---|---|---|---|")
    for optimizer in ("SGD", "AdamW"):
        for name, make in CALLBACKS.items():
            found = peaks(optimizer, make(), arguments)
            # The step that ends the race has both in it.
            during, after = found[:race], sorted(found[race + 1 :])
            columns = [max(during) if during and name == "the default" else None, after[-1], after[len(after) // 2]]
            print(f"| {name} | {optimizer} |", *(f"{'' if c is None else f'{c:.1f}'} |" for c in columns), flush=True)


if __name__ == "__main__":
    main()
