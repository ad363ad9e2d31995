"""The rows of the table: things that Trainers, modules and loaders do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, IterableDataset

from hypergrad import Hyperparameter
from tests.callbacks.modules import data

EPOCHS = 2
VALIDATION = next(iter(data(40, 40, seed=2)))  # one batch, so that every measurement is of the same


class Norm(torch.nn.BatchNorm1d):
    """Keeps running statistics, and evaluates without them: no derivative follows how they came about."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(x)
        return torch.nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Small(pl.LightningModule):
    """BatchNorm, Dropout and a learned penalty, with whatever optimizer and schedule a feature asks for."""

    def __init__(
        self,
        optimizer: Callable[..., Any] = torch.optim.AdamW,
        schedule: Callable[[Any], Any] | None = None,
        interval: str = "step",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(5, 8), Norm(8), torch.nn.Tanh())
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(8, 3))
        self.l2 = Hyperparameter(1e-2)
        self.optimizer, self.schedule, self.interval = optimizer, schedule, interval
        self.settings = {"lr": 0.01, **settings}

    def loss(self, batch: Any) -> torch.Tensor:
        logits = self.head(self.body(batch[0].to(self.head[1].weight.dtype)))
        return torch.nn.functional.cross_entropy(logits, batch[1])

    def penalty(self) -> torch.Tensor:
        return self.l2().to(self.head[1].weight.dtype) * sum(p.square().sum() for p in self.parameters())

    def training_loss(self, batch: Any) -> torch.Tensor:
        return self.loss(batch) + self.penalty()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.training_loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = self.loss(batch)
        self.log("val_loss", loss, add_dataloader_idx=False) if dataloader_idx == 0 else None
        return loss

    def trained(self) -> Any:
        return self.parameters()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.trained(), **self.settings)
        if self.schedule is None:
            return optimizer
        config = {"scheduler": self.schedule(optimizer), "interval": self.interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Groups(Small):
    def trained(self) -> Any:
        return [
            {"params": self.body.parameters(), "weight_decay": 0.05, "name": "body"},
            {"params": self.head.parameters(), "lr": 0.02, "name": "head"},
        ]


class WarmUpByHand(Small):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (self.trainer.global_step + 1) / 10)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class ReturnsDict(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": torch.ones(3)}


class ReturnsNone(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


class LogsInHooks(Small):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("batches", float(batch_idx))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("norm", sum(p.grad.norm() for p in self.parameters() if p.grad is not None))


class Unlogged(Small):
    """Lightning's `log` cannot be traced by torch.compile in every version of the two."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.training_loss(batch)


class CompiledBody(Small):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")  # type: ignore[assignment]


class OwnClipping(Small):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


class Manual(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.training_loss(batch))
        optimizer.step()


class Adversaries(Manual):
    """Two optimizers in turn, each with its own loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for sign, optimizer in zip((1.0, -0.1), self.optimizers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(sign * self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.body.parameters(), 0.01), torch.optim.SGD(self.head.parameters(), 0.01)]


class Combined(Small):
    def training_loss(self, batch: Any) -> torch.Tensor:
        return self.loss(batch["a"]) + 0.5 * self.loss(batch["b"]) + self.penalty()


class Frozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)


class SchedulesByHand(Manual):
    """A scheduler of torch's that Lightning does not know of."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.by_hand = schedules.ExponentialLR(optimizer, 0.9)
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        self.by_hand.step()


class GAN(Manual):
    """A generator and its critic, toggled in turn, each with a loss and an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        fake = self.head(self.body(batch[0].to(self.head[1].weight.dtype))).softmax(1)
        real = torch.nn.functional.one_hot(batch[1], 3).to(fake)
        generator, critic = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(generator)
        loss = self.loss(batch) - 0.1 * self.critic(fake).mean()
        self.log("generator", loss)
        generator.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        generator.step()
        self.untoggle_optimizer(generator)
        self.toggle_optimizer(critic)
        loss = self.critic(fake.detach()).mean() - self.critic(real).mean()
        self.log("critic", loss)
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        self.untoggle_optimizer(critic)

    def configure_optimizers(self) -> Any:
        own = [*self.body.parameters(), *self.head.parameters()]
        return [torch.optim.AdamW(own, 0.01), torch.optim.AdamW(self.critic.parameters(), 0.01)]


class ScheduleFree(Small):
    """Its optimizer has two sets of weights, and a mode for each."""

    def __init__(self) -> None:
        super().__init__(
            lambda params, **given: importlib.import_module("schedulefree").AdamWScheduleFree(params, **given)
        )

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.train()
        return optimizer


class Doubled(Small):
    """Converted by its user: the average that Lightning keeps is not, where it comes before the Trainer's precision."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer)


class HeadFirst(Small):
    def trained(self) -> Any:
        return [p for p in self.parameters() if p.requires_grad]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from data().dataset

    def __len__(self) -> int:
        return len(data().dataset)  # type: ignore[arg-type]


class Module(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return data()

    def val_dataloader(self) -> Any:
        return data(32, seed=1)


def loaders() -> dict[str, Any]:
    return {"train_dataloaders": data(), "val_dataloaders": data(32, seed=1)}


@dataclass(frozen=True)
class Feature:
    """One row.

    Args:
        module: makes the module; a new one for each fit.
        trainer: makes further arguments of the Trainer.
        loaders: makes what `fit` is given beside the module.
        compiled: whether the module goes through `torch.compile` first.
        own_data: whether the callback is given hyper-validation data of its own.
        exact: whether hypergradients can be compared with differences: in float64, where one step follows another.
        needs: a package that has to be installed.
        available: whether this Lightning or torch has it.
        slow: whether only the slow tests run it.
    """

    name: str
    module: Callable[[], Small] = Small
    trainer: Callable[[], dict[str, Any]] = dict
    loaders: Callable[[], dict[str, Any]] = loaders
    compiled: bool = False
    own_data: bool = True
    exact: bool = True
    needs: str = ""
    available: bool = True
    slow: bool = False


def trainer(**settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(settings)


def half() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))]}


def scheduled(schedule: Callable[[Any], Any], interval: str = "step") -> Callable[[], Small]:
    return lambda: Small(schedule=schedule, interval=interval)


def third_party(package: str, name: str, **settings: Any) -> dict[str, Any]:
    """A row's module and package."""
    make = lambda params, **given: getattr(importlib.import_module(package), name)(params, **{**given, **settings})
    return {"module": lambda: Small(make), "needs": package}


def persistent() -> DataLoader[Any]:
    return DataLoader(data().dataset, 16, num_workers=1, persistent_workers=True)


def ema() -> dict[str, Any]:
    return {"callbacks": [callbacks.EMAWeightAveraging(decay=0.5)]}


def warm_up(optimizer: Any) -> Any:
    first = schedules.LinearLR(optimizer, 0.1, total_iters=5)
    return schedules.SequentialLR(optimizer, [first, schedules.CosineAnnealingLR(optimizer, 13)], [5])


FEATURES = [
    Feature("nothing special"),
    Feature('precision="bf16-mixed"', trainer=trainer(precision="bf16-mixed"), exact=False),
    Feature('precision="bf16-true"', trainer=trainer(precision="bf16-true"), exact=False),
    Feature('precision="32-true"', trainer=trainer(precision="32-true"), exact=False, slow=True),
    Feature('precision="16-mixed", skipped steps', trainer=half, exact=False),
    Feature("accumulate_grad_batches=2", trainer=trainer(accumulate_grad_batches=2)),
    Feature("gradient_clip_val, by norm", trainer=trainer(gradient_clip_val=0.1)),
    Feature("gradient_clip_val, by value", trainer=trainer(gradient_clip_val=0.01, gradient_clip_algorithm="value")),
    Feature("configure_gradient_clipping", OwnClipping),
    Feature("CosineAnnealingLR per step", scheduled(lambda o: schedules.CosineAnnealingLR(o, 18))),
    Feature("OneCycleLR per step", scheduled(lambda o: schedules.OneCycleLR(o, 0.05, total_steps=20)), slow=True),
    Feature("StepLR per epoch", scheduled(lambda o: schedules.StepLR(o, 1, 0.5), "epoch"), slow=True),
    Feature("ReduceLROnPlateau", scheduled(lambda o: schedules.ReduceLROnPlateau(o, patience=0), "epoch")),
    Feature("warm-up by SequentialLR", scheduled(warm_up)),
    Feature("warm-up by LambdaLR from 0", scheduled(lambda o: schedules.LambdaLR(o, lambda t: min(1.0, t / 5)))),
    Feature("warm-up in optimizer_step", WarmUpByHand),
    Feature("param groups", Groups),
    Feature("SGD, Nesterov momentum", lambda: Small(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01)),
    Feature("fused AdamW", lambda: Small(fused=True)),
    Feature("foreach AdamW", lambda: Small(foreach=True), slow=True),
    Feature("BaseFinetuning, a group added later", HeadFirst, lambda: {"callbacks": [Unfreezes()]}),
    Feature("StochasticWeightAveraging", trainer=lambda: {"callbacks": [StochasticWeightAveraging(0.01, 1)]}),
    Feature("EMAWeightAveraging", Doubled, trainer=ema, available=hasattr(callbacks, "EMAWeightAveraging")),
    Feature("frozen layers", Frozen),
    Feature("Lion, of lion-pytorch", **third_party("lion_pytorch", "Lion", lr=2e-3)),
    Feature("Prodigy, of prodigyopt", **third_party("prodigyopt", "Prodigy", lr=1.0, d0=1e-2)),
    Feature("AdamWScheduleFree, of schedulefree", ScheduleFree, needs="schedulefree"),
    Feature("manual optimization", Manual),
    Feature("manual optimization, a scheduler by hand", SchedulesByHand),
    Feature("two optimizers, a GAN", GAN, exact=False),
    Feature("two optimizers, adversaries", Adversaries, exact=False),
    Feature("torch.compile, the module", Unlogged, compiled=True),
    Feature("torch.compile, a submodule", CompiledBody),
    Feature("training_step returns a dict", ReturnsDict),
    Feature("training_step returns None at times", ReturnsNone),
    Feature("self.log in hooks", LogsInHooks),
    Feature("LightningDataModule", loaders=lambda: {"datamodule": Module()}),
    Feature(
        "persistent_workers", loaders=lambda: {**loaders(), "train_dataloaders": persistent()}, slow=True
    ),
    Feature("iterable dataset", loaders=lambda: {**loaders(), "train_dataloaders": DataLoader(Stream(), 16)}),
    Feature(
        "CombinedLoader",
        Combined,
        loaders=lambda: {
            **loaders(),
            "train_dataloaders": CombinedLoader({"a": data(), "b": data(48, seed=3)}, "max_size_cycle"),
        },
    ),
    Feature(
        "several validation loaders", loaders=lambda: {**loaders(), "val_dataloaders": [data(seed=1), data(seed=4)]}
    ),
    Feature(
        "hyper-validation on the Trainer's data",
        loaders=lambda: {**loaders(), "val_dataloaders": data(40, 40, seed=2)},
        own_data=False,
    ),
    Feature(
        "limit_train_batches, limit_val_batches",
        trainer=trainer(limit_train_batches=4, limit_val_batches=0.5),
        slow=True,
    ),
    Feature("overfit_batches=2", trainer=trainer(overfit_batches=2)),
    Feature("fast_dev_run=6", trainer=trainer(fast_dev_run=6)),
    Feature("val_check_interval=2", trainer=trainer(val_check_interval=2)),
    Feature("no validation loop", trainer=trainer(limit_val_batches=0), loaders=lambda: {"train_dataloaders": data()}),
]  # fmt: skip
