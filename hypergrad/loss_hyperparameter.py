"""Hyperparameters that live in the loss: a module that holds one learned tensor and that no optimizer sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from hypergrad.errors import HyperparameterError
from hypergrad.transform import Transform, TransformName, as_transform


class Hyperparameter(torch.nn.Module):
    """One learned tensor of any shape, to be called in a training loss: regularisation, smoothing, weights.

    Its value is a buffer in natural units: saved by `state_dict`, moved by `.to(device)`, not among `parameters()`, and
    a constant in ordinary training steps. Estimators differentiate with respect to it; the callback learns it.

    Args:
        value: where learning starts.
        transform: the coordinate in which it moves: `"log"` for positive values such as penalties, `"logit"` for
            fractions such as label smoothing or probabilities, `"softplus"` for positive values that may come near
            0, `"none"` for any real number; or a `Transform`.
        lower, upper: learning never carries an element outside `[lower, upper]`.

    Raises:
        HyperparameterError: for a value outside the domain of the transform or outside the bounds, or bounds that are
            empty.
        ConfigurationError: for an unknown transform.

    >>> l2 = Hyperparameter(torch.full((3,), 1e-2))
    >>> [name for name, _ in l2.named_parameters()], list(l2.state_dict())
    ([], ['value'])
    >>> float(l2().sum()) > 0
    True
    """

    value: torch.Tensor

    def __init__(
        self,
        value: float | torch.Tensor,
        *,
        transform: Transform | TransformName = "log",
        lower: float | None = None,
        upper: float | None = None,
    ) -> None:
        super().__init__()
        tensor = torch.as_tensor(value).detach().clone()
        tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
        self.coordinate = as_transform(transform)
        self.lower, self.upper = lower, upper
        if not tensor.numel() or not bool(tensor.isfinite().all()):
            raise HyperparameterError(
                f"A hyperparameter needs at least one number, and finite ones, but got {value!r}."
            )
        low, high = self.bounds
        if not low < high:
            raise HyperparameterError(f"`lower` must be below `upper`, but got {lower=}, {upper=}.")
        if not bool(((tensor >= low) & (tensor <= high)).all()):
            raise HyperparameterError(
                f"The values must lie in [{low:g}, {high:g}], but got values from {float(tensor.min()):g} to "
                f"{float(tensor.max()):g}."
            )
        if not bool(self.coordinate.forward(tensor).isfinite().all()):
            name = type(self.coordinate).__name__.lower()
            raise HyperparameterError(
                f"A value from {float(tensor.min()):g} to {float(tensor.max()):g} lies outside the open domain of "
                f"transform={name!r}: start inside it, or choose another transform."
            )
        self.register_buffer("value", tensor)

    @property
    def bounds(self) -> tuple[float, float]:
        """`(lower, upper)` in natural units; infinite where there is none."""
        return (
            self.lower if self.lower is not None else -torch.inf,
            self.upper if self.upper is not None else torch.inf,
        )

    def forward(self) -> torch.Tensor:
        """The value, in its shape and natural units."""
        return self.value

    @torch.no_grad()
    def move(self, change: torch.Tensor) -> None:
        """Move each element by `change` in the unconstrained coordinate, not beyond the bounds.

        Args:
            change: finite numbers, in the shape of the value.
        """
        # Half precision would swallow small moves already in the coordinate.
        wide = torch.promote_types(self.value.dtype, torch.float32)
        moved = self.coordinate.inverse(
            self.coordinate.forward(self.value.to(wide)) + change.to(self.value.device, wide)
        )
        moved = moved.clamp(*self.bounds).to(self.value)
        # Where a step is so large that the coordinate saturates (a logit of 40 is 1.0), the element stays.
        inside = self.coordinate.forward(moved).isfinite()
        self.value.copy_(torch.where(inside, moved, self.value))

    def extra_repr(self) -> str:
        """Shape and domain, as `print(model)` shows them."""
        name = type(self.coordinate).__name__.lower()
        return f"shape={tuple(self.value.shape)}, transform={name}, bounds={self.bounds}"


def loss_hyperparameters(
    model: torch.nn.Module, chosen: Iterable[Hyperparameter] | None = None
) -> Mapping[str, Hyperparameter]:
    """The `Hyperparameter` modules of a model by their path in it: all of them, or the chosen ones.

    Raises:
        HyperparameterError: for one that is not part of the model, or that is chosen twice.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, Hyperparameter)}
    if chosen is None:
        return found
    names = {id(m): name for name, m in found.items()}
    picked: dict[str, Hyperparameter] = {}
    for module in chosen:
        name = names.get(id(module))
        if name is None:
            raise HyperparameterError(
                f"{module!r} is not part of {type(model).__name__}: assign it to an attribute of the model "
                "(self.smoothing = Hyperparameter(...)), so that it is saved and moved with it."
            )
        if name in picked:
            raise HyperparameterError(f"Each hyperparameter may be named once, but got {name!r} twice.")
        picked[name] = module
    return picked
