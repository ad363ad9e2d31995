"""What is learned: one real number in an optimizer's param groups, its domain and how to read and write it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from hypergrad.errors import HyperparameterError
from hypergrad.transform import Log, Logit, Transform

ParamGroup = dict[str, Any]

# key -> (transform, lower, upper, floor). `floor` is where learning starts when the user's value is exactly 0; lr has
# none, because a schedule that starts at 0 means it.
_DEFAULTS: dict[str, tuple[Transform, float, float, float | None]] = {
    "lr": (Log(), 1e-10, 10.0, None),
    "weight_decay": (Log(), 1e-6, 10.0, 1e-5),
    "eps": (Log(), 1e-16, 1.0, 1e-10),
    "momentum": (Logit(), 0.01, 0.9999, 0.01),
    "dampening": (Logit(), 0.01, 0.9999, 0.01),
    "betas": (Logit(), 0.01, 0.99999, 0.01),
    "alpha": (Logit(), 0.01, 0.99999, 0.01),
    "rho": (Logit(), 0.01, 0.99999, 0.01),
}
_FALLBACK: tuple[Transform, float, float, float | None] = (Log(), 1e-12, 1e6, 1e-6)
_NAME = re.compile(r"(?P<key>[^\[\]]+)(\[(?P<index>\d+)\])?")


@dataclass(frozen=True)
class OptimizerHyperparameter:
    """One real-valued entry of an optimizer's param groups.

    A plain string stands for this wherever hyperparameters are named; build one yourself to change the
    domain or to name the domain of an optimizer that torch does not ship.

    Args:
        name: key in `optimizer.param_groups[i]`, with an index for tuple entries: `"lr"`, `"betas[0]"`.
        transform: the coordinate in which it moves. Default: logarithm, or logit for fractions (`momentum`,
            `betas[i]`, `alpha`, `rho`, `dampening`).
        lower, upper: learning never carries the value outside `[lower, upper]`; a start outside is kept and
            may only move inwards. Entries that torch's optimizers do not have are unbounded under a transform of
            your own.
        floor: where learning starts if the user's value is exactly 0, whose logarithm does not exist. Default:
            1e-5 for `weight_decay`, 0.01 for fractions; none for `lr`, which stays at a scheduled 0.
        per: what has a number of its own. `"group"`: each param group. `"shared"`: one number for all param groups,
            which move together in the coordinate (in a logarithm, by the same factor); it is counted in units of the
            first group's value. `"tensor"`: each parameter tensor, whatever group it is in.

    Raises:
        HyperparameterError: for a malformed name, an unknown scope, an empty domain, or bounds outside that of the
            coordinate.

    >>> OptimizerHyperparameter("betas[0]").read({"betas": (0.9, 0.999)})
    0.9
    """

    name: str
    transform: Transform | None = None
    lower: float | None = None
    upper: float | None = None
    floor: float | None = None
    per: Literal["group", "shared", "tensor"] = "group"

    def __post_init__(self) -> None:
        match = _NAME.fullmatch(self.name) if isinstance(self.name, str) else None
        if match is None:
            raise HyperparameterError(
                f"A hyperparameter is named by its key in the optimizer's param groups, such as 'lr' or 'betas[0]', "
                f"but got {self.name!r}."
            )
        if self.per not in ("group", "shared", "tensor"):
            raise HyperparameterError(
                f"`per` must be 'group', 'shared' or 'tensor', but got {self.per!r} for {self.name!r}."
            )
        if self.transform is not None and not isinstance(self.transform, Transform):
            raise HyperparameterError(
                f"`transform` must be a Transform such as Log() or Identity(), but got {self.transform!r}."
            )
        for field in ("lower", "upper", "floor"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, (int, float)):
                raise HyperparameterError(f"`{field}` must be a number, but got {field}={value!r} for {self.name!r}.")
        known = self.transform is None or match["key"] in _DEFAULTS
        transform, *domain = _DEFAULTS.get(match["key"], _FALLBACK)
        object.__setattr__(self, "transform", self.transform or transform)
        for field, default in zip(("lower", "upper", "floor"), domain, strict=True):
            # The usual domain of a known hyperparameter holds in any coordinate that can express it.
            if getattr(self, field) is None and known and default is not None and self._is_inside(default):
                object.__setattr__(self, field, default)
        if not self.bounds[0] < self.bounds[1]:
            raise HyperparameterError(
                f"`lower` must be below `upper`, but got lower={self.lower}, upper={self.upper} for {self.name!r}."
            )
        for field, value in (("lower", self.lower), ("upper", self.upper), ("floor", self.floor)):
            if value is not None and not self._is_inside(value):
                raise HyperparameterError(
                    f"`{field}` must lie inside the domain of {type(self.coordinate).__name__}, but got "
                    f"{field}={value} for {self.name!r}."
                )

    @cached_property
    def key(self) -> str:
        """The param-group key without an index: `"betas"` for `"betas[0]"`."""
        return self.name.partition("[")[0]

    @cached_property
    def index(self) -> int | None:
        """The position inside a tuple entry, or None for a scalar one."""
        return int(self.name.partition("[")[2][:-1]) if "[" in self.name else None

    @cached_property
    def coordinate(self) -> Transform:
        """The unconstrained coordinate in which the value moves."""
        return self.transform if self.transform is not None else Log()

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """`(lower, upper)` in natural units."""
        return (
            self.lower if self.lower is not None else -math.inf,
            self.upper if self.upper is not None else math.inf,
        )

    def start(self, scheduled: float) -> float | None:
        """Where learning starts from a scheduled value: itself, or the floor at 0; None where it has to stay at 0.

        Raises:
            HyperparameterError: for a value other than 0 outside the domain of the coordinate.
        """
        if scheduled == 0.0 and not self._is_inside(0.0):
            return self.floor
        if not self._is_inside(scheduled):
            raise HyperparameterError(
                f"{self.name}={scheduled:g} lies outside the domain of {type(self.coordinate).__name__}. Start from a "
                f"value inside it, or name another: OptimizerHyperparameter({self.name!r}, transform=Identity(), "
                "lower=..., upper=...)."
            )
        return scheduled

    def _is_inside(self, value: float) -> bool:
        try:
            return math.isfinite(self.coordinate.forward(value))
        except ValueError:
            return False

    def read(self, group: ParamGroup) -> float:
        """The value in one param group, as a Python float (a tensor entry is read to the host)."""
        entry = group[self.key]
        return float(entry if self.index is None else entry[self.index])

    def write(self, group: ParamGroup, value: float | torch.Tensor) -> None:
        """Put a value into one param group; a tuple entry is replaced by a new tuple, a tensor by a new tensor."""
        old = group[self.key]
        if self.index is not None:
            group[self.key] = (*old[: self.index], value, *old[self.index + 1 :])
        elif isinstance(old, torch.Tensor) and not isinstance(value, torch.Tensor):
            group[self.key] = torch.full_like(old, value)
        else:
            group[self.key] = value


def resolve(
    optimizer: torch.optim.Optimizer,
    hyperparameters: str | OptimizerHyperparameter | Iterable[str | OptimizerHyperparameter],
) -> tuple[OptimizerHyperparameter, ...]:
    """Turn names into hyperparameters and check that this optimizer has every one of them.

    Raises:
        HyperparameterError: for an unknown, repeated or non-numeric entry, or no entry at all; the message
            lists what the optimizer offers.
    """
    if isinstance(hyperparameters, (str, OptimizerHyperparameter)):
        hyperparameters = (hyperparameters,)
    resolved = tuple(h if isinstance(h, OptimizerHyperparameter) else _from_name(h) for h in hyperparameters)
    names = [h.name for h in resolved]
    if not names:
        raise HyperparameterError("No hyperparameter was named. Name at least one, such as hyperparameters=('lr',).")
    if len(set(names)) < len(names):
        raise HyperparameterError(f"Each hyperparameter may be named once, but got {tuple(names)}.")
    for hyperparameter in resolved:
        for group in optimizer.param_groups:
            _check_entry(optimizer, group, hyperparameter)
    return resolved


def available(group: ParamGroup) -> list[str]:
    """Names of every real-valued entry of a param group, tuple entries one by one.

    >>> available({"params": [], "lr": 0.1, "betas": (0.9, 0.999), "amsgrad": False})
    ['lr', 'betas[0]', 'betas[1]']
    """
    names: list[str] = []
    for key, entry in group.items():
        if key == "params":
            continue
        if _is_real(entry):
            names.append(key)
        elif isinstance(entry, (tuple, list)):
            names.extend(f"{key}[{i}]" for i, item in enumerate(entry) if _is_real(item))
    return names


def _from_name(name: object) -> OptimizerHyperparameter:
    if not isinstance(name, str):
        raise HyperparameterError(
            f"A hyperparameter is a name such as 'lr' or an OptimizerHyperparameter, but got {name!r}."
        )
    return OptimizerHyperparameter(name)


def _check_entry(optimizer: torch.optim.Optimizer, group: ParamGroup, hyperparameter: OptimizerHyperparameter) -> None:
    if hyperparameter.name in available(group):
        return
    entry = group.get(hyperparameter.key)
    if isinstance(entry, (tuple, list)) and hyperparameter.index is None:
        hint = f"it is a tuple: name one entry, such as '{hyperparameter.key}[0]'"
    elif hyperparameter.key in group:
        hint = f"its value {entry!r} is not a real number"
    else:
        hint = "this optimizer has no such entry"
    raise HyperparameterError(
        f"{type(optimizer).__name__} has no learnable hyperparameter {hyperparameter.name!r}: {hint}. "
        f"It offers {', '.join(available(group))}."
    )


def _is_real(entry: object) -> bool:
    if isinstance(entry, torch.Tensor):
        return entry.numel() == 1 and entry.is_floating_point()
    return isinstance(entry, (int, float)) and not isinstance(entry, bool)
