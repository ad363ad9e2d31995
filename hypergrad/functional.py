"""The front door without Lightning: the hypergradient of a few inner steps, with everything put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from hypergrad.autodiff import gradient
from hypergrad.errors import ConfigurationError, NotDifferentiableError
from hypergrad.estimators.base import Contraction, Estimator
from hypergrad.estimators.online import Online
from hypergrad.hyperparameter import OptimizerHyperparameter, resolve
from hypergrad.isolation import preserved
from hypergrad.rng import RngState, preserved_rng
from hypergrad.torch_internals import raw_step

ModelT = TypeVar("ModelT", bound=torch.nn.Module)
Loss = Callable[[ModelT], torch.Tensor]


@dataclass(frozen=True)
class HypergradientResult(Generic[ModelT]):
    """What `hypergradient` found.

    Shapes are `()` where the optimizer has one param group and `(groups,)` where it has several.

    Args:
        grads: d(validation loss)/d(value) by hyperparameter name, in natural units (per unit of lr, not of log lr).
        value: the validation loss after the inner steps, shape `()`.
        cosines: the cosine between the validation gradient and d(parameters)/d(value): in [-1, 1], free of scale.
            Near 0 the hyperparameter hardly matters for this loss, or the gradients are mostly noise.
        gradient_evaluations: losses evaluated with their gradient: one per inner step, those that the estimator needs
            beside them, and one for the validation loss. Hessian-vector products of `Exact` come on top.
        status: `"ok"`, or what is wrong with the numbers and what to do about it.
    """

    grads: dict[str, torch.Tensor]
    value: torch.Tensor
    cosines: dict[str, torch.Tensor]
    gradient_evaluations: int
    status: str = "ok"


def hypergradient(
    model: ModelT,
    optimizer: torch.optim.Optimizer,
    train_losses: Sequence[Loss[ModelT]],
    val_loss: Loss[ModelT],
    hyperparameters: Sequence[str | OptimizerHyperparameter] = ("lr", "weight_decay"),
    estimator: Estimator | None = None,
) -> HypergradientResult[ModelT]:
    """d(validation loss)/d(hyperparameters) after one optimizer step per training loss.

    Model, optimizer and the global RNG streams are left exactly as they were found, also when a loss raises.

    Args:
        model: the model that the optimizer trains, in train or eval mode as the losses need it.
        optimizer: an optimizer over parameters of the model, at any point of its run.
        train_losses: callables `model -> scalar tensor`, one inner optimizer step each, in order.
        val_loss: a callable `model -> scalar tensor`.
        hyperparameters: names such as `"lr"` or `"betas[0]"`.
        estimator: how to differentiate. Default: `Online()`, which differentiates the last step and holds the
            earlier ones constant; `Forward()` differentiates them all.

    Raises:
        ConfigurationError: for no training loss at all.
        NotDifferentiableError: for a loss that is no scalar, or that no gradient reaches.
        HyperparameterError, UnsupportedOptimizerError: see `Estimator.track`.

    >>> theta = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> torch.nn.init.ones_(theta.weight).tolist()
    [[1.0]]
    >>> sgd = torch.optim.SGD(theta.parameters(), lr=0.1)
    >>> half_square = lambda model: 0.5 * model.weight.square().sum()
    >>> result = hypergradient(theta, sgd, [half_square], half_square, ["lr"])  # theta' = 1 - lr
    >>> round(result.grads["lr"].item(), 12)  # d/d(lr) of (1 - lr)**2 / 2
    -0.9
    """
    if not train_losses:
        raise ConfigurationError("`train_losses` is empty: pass one callable per inner step, `model -> scalar tensor`.")
    resolved, chosen = resolve(optimizer, hyperparameters), estimator or Online()
    # `optimizer` first: its parameters need not be reachable from `model`.
    with preserved(optimizer, model, parameters=True), preserved_rng():
        tracker = chosen.track(optimizer, resolved)
        evaluations = 0
        for loss in train_losses:
            optimizer.zero_grad(set_to_none=True)
            again = _Again(model, loss) if chosen.needs_training_loss else None
            torch.autograd.backward(_scalar(loss(model), "train_losses"))
            tracker.before_step(again)
            raw_step(optimizer)
            tracker.after_step()
            evaluations += 1 if again is None else 1 + again.calls
        if not tracker.params:
            raise NotDifferentiableError(
                "The last training loss gave no gradient to any parameter of the optimizer: does the optimizer hold "
                "the parameters of this model, and do they require gradients?"
            )
        value = _scalar(val_loss(model), "val_loss")
        gradients = gradient(value, tracker.params, model)
        contraction = tracker.contract(dict(zip(tracker.params, gradients, strict=True)))
    scales = {name: norms * contraction.gradient_norms for name, norms in contraction.tangent_norms.items()}
    return HypergradientResult(
        grads={name: _squeezed(h) for name, h in contraction.hypergradients.items()},
        value=value.detach(),
        cosines={
            name: _squeezed(torch.where(scales[name] > 0, h / scales[name], torch.zeros_like(h)))
            for name, h in contraction.hypergradients.items()
        },
        gradient_evaluations=evaluations + 1,
        status=_status(value, contraction, len(train_losses)),
    )


class _Again(Generic[ModelT]):
    """Evaluates a training loss as the real step did: from the random streams and buffers that stand at creation."""

    def __init__(self, model: ModelT, loss: Loss[ModelT]) -> None:
        self._model, self._loss = model, loss
        self._rng = RngState.capture()
        self._buffers = [b.detach().clone() for b in model.buffers()]
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        with preserved_rng(), preserved(self._model):
            self._rng.restore()
            with torch.no_grad():
                for now, then in zip(self._model.buffers(), self._buffers, strict=True):
                    now.copy_(then)
            return _scalar(self._loss(self._model), "train_losses")


def _status(value: torch.Tensor, contraction: Contraction, steps: int) -> str:
    if not torch.isfinite(value):
        return f"the validation loss is {value.item()} after {steps} steps: the training itself diverges"
    bad = [name for name, h in contraction.hypergradients.items() if not bool(torch.isfinite(h).all())]
    if not bad:
        return "ok"
    return (
        f"d/d({', '.join(bad)}) is not finite after {steps} steps: the run amplifies a small change beyond what the "
        "dtype can hold. Use fewer steps, Forward(decay=0.9) or a smaller learning rate"
    )


def _scalar(loss: object, name: str) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise NotDifferentiableError(f"`{name}` must return a scalar tensor, but got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise NotDifferentiableError(
            f"`{name}` must return a scalar tensor, but got shape {tuple(loss.shape)}: reduce it, say by mean()."
        )
    if not loss.requires_grad:
        raise NotDifferentiableError(
            f"`{name}` returned a tensor without a graph: no gradient reaches the parameters. "
            "Do not call .item(), .detach() or torch.no_grad() on the way to it."
        )
    return loss.reshape(())


def _squeezed(values: torch.Tensor) -> torch.Tensor:
    return values[0] if values.numel() == 1 else values
