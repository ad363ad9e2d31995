"""The front door without Lightning: the hypergradient of a few inner steps, with everything put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from hypergrad.activation_pattern import ActivationPattern
from hypergrad.autodiff import gradient, requiring_grad
from hypergrad.curvature import Evaluation, HeldAt, TakenStep
from hypergrad.errors import ConfigurationError, HyperparameterError, NotDifferentiableError
from hypergrad.estimators.base import Contraction, Estimator, Tracker
from hypergrad.estimators.online import Online
from hypergrad.hyperparameter import OptimizerHyperparameter, resolve
from hypergrad.isolation import preserved
from hypergrad.loss_hyperparameter import Hyperparameter, loss_hyperparameters
from hypergrad.optimizer.step import check_optimizer
from hypergrad.rng import RngState, preserved_rng
from hypergrad.schedule import Schedule
from hypergrad.scopes import reference, split_where_asked, units
from hypergrad.torch_internals import raw_step

ModelT = TypeVar("ModelT", bound=torch.nn.Module)
Loss = Callable[[ModelT], torch.Tensor]
Name = str | OptimizerHyperparameter | Schedule | Hyperparameter


@dataclass(frozen=True)
class HypergradientResult(Generic[ModelT]):
    """What `hypergradient` found.

    Of an optimizer's hyperparameter, shapes are `()` with one param group or `per="shared"`, `(groups,)` with several,
    and `(tensors,)` with `per="tensor"`, in the order of the param groups; of a `Schedule` `(knots,)`; of a
    `Hyperparameter` in the loss, those of its value.

    Args:
        grads: d(validation loss)/d(value) by hyperparameter name, in natural units (per unit of lr, not of log lr).
        slopes: the same per unit of each hyperparameter's coordinate (per unit of log lr): what a step in that
            coordinate goes against, as in `module.move(-0.1 * slope / slope.abs().max())` and `Schedule.moved`.
        value: the validation loss after the inner steps, shape `()`.
        cosines: the cosine between the validation gradient and d(parameters)/d(value): in [-1, 1], free of scale.
            Near 0 the hyperparameter hardly matters for this loss, or the gradients are mostly noise. Only where the
            estimator goes forwards.
        gradient_evaluations: losses evaluated, nearly all with their gradient: one per inner step, those that the
            estimator needs beside them, and one for the validation loss.
        products: Hessian-vector products: of `Exact` about two gradients each on top, of `FiniteDifference` among them.
        status: `"ok"`, or what is wrong with the numbers and what to do about it.
        residual: of `Implicit`: the relative residual of its linear system.
    """

    grads: dict[str, torch.Tensor]
    slopes: dict[str, torch.Tensor]
    value: torch.Tensor
    cosines: dict[str, torch.Tensor]
    gradient_evaluations: int
    status: str = "ok"
    residual: float | None = None
    products: int = 0


def hypergradient(
    model: ModelT,
    optimizer: torch.optim.Optimizer,
    train_losses: Sequence[Loss[ModelT]],
    val_loss: Loss[ModelT],
    hyperparameters: Sequence[Name] = ("lr", "weight_decay"),
    estimator: Estimator | None = None,
) -> HypergradientResult[ModelT]:
    """d(validation loss)/d(hyperparameters) after one optimizer step per training loss.

    Model, optimizer and the global RNG streams are left exactly as they were found, also when a loss raises. So steps
    that are taken afterwards draw the very noise that the training losses drew here: draw what should be new
    beforehand, as batches usually are.

    Args:
        model: the model that the optimizer trains, in train or eval mode as the losses need it.
        optimizer: an optimizer over parameters of the model, at any point of its run.
        train_losses: callables `model -> scalar tensor`, one inner optimizer step each, in order.
        val_loss: a callable `model -> scalar tensor`.
        hyperparameters: names such as `"lr"` or `"betas[0]"`, a `Schedule` in place of a name, and `Hyperparameter`
            modules of the model, which go by their path in it.
        estimator: how to differentiate. Default: `Online()`, which differentiates the last step and holds the
            earlier ones constant; `Forward()` and `Unrolled()` differentiate them all, `Implicit()` the minimum.

    Raises:
        ConfigurationError: for no training loss at all, or an argument of another kind.
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
    _check_arguments(model, optimizer, train_losses, val_loss, estimator)
    own, modules = split_names(optimizer, model, hyperparameters)
    chosen = estimator or Online()
    # `optimizer` first: its parameters need not be reachable from `model`.
    plain = [h for h in own if isinstance(h, OptimizerHyperparameter)]
    with preserved(optimizer, model, parameters=True), preserved_rng(), split_where_asked(optimizer, plain):
        # The values as they stand in the model now: inside this block its buffers are copies.
        tensors = {name: module.value for name, module in modules.items()}
        tracker = chosen.track(optimizer, own, tensors)
        replays = _Replays(model, list(tensors.values()))
        for step, loss in enumerate(train_losses):
            for schedule in own:
                if isinstance(schedule, Schedule):
                    schedule.write(optimizer, step)
            optimizer.zero_grad(set_to_none=True)
            _take(tracker, model, optimizer, loss, replays)
        if not tracker.params:
            raise NotDifferentiableError(
                "The last training loss gave no gradient to any parameter of the optimizer: does the optimizer hold "
                "the parameters of this model, and do they require gradients?"
            )
        with requiring_grad(tracker.params):
            value = _scalar(val_loss(model), "val_loss")
            gradients = gradient(value, tracker.params, model, any_of=True)
        contraction = tracker.contract(dict(zip(tracker.params, gradients, strict=True)))
    if contraction.unused:
        raise HyperparameterError(
            f"No gradient of the training losses that were differentiated depends on {', '.join(contraction.unused)}: "
            "call the Hyperparameter in the training loss, in a term that also has parameters of the optimizer, "
            "without .item() or .detach()."
        )
    found = contraction.hypergradients
    scalars = {h.name for h in own if isinstance(h, OptimizerHyperparameter) and h.per != "tensor"}

    def shaped(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return _squeezed(tensor) if name in scalars else tensor

    with split_where_asked(optimizer, plain):
        slopes = _units(optimizer, own, modules)
    return HypergradientResult(
        grads={name: shaped(name, h) for name, h in found.items()},
        slopes={name: shaped(name, h * slopes[name].to(h)) for name, h in found.items()},
        value=value.detach(),
        cosines={
            name: shaped(name, _cosine(found[name], norms, contraction.gradient_norms[name]))
            for name, norms in contraction.tangent_norms.items()
        },
        gradient_evaluations=len(train_losses) + replays.calls + 1,
        status=_status(value, contraction, len(train_losses)),
        residual=contraction.residual,
        products=contraction.products,
    )


def _check_arguments(
    model: object, optimizer: object, train_losses: object, val_loss: object, estimator: object
) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ConfigurationError(f"`model` must be a torch.nn.Module, but got {model!r}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"`optimizer` must be a torch.optim.Optimizer, but got {optimizer!r}.")
    if not isinstance(train_losses, Sequence) or not all(map(callable, train_losses)):
        raise ConfigurationError(
            "`train_losses` must be a sequence of callables `model -> scalar tensor`, one per inner step, such as "
            f"[loss], but got {train_losses!r}."
        )
    if not train_losses:
        raise ConfigurationError("`train_losses` is empty: pass one callable per inner step, `model -> scalar tensor`.")
    if not callable(val_loss):
        raise ConfigurationError(f"`val_loss` must be a callable `model -> scalar tensor`, but got {val_loss!r}.")
    if not (estimator is None or isinstance(estimator, Estimator)):
        raise ConfigurationError(f"`estimator` must be an instance, such as Online(), but got {estimator!r}.")


def check_names(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    names: Sequence[str | OptimizerHyperparameter | Schedule],
    modules: Mapping[str, Hyperparameter],
) -> None:
    """Refuse a name that could mean two things, and one that means a module.

    Raises:
        HyperparameterError: for a hyperparameter in the loss with the name of one of the optimizer, or one that is
            named by its path.
    """
    asked = [
        h if isinstance(h, str) else h.name for h in names if isinstance(h, (str, OptimizerHyperparameter, Schedule))
    ]
    for name in asked:
        if name in modules:
            raise HyperparameterError(
                f"{name!r} is a Hyperparameter of {type(model).__name__} and one of {type(optimizer).__name__}: give "
                "the attribute of the model another name."
            )
        known = loss_hyperparameters(model)
        if name in known and name.partition("[")[0] not in optimizer.param_groups[0]:
            raise HyperparameterError(
                f"{name!r} is a Hyperparameter in the loss of {type(model).__name__}: name the module itself, "
                f"model.{name}, and not its path."
            )


def _units(
    optimizer: torch.optim.Optimizer,
    own: Sequence[OptimizerHyperparameter | Schedule],
    modules: Mapping[str, Hyperparameter],
) -> dict[str, torch.Tensor]:
    """d(value)/d(coordinate) of everything, in the shape of its hypergradient."""
    found: dict[str, torch.Tensor] = {}
    for h in own:
        if isinstance(h, Schedule):
            found[h.name] = h.hyperparameter.coordinate.slope(h.values)
        else:
            groups = optimizer.param_groups
            values = [h.read(groups[reference(h, groups, unit)]) for unit in units(h, groups)]
            found[h.name] = torch.tensor([h.coordinate.slope(x) for x in values], dtype=torch.float64)
    return found | {name: module.coordinate.slope(module.value) for name, module in modules.items()}


def split_names(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, hyperparameters: Name | Sequence[Name]
) -> tuple[tuple[OptimizerHyperparameter | Schedule, ...], Mapping[str, Hyperparameter]]:
    """The hyperparameters of the optimizer and schedules of them, and those in the loss by name."""
    if isinstance(hyperparameters, (str, OptimizerHyperparameter, Schedule, Hyperparameter)):
        hyperparameters = (hyperparameters,)
    modules = loss_hyperparameters(model, [h for h in hyperparameters if isinstance(h, Hyperparameter)])
    rest = [h for h in hyperparameters if not isinstance(h, Hyperparameter)]
    if rest or not modules:
        check_optimizer(optimizer)  # before its names: LBFGS lacks weight_decay, which is not what is wrong with it
    check_names(optimizer, model, rest, modules)
    if not rest and modules:
        return (), modules
    resolved = resolve(optimizer, [h.hyperparameter if isinstance(h, Schedule) else h for h in rest])
    curves = {h.name: h for h in rest if isinstance(h, Schedule)}
    return tuple(curves.get(h.name, h) for h in resolved), modules


def _take(
    tracker: Tracker, model: ModelT, optimizer: torch.optim.Optimizer, loss: Loss[ModelT], replays: _Replays[ModelT]
) -> None:
    """One tracked step. A function of its own, so that nothing of its graph is alive during the next."""
    again: Evaluation | None = replays.of(loss) if tracker.needs_loss else None
    if again is not None and tracker.needs_graph:
        tensors = replays.tensors
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        taken = again = TakenStep(again, [*params, *tensors])
        with requiring_grad(tensors):
            taken.backward(lambda: _scalar(loss(model), "train_losses"))
            tracker.before_step(taken)
        for t in tensors:
            t.grad = None
    else:
        value = _scalar(loss(model), "train_losses")
        if again is not None and tracker.needs_pattern:
            again = HeldAt(again, ActivationPattern(value))
        torch.autograd.backward(value)
        del value  # and its graph
        tracker.before_step(again)
    raw_step(optimizer)
    tracker.after_step()


class _Replays(Generic[ModelT]):
    """Evaluates training losses as the real steps did, and counts how often."""

    def __init__(self, model: ModelT, tensors: Sequence[torch.Tensor]) -> None:
        self.calls = 0
        self.tensors = tensors
        self._model = model
        values = {id(m.value) for m in loss_hyperparameters(model).values()}
        self._buffers = [name for name, b in model.named_buffers() if id(b) not in values]

    def of(self, loss: Loss[ModelT]) -> Evaluation:
        """The loss, from the random streams and buffers that stand now."""
        rng, model = RngState.capture(), self._model
        then = {name: b.detach().clone() for name, b in model.named_buffers() if name in self._buffers}

        def again() -> torch.Tensor:
            self.calls += 1
            with preserved_rng(), preserved(model):
                rng.restore()
                with torch.no_grad():
                    for name, b in model.named_buffers():
                        if name in then:
                            b.copy_(then[name])
                return _scalar(loss(model), "train_losses")

        return again


def _cosine(h: torch.Tensor, tangent_norms: torch.Tensor, gradient_norms: torch.Tensor) -> torch.Tensor:
    scale = tangent_norms * gradient_norms
    return torch.where(scale > 0, h / scale, torch.zeros_like(h))


def _status(value: torch.Tensor, contraction: Contraction, steps: int) -> str:
    if not torch.isfinite(value):
        return f"the validation loss is {value.item()} after {steps} steps: the training itself diverges"
    bad = [name for name, h in contraction.hypergradients.items() if not bool(torch.isfinite(h).all())]
    if not bad:
        return contraction.status
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
