"""The user's `training_step` as a loss that can be evaluated again: same batch, same randomness, same buffers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from hypergrad import ConfigurationError, NotDifferentiableError, RngState, loss_hyperparameters, preserved_rng
from hypergrad.callbacks._quietly import quietly


@dataclass(frozen=True)
class _Call:
    """One call of `training_step`: what it was given, and what it found."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RngState
    buffers: dict[str, torch.Tensor]


class TrainingLoss:
    """Stands around `training_step` during a fit and remembers each call until the optimizer steps.

    Args:
        trainer, module: of the fit.

    Raises:
        ConfigurationError: where the gradient of a step is not that of the losses that `training_step` returned.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        _check(trainer, module)
        self.evaluations = 0
        self._trainer = trainer
        self._module = module
        self._calls: list[_Call] = []
        self._checked = False
        self._value: torch.Tensor | None = None
        self._step: Callable[..., Any] = module.training_step
        self._learned = {id(m.value) for m in loss_hyperparameters(module).values()}

        @functools.wraps(self._step)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            call = _Call(args, kwargs, RngState.capture(), self._buffers())
            output = self._step(*args, **kwargs)
            loss = _loss_of(output)
            if loss is not None:  # None skips a batch
                self._calls.append(call)
                self._value = loss.detach()
            return output

        module.__dict__["training_step"] = recorded

    def detach(self) -> None:
        """Leave the module as it was found."""
        self._module.__dict__.pop("training_step", None)
        self._calls.clear()

    def of_this_step(self) -> Callable[[], torch.Tensor]:
        """The loss whose gradient the coming optimizer step takes: of all batches since the last step, accumulated.

        Raises:
            NotDifferentiableError: the first time, if another evaluation gives another loss.
            ConfigurationError: the first time, if the gradients of the step are not those of that loss.
        """
        calls, self._calls = self._calls, []

        def again() -> torch.Tensor:
            self.evaluations += 1
            losses = [self._evaluate(call) for call in calls]
            return torch.stack(losses).sum() / self._trainer.accumulate_grad_batches

        if not self._checked:
            self._check_replay(calls, again)
            self._checked = True
        return again

    def _evaluate(self, call: _Call) -> torch.Tensor:
        trainer, module = self._trainer, self._module
        with preserved_rng(), quietly(trainer, module), torch.inference_mode(False), torch.enable_grad():
            call.rng.restore()
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    if name in call.buffers:
                        buffer.copy_(call.buffers[name])
            with trainer.precision_plugin.train_step_context():
                output = self._step(*call.args, **call.kwargs)
        loss = _loss_of(output)
        if loss is None or not loss.requires_grad:
            raise NotDifferentiableError(
                f"{type(module).__name__}.training_step returns {type(output).__name__} without a loss to "
                "differentiate again: return the loss tensor, or a dict with it as 'loss'."
            )
        return loss.reshape(())

    def _buffers(self) -> dict[str, torch.Tensor]:
        # Values of hyperparameters are no state of the step: they are what it is differentiated with respect to.
        return {n: b.detach().clone() for n, b in self._module.named_buffers() if id(b) not in self._learned}

    def _check_replay(self, calls: list[_Call], again: Callable[[], torch.Tensor]) -> None:
        if not calls or self._value is None:
            return
        name = type(self._module).__name__
        half = str(self._trainer.precision) not in ("32-true", "64-true", "32", "64")
        tolerance = 0.02 if half else 1e-3
        value, expected = self._evaluate(calls[-1]).item(), self._value.item()
        if not math.isclose(value, expected, rel_tol=tolerance, abs_tol=1e-6):
            raise NotDifferentiableError(
                f"{name}.training_step gives another loss ({value:.6g}, not {expected:.6g}) when it is run again on "
                "the same batch with the same random streams and buffers: it changes its batch in place or depends on "
                "something outside the module. Use Online(), which needs no second run."
            )
        params = [p for p in self._module.parameters() if p.requires_grad and p.grad is not None]
        grads = torch.autograd.grad(again(), params, allow_unused=True, materialize_grads=True)
        off = sum(float((g - p.grad).norm().square()) for g, p in zip(grads, params, strict=True) if p.grad is not None)
        size = sum(float(p.grad.norm().square()) for p in params if p.grad is not None)
        if not math.sqrt(off) <= 10.0 * tolerance * math.sqrt(size) + 1e-12:
            raise ConfigurationError(
                f"The gradients that the optimizer of {name} gets are not those of the loss that training_step "
                "returns: they are clipped, scaled or changed by a hook on their way. Use Online(), which takes them "
                "as they are."
            )


def _loss_of(output: Any) -> torch.Tensor | None:
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, torch.Tensor) else None


def _check(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    why = None
    if not module.automatic_optimization:
        why = "manual optimization, where a step may take its gradient from anywhere"
    elif trainer.gradient_clip_val:
        why = f"gradient_clip_val={trainer.gradient_clip_val}, which changes the gradient on its way"
    elif type(trainer.strategy) is not SingleDeviceStrategy:
        why = f"{type(trainer.strategy).__name__}"
    if why is not None:
        raise ConfigurationError(
            "This estimator, or a hyperparameter in the loss, evaluates the training loss of a step again, which is "
            f"not available with {why}. Use Online() and hyperparameters of the optimizer only."
        )
