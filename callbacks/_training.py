"""The user's `training_step` as a loss that can be evaluated again: same batch, same randomness, same buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.parallel import DistributedDataParallel

from hypergrad import (
    ActivationPattern,
    ClippedLoss,
    Clipping,
    ConfigurationError,
    HeldLoss,
    NotDifferentiableError,
    RngState,
    SharedLoss,
    Tracker,
    loss_hyperparameters,
    parts_of_others,
    preserved_rng,
)
from hypergrad.callbacks._agreement import anyone, mean, mean_rows
from hypergrad.callbacks._quietly import quietly

_ADVICE = ". Use Online() with hyperparameters of the optimizer only, which takes the step as it is."


@dataclass(frozen=True)
class Call:
    """One call of `training_step`: what it was given, what stood where, and what it found.

    Args:
        pattern: the pieces that its loss was on, where somebody wants to know.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RngState
    buffers: dict[str, torch.Tensor]
    progress: list[dict[str, Any]]
    value: torch.Tensor
    pattern: ActivationPattern | None = None


class TrainingLoss:
    """Stands around `training_step` during a fit and remembers each call until the optimizer steps.

    Args:
        trainer, module: of the fit.
        exact: whether the gradient of a step must be that of the loss itself, not changed by a hook.
        for_steps: whether steps are taken with the gradients that it gives, which a hook must not have taken away, nor
            can the user do anything about it.

    Raises:
        ConfigurationError: where the gradient of a step is not that of the losses that `training_step` returned.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, *, exact: bool = True, for_steps: bool = False
    ) -> None:
        _check(module, exact=exact)
        self._exact, self._for_steps = exact, for_steps
        self._advice = "" if for_steps else _ADVICE
        self.about_to_run: Callable[[], None] | None = None  # hears of every call, before it
        self.trackers: list[Tracker] = []  # for which steps are evaluated again
        self.evaluations = 0
        self.trainer = trainer
        self._module = module
        self._calls: list[Call] = []
        self._went_back: list[bool] = []  # of each call, whether its loss has been differentiated
        self._checked = False
        self._step: Callable[..., Any] = module.training_step
        self._own = module.__dict__.get("training_step")  # of the instance, which is rare
        self._learned = {id(m.value) for m in loss_hyperparameters(module).values()}
        module.__dict__["training_step"] = _Recorder(self, module, self._step)

    @property
    def clipping(self) -> Clipping | None:
        """What the Trainer does to the gradients before a step."""
        limit = self.trainer.gradient_clip_val
        if not limit:
            return None
        by_value = str(self.trainer.gradient_clip_algorithm or "norm").rpartition(".")[2].lower() == "value"
        return Clipping(float(limit), "value" if by_value else "norm")

    @property
    def loss_scale(self) -> float:
        """What keeps gradients that flow through float16 from underflow; a power of two changes no digit."""
        return 1024.0 if str(self.trainer.precision).startswith("16") else 1.0

    @property
    def ranks(self) -> int:
        """How many processes evaluate a part of the loss of each step."""
        return self.trainer.world_size

    def mean(self, rows: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """The mean over ranks, see `hypergrad.SharedLoss`."""
        return mean_rows(self.trainer, rows, like)

    def synchronized(self, buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the first rank, in place, where every step begins with them."""
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and model.broadcast_buffers:
            for buffer in buffers.values():
                torch.distributed.broadcast(buffer, src=0)
        return buffers

    def detach(self) -> None:
        """Leave the module as it was found."""
        if self._own is not None:
            self._module.__dict__["training_step"] = self._own
        else:
            self._module.__dict__.pop("training_step", None)
        self._calls.clear()
        self._went_back.clear()

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `training_step`, and remember the call if it is one of training that found a loss."""
        if not self.trainer.training:  # validation_step may call it too
            return self._step(*args, **kwargs)
        if self.about_to_run is not None:
            self.about_to_run()
        rng, buffers = RngState.capture(), self.buffers()
        progress = [state.state_dict() for state in _progress(self.trainer)]
        output = self._step(*args, **kwargs)
        loss = _loss_of(output)
        if loss is not None:
            wanted = any(tracker.needs_pattern for tracker in self.trackers)
            pattern = ActivationPattern(loss) if wanted else None
            self._calls.append(Call(args, kwargs, rng, buffers, progress, loss.detach(), pattern))
            self._went_back.append(False)
        return output

    def gradients_cleared(self) -> None:
        """The gradients are set to zero: of what was called before, only the loss that is about to be used counts."""
        del self._calls[:-1], self._went_back[:-1]

    def went_back(self) -> None:
        """The loss of the last call has been differentiated: its gradients are in the coming step."""
        if self._went_back:
            self._went_back[-1] = True

    def of_this_step(self) -> StepLoss | None:
        """The loss whose gradient the coming optimizer step takes: of all batches since the last step, accumulated.

        None where `training_step` gave none, or none that was differentiated: `StochasticWeightAveraging` ends with
        an epoch of forward passes.

        Raises:
            NotDifferentiableError: the first time, if another evaluation gives another loss.
            ConfigurationError: the first time, if the gradients of the step are not those of that loss.
        """
        calls = [call for call, used in zip(self._calls, self._went_back, strict=True) if used]
        self._calls, self._went_back = [], []
        if not calls:
            return None
        # The number of accumulated batches may follow a schedule of its own.
        again = StepLoss(self, calls, self.trainer.accumulate_grad_batches)
        if not self._checked and not anyone(self.trainer, not bool(calls[-1].value.isfinite())):
            self._check_replay(calls, again)
            self._checked = True
        return again

    def evaluate(
        self, call: Call, buffers: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a call, from the buffers of then or from other ones; and what it makes of those other ones."""
        trainer, module = self.trainer, self._module
        before = {n for n, _ in module.named_buffers()}
        with (
            preserved_rng(),
            quietly(trainer, module),
            _at(trainer, call.progress),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            call.rng.restore()
            self._put_buffers(call.buffers if buffers is None else buffers)
            with trainer.precision_plugin.train_step_context():
                output = self._step(*call.args, **call.kwargs)
            # Inside, each has memory of its own: which are parts of others was to be seen outside.
            after = {} if buffers is None else self.buffers()
            after = {n: b for n, b in after.items() if n in (buffers or ()) or n not in before}
        loss = _loss_of(output)
        if loss is None or not loss.requires_grad:
            raise NotDifferentiableError(
                f"{type(module).__name__}.training_step returns {type(output).__name__} without a loss to "
                "differentiate again: return the loss tensor, or a dict with it as 'loss'."
            )
        return loss.reshape(()), after

    def buffers(self) -> dict[str, torch.Tensor]:
        """Copies of the module's buffers, by name, but for those that are part of a parameter or of another buffer."""
        # Values of hyperparameters are no state of the step: they are what it is differentiated with respect to.
        buffers = {n: b for n, b in self._module.named_buffers() if id(b) not in self._learned}
        parts = parts_of_others(buffers, self._module.parameters()) if buffers else set()
        return {n: b.detach().clone() for n, b in buffers.items() if n not in parts}

    @torch.no_grad()
    def _put_buffers(self, then: dict[str, torch.Tensor]) -> None:
        for name, buffer in list(self._module.named_buffers()):
            if name not in then:
                continue
            if buffer.shape == then[name].shape:
                buffer.copy_(then[name])
            else:  # a queue that grows; `quietly` puts the present one back
                owner, _, leaf = name.rpartition(".")
                setattr(self._module.get_submodule(owner), leaf, then[name].clone())

    def _check_replay(self, calls: list[Call], again: Callable[[], torch.Tensor]) -> None:
        name = type(self._module).__name__
        half = str(self.trainer.precision) not in ("32-true", "64-true", "32", "64")
        tolerance = 0.02 if half else 1e-3
        value, expected = self.evaluate(calls[-1])[0].item(), calls[-1].value.item()
        # Ranks have other batches, and must go on alike.
        if anyone(self.trainer, not math.isclose(value, expected, rel_tol=tolerance, abs_tol=1e-6)):
            raise NotDifferentiableError(
                f"{name}.training_step gives another loss ({value:.6g}, not {expected:.6g}) when it is run again on "
                "the same batch with the same random streams and buffers: it changes its batch in place, or depends "
                f"on something that changes, such as a random generator of its own{self._advice}"
            )
        if not self._exact:
            return
        # What no optimizer moves may have any gradient.
        stepped = [p for o in self.trainer.optimizers for g in o.param_groups for p in g["params"] if p.requires_grad]
        params = [p for p in dict.fromkeys(stepped) if p.grad is not None or self._for_steps]
        if not params:
            return
        scale = self.loss_scale
        own = torch.autograd.grad(scale * again(), params, allow_unused=True, materialize_grads=True)
        grads: Sequence[Any] = self.mean([g if scale == 1.0 else g / scale for g in own], params)
        if self.clipping is not None:
            grads = self.clipping.applied(grads)
        pairs = zip(grads, params, strict=True)
        off = sum(float((g if p.grad is None else g - p.grad).norm().square()) for g, p in pairs)
        size = sum(float(p.grad.norm().square()) for p in params if p.grad is not None)
        if not math.sqrt(off) <= 10.0 * tolerance * math.sqrt(size) + 1e-12:
            raise ConfigurationError(
                f"The gradients that the optimizer of {name} gets are not those of the loss that training_step "
                f"returns: they are clipped, scaled or changed by a hook on their way{self._advice}"
            )


class StepLoss(HeldLoss):
    """The loss of one optimizer step: called, it is evaluated as the step saw it, on this rank's batches."""

    def __init__(self, owner: TrainingLoss, calls: list[Call], accumulated: int) -> None:
        self.calls, self.accumulated = calls, accumulated
        self._owner = owner

    def as_stepped(self) -> Callable[[], torch.Tensor]:
        """The loss whose gradient the step takes: that of all ranks, clipped."""
        loss: Callable[[], torch.Tensor] = self
        if self._owner.ranks > 1:
            loss = SharedLoss(loss, self._owner.mean)
        clipping = self._owner.clipping
        return loss if clipping is None else ClippedLoss(loss, clipping)

    @property
    def value(self) -> float:
        """What the step found, the mean over ranks."""
        found = torch.stack([call.value.float().reshape(()) for call in self.calls]).sum() / self.accumulated
        return float(mean(self._owner.trainer, found))

    def __call__(self) -> torch.Tensor:
        self._owner.evaluations += 1
        losses = [self._owner.evaluate(call)[0] for call in self.calls]
        return torch.stack(losses).sum() / self.accumulated

    @property
    def rounding(self) -> float:
        """See `HeldLoss.rounding`."""
        return max(math.inf if call.pattern is None else call.pattern.rounding for call in self.calls)

    def held(self) -> tuple[torch.Tensor, bool]:
        """See `HeldLoss.held`."""
        self._owner.evaluations += 1
        losses = [self._owner.evaluate(call)[0] for call in self.calls]
        pairs = zip(self.calls, losses, strict=True)
        are_held = [call.pattern is not None and call.pattern.hold(loss) for call, loss in pairs]
        return torch.stack(losses).sum() / self.accumulated, all(are_held)

    def shrink(self) -> None:
        """See `HeldLoss.shrink`."""
        for call in self.calls:
            if call.pattern is not None:
                call.pattern.shrink()

    def gradients(
        self, params: Sequence[torch.Tensor]
    ) -> tuple[float, list[torch.Tensor | None], dict[str, torch.Tensor]]:
        """The same batches and randomness for other weights and buffers, those that stand in the module now.

        Returns:
            the loss and its gradients (None where it does not depend on a parameter), means over ranks, and the
            buffers afterwards.
        """
        owner = self._owner
        owner.evaluations += 1
        scale = owner.loss_scale
        buffers, value = owner.synchronized(owner.buffers()), 0.0
        total: list[torch.Tensor | None] = [None] * len(params)
        for call in self.calls:
            loss, buffers = owner.evaluate(call, buffers)
            grads = torch.autograd.grad(loss * (scale / self.accumulated), params, allow_unused=True)
            total = [g if t is None else t if g is None else t + g for t, g in zip(total, grads, strict=True)]
            value += float(loss.detach()) / self.accumulated
        value = float(mean(owner.trainer, torch.tensor(value)))
        total = owner.mean([t if t is None or scale == 1.0 else t / scale for t in total], params)
        return value, total, buffers


class _Recorder:
    """What stands in for `training_step`: a copy of the module, or one that is pickled, has the step of its own."""

    # No __dict__: nothing here is state of the module.
    __slots__ = ("__wrapped__", "_loss", "_module")

    def __init__(self, loss: TrainingLoss, module: pl.LightningModule, step: Callable[..., Any]) -> None:
        self._loss, self._module = loss, module
        self.__wrapped__ = step  # Lightning looks at its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loss.called(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(memo.get(id(self._module), self._module), "training_step", None)

    def __reduce__(self) -> Any:
        return getattr, (self._module, "training_step")


@contextmanager
def _at(trainer: pl.Trainer, progress: list[dict[str, Any]]) -> Iterator[None]:
    """The Trainer counts steps, batches and epochs as it did then, inside the block."""
    states = _progress(trainer)
    now = [state.state_dict() for state in states]
    try:
        for state, then in zip(states, progress, strict=True):
            state.load_state_dict(then)
        yield
    finally:
        for state, then in zip(states, now, strict=True):
            state.load_state_dict(then)


def _progress(trainer: pl.Trainer) -> list[Any]:
    loop = trainer.fit_loop
    steps = loop.epoch_loop.automatic_optimization.optim_progress
    return [loop.epoch_progress, loop.epoch_loop.batch_progress, steps]


def _loss_of(output: Any) -> torch.Tensor | None:
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, torch.Tensor) else None


def _check(module: pl.LightningModule, *, exact: bool) -> None:
    why = None
    if not module.automatic_optimization:
        why = "manual optimization, where a step may take its gradient from anywhere"
    elif exact and is_overridden("configure_gradient_clipping", module):
        why = f"{type(module).__name__}.configure_gradient_clipping, which changes the gradient on its way"
    if why is not None:
        raise ConfigurationError(
            "This estimator, or a hyperparameter in the loss, evaluates the training loss of a step again, which is "
            f"not available with {why}. Use Online() and hyperparameters of the optimizer only."
        )
