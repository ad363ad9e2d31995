"""The user's `validation_step` as a differentiable loss, run without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from hypergrad import ConfigurationError, NotDifferentiableError, gradient, preserved_rng, requiring_grad
from hypergrad.callbacks._agreement import mean
from hypergrad.callbacks._batches import BatchStream
from hypergrad.callbacks._lightning import to_device
from hypergrad.callbacks._quietly import quietly

USUAL_MONITOR = "val_loss"


@dataclass(frozen=True)
class ValidationLoss:
    """Evaluates what `validation_step` logs under `monitor`, or returns, with its gradient.

    Runs as the Trainer's validation loop would (eval mode, precision, device transfer, `trainer.validating`).
    Afterwards module, metrics, buffers and loggers are as before, also if it raises; RNG streams are the caller's.

    Args:
        monitor: the key under which the module logs its validation loss.
        mode: `"min"` or `"max"`; a returned loss that was not logged can only be minimised.
        dataloader_idx: which of the Trainer's validation loaders the batches come from.
        several: whether the Trainer has more than one.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    monitor: str
    mode: str = "min"
    dataloader_idx: int = 0
    several: bool = False
    _others: list[str] = field(default_factory=list, init=False)  # keys that are logged where `monitor` is not

    def gradient(
        self, batch: Any, batch_idx: int, params: Sequence[torch.Tensor], *, any_of: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The loss, detached, and its gradient with respect to `params`, on one batch as the loader gave it.

        Args:
            any_of: it must depend on one of them at least.

        Raises:
            NotDifferentiableError: if no gradient can be had; the message says why and how to mend it.
        """
        with self._as_validation(params) as logged:
            batch = to_device(self.trainer, self.module, batch, self.dataloader_idx)
            with torch.inference_mode(False), torch.enable_grad():
                with self.trainer.precision_plugin.val_step_context():
                    output = self.module.validation_step(*self._arguments(batch, batch_idx))
                loss = self._loss(logged, output)
                # In float16 the gradients that flow back through the activations would underflow to 0; a power of
                # two changes no digit.
                scale = 1024.0 if str(self.trainer.precision).startswith("16") else 1.0
                gradients = gradient(loss, params, self.module, scale=scale, any_of=any_of)
        return loss.detach(), gradients

    def value(self, batch: Any, batch_idx: int) -> float:
        """The monitored value alone, without a graph, on one batch as the loader gave it."""
        with self._as_validation(()) as logged:
            batch = to_device(self.trainer, self.module, batch, self.dataloader_idx)
            with torch.inference_mode(False), torch.no_grad(), self.trainer.precision_plugin.val_step_context():
                output = self.module.validation_step(*self._arguments(batch, batch_idx))
            found: Any = self._logged(logged, output)
            # `check` has seen that one of the two is there: a loss that is returned, but not logged.
            found = found if found is not None else output.get("loss") if isinstance(output, dict) else output
            return float(found)

    def check(self, batch: Any, params: Sequence[torch.Tensor]) -> None:
        """Try it once, at the start: whatever cannot work is said now.

        Raises:
            ConfigurationError: if `validation_step` changes parameters, which cannot be told from training.
        """
        for name, part in self.module.named_modules():
            # By the time of this call the sanity check may have done it to all rows of the first batch.
            if isinstance(part, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and part.max_norm is not None:
                raise ConfigurationError(
                    f"The embedding {name!r} has max_norm={part.max_norm:g}: it scales rows of its weight whenever it "
                    "looks them up, so that evaluations for hypergradients would change the training. Leave "
                    "`max_norm` out, and scale what it returns, or let weight decay keep it small."
                )
        before = [p.detach().clone() for p in self.module.parameters()]
        self.gradient(batch, 0, params, any_of=True)
        if self._others and self.monitor != USUAL_MONITOR:
            rank_zero_warn(
                f"HyperGradient(monitor={self.monitor!r}): {type(self.module).__name__}.validation_step logs "
                f"{', '.join(map(repr, self._others))} but nothing under that key, so that the loss that it returns is "
                "tuned on. If that is not meant, name the right key."
            )
        for (name, p), old in zip(self.module.named_parameters(), before, strict=True):
            if not torch.allclose(p.detach(), old, 0.0, 0.0, equal_nan=True):
                with torch.no_grad():
                    p.copy_(old)
                raise ConfigurationError(
                    f"{type(self.module).__name__} changes its parameter {name!r} when it is evaluated, in "
                    "validation_step or on eval(): evaluations for hypergradients would change the training. Keep "
                    "averaged or merged weights in buffers, or update them in on_validation_end."
                )

    @cached_property
    def _own_hooks(self) -> tuple[bool, bool]:
        """Whether the module overrides `on_validation_model_eval`, and `on_validation_epoch_start`."""
        hooks = ("on_validation_model_eval", "on_validation_epoch_start")
        mine, others = (is_overridden(hook, self.module) for hook in hooks)
        return mine, others

    def _arguments(self, batch: Any, batch_idx: int) -> list[Any]:
        """What the user's signature asks for, as the validation loop passes it."""
        takes_batch_idx, takes_dataloader_idx = _signature(
            getattr(self.module.validation_step, "__func__", self.module.validation_step), self.several
        )
        arguments = [batch]
        if takes_batch_idx:
            arguments.append(batch_idx)
        if takes_dataloader_idx:
            arguments.append(self.dataloader_idx)
        return arguments

    @contextmanager
    def _as_validation(self, params: Sequence[torch.Tensor]) -> Iterator[dict[str, Any]]:
        trainer, module = self.trainer, self.module
        with ExitStack() as stack:
            # First, for `preserved` leaves tensors that require a gradient where they are: hyperparameters in the loss,
            # and parameters that manual optimization has toggled off.
            stack.enter_context(requiring_grad(params))
            logged = stack.enter_context(quietly(trainer, module))
            stack.callback(setattr, trainer.state, "stage", trainer.state.stage)
            trainer.validating = True
            on_cuda = trainer.strategy.root_device.type == "cuda"
            if on_cuda and any(isinstance(m, torch.nn.RNNBase) for m in module.modules()):
                # cuDNN's RNN kernels have a backward pass in train mode only.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            own_eval, own_epoch_start = self._own_hooks
            if own_eval:
                module.on_validation_model_eval()
                stack.callback(module.on_validation_model_train)
            else:
                module.eval()
            if own_epoch_start:  # where many modules make their lists
                module.on_validation_epoch_start()
            yield logged

    def _loss(self, logged: dict[str, Any], output: Any) -> torch.Tensor:
        """The monitored value; what was returned stands in for it only where that is certain to be the same."""
        found = self._logged(logged, output)
        returned = output.get("loss") if isinstance(output, dict) else output
        detached = not (isinstance(found, torch.Tensor) and found.requires_grad)
        if detached and isinstance(returned, torch.Tensor) and returned.requires_grad:
            if found is None and self.mode == "max":
                raise NotDifferentiableError(
                    f"{type(self.module).__name__}.validation_step returns a loss but does not log {self.monitor!r}, "
                    f"and mode='max' would make the loss large: log what is to be large under {self.monitor!r}."
                )
            self._others[:] = logged if found is None else []
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

    def _logged(self, logged: dict[str, Any], output: Any) -> Any:
        """What stands under the monitored key, in what was logged or in a dict that was returned."""
        name = self.monitor.partition("/dataloader_idx_")[0]
        found = logged.get(self.monitor, logged.get(name))
        return output.get(name) if found is None and isinstance(output, dict) else found

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


class Score:
    """The mean validation loss over a few batches and all ranks, the same with the same randomness at every call.

    Args:
        loss: how a batch is evaluated.
        stream: where the batches come from; read once, at the start.
        batches: how many, at least 1.
    """

    def __init__(self, loss: ValidationLoss, stream: BatchStream, batches: int) -> None:
        self.evaluations = 0
        self._loss = loss
        self._sign = 1.0 if loss.mode == "min" else -1.0
        self._batches: list[Any] = []
        for _ in range(batches):
            with stream.next() as batch:
                self._batches.append(batch)

    def __call__(self) -> float:
        """The mean, negated where a larger one is better: the lower the better. NaN or infinity where one is that."""
        self.evaluations += len(self._batches)
        total = 0.0
        for i, batch in enumerate(self._batches):
            with preserved_rng(i):
                total += self._loss.value(batch, i)
        found = torch.tensor(total / len(self._batches), dtype=torch.float64)
        return self._sign * float(mean(self._loss.trainer, found))


@lru_cache(maxsize=8)  # inspecting a signature costs more than a small network's forward pass
def _signature(step: Callable[..., Any], several: bool) -> tuple[bool, bool]:
    """Whether `validation_step` takes `batch_idx`, and `dataloader_idx`."""
    named = is_param_in_hook_signature(step, "dataloader_idx", explicit=True)
    third = several and is_param_in_hook_signature(step, "dataloader_idx", min_args=3)
    return is_param_in_hook_signature(step, "batch_idx", min_args=2), named or third


def _same_number(logged: Any, returned: torch.Tensor) -> bool:
    """Whether a module logs `loss.item()` or `loss.detach()` and returns the loss itself."""
    if isinstance(logged, torch.Tensor) and logged.numel() == 1:
        logged = logged.item()
    if not isinstance(logged, (int, float)) or returned.numel() != 1:
        return False
    value = returned.item()
    return math.isclose(logged, value, rel_tol=1e-4, abs_tol=1e-7) or (math.isnan(logged) and math.isnan(value))
