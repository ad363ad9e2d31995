"""One training script, plain, measured or with another setting, and what it comes to."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch

from tests.callbacks.composition.features import EPOCHS, VALIDATION, Feature
from tests.callbacks.modules import trainer

L2 = 1e-2


class Witness(pl.Callback):
    """What every batch saw, and the hyper-validation loss after the last step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.steps, self.loss = 0, float("nan")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        logged = {k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith("hypergradient")}
        groups = [{k: v for k, v in g.items() if k != "params"} for o in trainer.optimizers for g in o.param_groups]
        self.seen.append(
            (torch.get_rng_state().sum().item(), logged, groups, [m.training for m in pl_module.modules()])
        )
        # StochasticWeightAveraging ends with an epoch of forward passes, after which the Trainer counts a step.
        if trainer.global_step > self.steps and any(p.grad is not None for p in pl_module.parameters()):
            self.steps = trainer.global_step
            flags = {m: m.training for m in pl_module.modules()}
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                pl_module.eval()
                self.loss = pl_module.loss(VALIDATION).item()
            for m, training in flags.items():
                m.training = training


class Scaled(pl.Callback):
    """Multiplies the learning rate while the optimizer updates, from one step on."""

    def __init__(self, factor: float, first: int) -> None:
        self.factor, self.left = factor, first
        self.standing: list[tuple[dict[str, Any], float]] = []

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self._restore)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.left -= 1
        if self.left < 0:
            for group in optimizer.param_groups:
                self.standing.append((group, group["lr"]))
                group["lr"] = group["lr"] * self.factor

    def _restore(self, *_: Any) -> None:
        while self.standing:
            group, value = self.standing.pop()
            group["lr"] = value


class Penalized(pl.Callback):
    """Another penalty in the loss, from one step on."""

    def __init__(self, value: float, first: int) -> None:
        self.value, self.first = value, first

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= self.first:
            pl_module.l2.value.fill_(self.value)


@dataclass(frozen=True)
class Result:
    """What a fit has left behind.

    Args:
        loss: of the hyper-validation batch, after the last step.
        steps: that the optimizers made, all together.
    """

    loss: float
    steps: int
    weights: dict[str, torch.Tensor]
    optimizers: list[Any]
    seen: list[Any] = field(repr=False)


def run(feature: Feature, module: Any, *callbacks: pl.Callback) -> Result:
    """Train once, from the same random streams; the module is made after they are seeded: see `made`."""
    given, witness = feature.trainer(), Witness()
    # Ours come first, as a user would list them.
    listed = [*callbacks, *given.pop("callbacks", []), witness]
    precision = {} if "precision" in given or "plugins" in given else {"precision": "64-true"}
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **precision, **given}
    fitted = trainer(None, callbacks=listed, **options)
    fitted.fit(torch.compile(module, backend="eager") if feature.compiled else module, **feature.loaders())
    optimizers = [o.state_dict() for o in fitted.optimizers]
    return Result(witness.loss, witness.steps, module.state_dict(), optimizers, witness.seen)


def made(feature: Feature) -> Any:
    """A new module, the same every time."""
    pl.seed_everything(3, verbose=False)
    return feature.module()


@functools.cache
def plain(feature: Feature) -> Result:
    """The script without the callback."""
    return run(feature, made(feature))


@functools.cache
def slope(feature: Feature, name: str, whole: bool) -> float:
    """d(loss)/d(log lr), or d(loss)/d(l2), by central differences of the script; of all steps or the last one."""
    first = 0 if whole else plain(feature).steps - 1
    h = 1e-4 if name == "lr" else 1e-3 * L2
    ends = [
        run(feature, made(feature), Scaled(1.0 + d, first) if name == "lr" else Penalized(L2 + d, first)).loss
        for d in (h, -h)
    ]
    return (ends[0] - ends[1]) / (2.0 * h)
