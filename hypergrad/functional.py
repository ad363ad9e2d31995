"""The front door without Lightning: the hypergradient of a few inner steps, with everything put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from hypergrad.autodiff import gradient
from hypergrad.errors import ConfigurationError, NotDifferentiableError
from hypergrad.estimators.base import Estimator
from hypergrad.estimators.online import Online
from hypergrad.hyperparameter import OptimizerHyperparameter, resolve
from hypergrad.isolation import preserved
from hypergrad.rng import preserved_rng
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
        gradient_evaluations: forward-backward passes spent: one per inner step and one for the validation loss.
    """

    grads: dict[str, torch.Tensor]
    value: torch.Tensor
    cosines: dict[str, torch.Tensor]
    gradient_evaluations: int


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
            earlier ones constant.

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
    resolved = resolve(optimizer, hyperparameters)
    # `optimizer` first: its parameters need not be reachable from `model`.
    with preserved(optimizer, model, parameters=True), preserved_rng():
        tracker = (estimator or Online()).track(optimizer, resolved)
        for loss in train_losses:
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(_scalar(loss(model), "train_losses"))
            tracker.before_step()
            raw_step(optimizer)
            tracker.after_step()
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
        gradient_evaluations=len(train_losses) + 1,
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
