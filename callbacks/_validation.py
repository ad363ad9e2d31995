"""The user's `validation_step` as a differentiable loss, run without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from hypergrad import NotDifferentiableError, preserved, preserved_rng
from hypergrad.callbacks._lightning import to_device

# Reached from every LightningModule, and not its state.
_OPAQUE = (pl.Trainer, pl.LightningDataModule, pl.Callback, Logger, torch.optim.Optimizer)


@dataclass(frozen=True)
class ValidationLoss:
    """Evaluates what `validation_step` logs under `monitor`, or returns, with its gradient.

    Runs as the Trainer's validation loop would (eval mode, precision, device transfer, `trainer.validating`), with a
    seed of its own. Afterwards module, metrics, buffers, RNG streams and loggers are as before, also if it raises.

    Args:
        monitor: the key under which the module logs its validation loss.
        mode: `"min"` or `"max"`; a returned loss that was not logged can only be minimised.
        dataloader_idx: which of the Trainer's validation loaders the batches come from.
        several: whether there is more than one, so that `validation_step` takes an index.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    monitor: str
    mode: str = "min"
    dataloader_idx: int = 0
    several: bool = False

    def gradient(
        self, batch: Any, batch_idx: int, params: Sequence[torch.Tensor], seed: int
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The loss, detached, and its gradient with respect to `params`, on one batch as the loader gave it.

        Raises:
            NotDifferentiableError: if no gradient can be had; the message says why and how to mend it.
        """
        with self._as_validation(params, seed) as logged:
            batch = to_device(self.trainer, self.module, batch, self.dataloader_idx)
            args = [batch, batch_idx, *([self.dataloader_idx] if self._takes_dataloader_idx() else [])]
            with torch.inference_mode(False), torch.enable_grad():
                with self.trainer.precision_plugin.val_step_context():
                    output = self.module.validation_step(*args)
                loss = self._loss(logged, output)
                scale = self._scale()
                gradients = torch.autograd.grad(scale * loss, list(params), allow_unused=True, materialize_grads=True)
        return loss.detach(), gradients if scale == 1.0 else tuple(g / scale for g in gradients)

    def _scale(self) -> float:
        # In float16 the gradients that flow back through the activations would underflow to 0; float32 and bfloat16
        # have the range. A power of two changes no digit.
        return 1024.0 if str(self.trainer.precision).startswith("16") else 1.0

    def _takes_dataloader_idx(self) -> bool:
        step = self.module.validation_step
        return self.several and is_param_in_hook_signature(step, "dataloader_idx", min_args=3)

    @contextmanager
    def _as_validation(self, params: Sequence[torch.Tensor], seed: int) -> Iterator[dict[str, Any]]:
        trainer, module, logged = self.trainer, self.module, dict[str, Any]()

        def record(name: str, value: Any, *_: Any, **__: Any) -> None:
            logged[name] = value

        with ExitStack() as stack:
            stack.enter_context(preserved_rng(seed))
            stack.enter_context(preserved(module, opaque=_OPAQUE))
            stack.callback(setattr, trainer.state, "stage", trainer.state.stage)
            trainer.validating = True
            stack.callback(setattr, trainer, "loggers", trainer.loggers)
            trainer.loggers = [DummyLogger() for _ in trainer.loggers]
            for p in params:
                if not p.requires_grad:  # toggled off by manual optimization
                    stack.callback(p.requires_grad_, False)
                    p.requires_grad_(True)
            if torch.cuda.is_available() and any(isinstance(m, torch.nn.RNNBase) for m in module.modules()):
                # cuDNN's RNN kernels have a backward pass in train mode only.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            module.eval()
            module.__dict__["log"] = record  # `preserved` takes it out again
            yield logged

    def _loss(self, logged: dict[str, Any], output: Any) -> torch.Tensor:
        """The monitored value; what was returned stands in for it only where that is certain to be the same."""
        name = self.monitor.partition("/dataloader_idx_")[0]
        found = logged.get(self.monitor, logged.get(name))
        if found is None and isinstance(output, dict):
            found = output.get(name)
        returned = output.get("loss") if isinstance(output, dict) else output
        detached = not (isinstance(found, torch.Tensor) and found.requires_grad)
        if detached and isinstance(returned, torch.Tensor) and returned.requires_grad:
            if found is None and self.mode == "max":
                raise NotDifferentiableError(
                    f"{type(self.module).__name__}.validation_step returns a loss but does not log {self.monitor!r}, "
                    f"and mode='max' would make the loss large: log what is to be large under {self.monitor!r}."
                )
            if found is None or _same_number(found, returned):
                found = returned
        if not isinstance(found, torch.Tensor) or not found.requires_grad:
            raise NotDifferentiableError(self._diagnosis(found, logged, output))
        if found.numel() != 1:
            raise NotDifferentiableError(
                f"The validation loss {self.monitor!r} has shape {tuple(found.shape)}: log or return a scalar, for "
                "instance its mean()."
            )
        return found.reshape(())

    def _diagnosis(self, found: Any, logged: dict[str, Any], output: Any) -> str:
        name = type(self.module).__name__
        if found is None and output is None:
            keys = ", ".join(map(repr, logged)) or "nothing"
            return (
                f"{name}.validation_step neither logs {self.monitor!r} nor returns a loss (it logs {keys}). "
                f"Call self.log({self.monitor!r}, loss) there, return the loss, or name the right key with `monitor=`."
            )
        if isinstance(found, torch.Tensor) or (found is None and isinstance(output, torch.Tensor)):
            return (
                f"The validation loss {self.monitor!r} has no gradient: {name}.validation_step detaches it or computes "
                "it under torch.no_grad(). Log or return the loss tensor itself, without .detach() or .item()."
            )
        kind = type(found if found is not None else output).__name__
        return (
            f"The validation loss {self.monitor!r} is a {kind}, which cannot be differentiated. In "
            f"{name}.validation_step log the loss tensor itself, self.log({self.monitor!r}, loss), or monitor the key "
            "under which it is logged; accuracies, metric objects and Python numbers can stand beside it."
        )


def _same_number(logged: Any, returned: torch.Tensor) -> bool:
    """Whether a module logs `loss.item()` or `loss.detach()` and returns the loss itself."""
    if isinstance(logged, torch.Tensor) and logged.numel() == 1:
        logged = logged.item()
    if not isinstance(logged, (int, float)) or returned.numel() != 1:
        return False
    value = returned.item()
    return math.isclose(logged, value, rel_tol=1e-4, abs_tol=1e-7) or (math.isnan(logged) and math.isnan(value))
