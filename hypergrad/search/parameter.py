"""One hyperparameter of a search space: real, integer, categorical or constant, possibly conditional."""

from __future__ import annotations

import abc
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hypergrad.search.errors import SpaceError
from hypergrad.search.steps import Steps

Scalar = None | bool | int | float | str
When = Mapping[str, Scalar | Sequence[Scalar]]


def is_scalar(value: object) -> bool:
    """Whether JSON can hold `value` and give it back unchanged."""
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True)
class Parameter(abc.ABC):
    """What varies under one name. `when` maps other names to the value, or values, for which this one is active."""

    when: When = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.when, Mapping):
            raise SpaceError(f"`when` must map a parameter's name to its value or values, but got {self.when!r}.")
        allowed = {key: _as_values(key, value) for key, value in self.when.items()}
        object.__setattr__(self, "when", allowed)

    @property
    def conditions(self) -> Mapping[str, tuple[Scalar, ...]]:
        """`when`, with a tuple of values under every name."""
        return cast(Mapping[str, tuple[Scalar, ...]], self.when)

    @abc.abstractmethod
    def contains(self, value: object) -> bool:
        """Whether `value` is in the domain."""

    @abc.abstractmethod
    def values(self) -> Sequence[Any] | None:
        """Every value in order, or None where they are uncountable."""

    @abc.abstractmethod
    def distribution(self) -> BaseDistribution:
        """Optuna's counterpart."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Kind, domain and conditions in plain containers."""

    def _condition(self) -> str:
        each = (f"{k} is {' or '.join(map(repr, values))}" for k, values in self.conditions.items())
        return f", when {' and '.join(each)}" if self.when else ""


@dataclass(frozen=True)
class _Numeric(Parameter):
    def __str__(self) -> str:
        low, high, log, step = (self.to_json()[key] for key in ("low", "high", "log", "step"))
        kind = "integer" if isinstance(self, Int) else "real"
        extra = (" on a log scale" if log else "") + (f" in steps of {step:g}" if step not in (None, 1) else "")
        return f"{kind} in [{low:g}, {high:g}]{extra}{self._condition()}"


@dataclass(frozen=True)
class Float(_Numeric):
    """A real number in `[low, high]`.

    Args:
        low, high: finite bounds, low < high; both positive with `log`.
        log: search its logarithm.
        step: only low, low + step, …; high must be one of them. Not with `log`.
        when: see `Parameter`.

    Raises:
        SpaceError: for bounds, scale or step that do not fit together.
    """

    low: float
    high: float
    log: bool = field(default=False, kw_only=True)
    step: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bounds(self, (int, float))
        if self.step is not None:
            count = (self.high - self.low) / self.step if _is_positive(self.step) else -1.0
            if self.log or count < 0 or abs(count - round(count)) > 1e-9 * max(1.0, count):
                raise SpaceError(
                    f"`step` must be positive, divide high - low, and is not possible with log=True, but got {self!r}."
                )

    def contains(self, value: object) -> bool:
        """Whether `value` is a real number within the bounds, and on the steps."""
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not self.low <= value <= self.high:
            return False
        return self.step is None or abs((n := (value - self.low) / self.step) - round(n)) < 1e-8

    def values(self) -> Sequence[float] | None:
        """The steps, or None without `step`."""
        if self.step is None:
            return None
        return Steps(self.low, self.step, round((self.high - self.low) / self.step) + 1)

    def distribution(self) -> BaseDistribution:
        """Optuna's `FloatDistribution`."""
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def to_json(self) -> dict[str, Any]:
        """Kind, domain and conditions in plain containers."""
        domain = {"low": self.low, "high": self.high, "log": self.log, "step": self.step}
        return {"kind": "float", **domain, "when": _plain(self)}

    __str__ = _Numeric.__str__


@dataclass(frozen=True)
class Int(_Numeric):
    """An integer in `[low, high]`, both included.

    Args:
        low, high: integers, low < high; both positive with `log`.
        log: search its logarithm.
        step: only low, low + step, …; high must be one of them. Not with `log`.
        when: see `Parameter`.

    Raises:
        SpaceError: for bounds, scale or step that do not fit together.
    """

    low: int
    high: int
    log: bool = field(default=False, kw_only=True)
    step: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bounds(self, (int,))
        step_is_int = isinstance(self.step, int) and not isinstance(self.step, bool)
        if not step_is_int or self.step < 1 or (self.high - self.low) % self.step or (self.log and self.step != 1):
            raise SpaceError(
                f"`step` must be a positive integer that divides high - low, and 1 with log=True, but got {self!r}."
            )

    def contains(self, value: object) -> bool:
        """Whether `value` is an integer within the bounds, and on the steps."""
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            return False
        return (value - self.low) % self.step == 0

    def values(self) -> Sequence[int]:
        """Every integer that is on a step."""
        return range(self.low, self.high + 1, self.step)

    def distribution(self) -> BaseDistribution:
        """Optuna's `IntDistribution`."""
        return IntDistribution(self.low, self.high, log=self.log, step=self.step)

    def to_json(self) -> dict[str, Any]:
        """Kind, domain and conditions in plain containers."""
        domain = {"low": self.low, "high": self.high, "log": self.log, "step": self.step}
        return {"kind": "int", **domain, "when": _plain(self)}

    __str__ = _Numeric.__str__


@dataclass(frozen=True)
class Categorical(Parameter):
    """One of several values without an order.

    Args:
        choices: at least two different strings, numbers, bools or None. For classes or functions search their names
            and look them up in `train`: what is stored must be readable without your code.
        when: see `Parameter`.

    Raises:
        SpaceError: for choices that are too few, equal to each other (`1 == True`), or of another kind.
    """

    choices: Sequence[Scalar]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.choices, str) or not isinstance(self.choices, Sequence) or len(self.choices) < 2:
            raise SpaceError(f"`choices` must be a list of at least two values, but got {self.choices!r}.")
        wrong = [c for c in self.choices if not is_scalar(c)]
        if wrong:
            raise SpaceError(
                f"`choices` must be strings, finite numbers, bools or None, but got {wrong}: search their names, and "
                "look them up in your train function."
            )
        if len(set(self.choices)) < len(self.choices):
            raise SpaceError(f"`choices` must differ from each other (1 == 1.0 == True), but got {self.choices!r}.")
        object.__setattr__(self, "choices", tuple(self.choices))

    def contains(self, value: object) -> bool:
        """Whether `value` is one of the choices, type included."""
        return any(type(value) is type(c) and value == c for c in self.choices)

    def values(self) -> Sequence[Scalar]:
        """The choices."""
        return self.choices

    def distribution(self) -> BaseDistribution:
        """Optuna's `CategoricalDistribution`."""
        return CategoricalDistribution(list(self.choices))

    def to_json(self) -> dict[str, Any]:
        """Kind, domain and conditions in plain containers."""
        return {"kind": "categorical", "choices": list(self.choices), "when": _plain(self)}

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.choices))}{self._condition()}"


@dataclass(frozen=True)
class Constant(Parameter):
    """A value that does not vary, kept with the others so that every trial's record is complete."""

    value: Scalar

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_scalar(self.value):
            raise SpaceError(f"A constant must be a string, finite number, bool or None, but got {self.value!r}.")

    def contains(self, value: object) -> bool:
        """Whether `value` is the constant, type included."""
        return type(value) is type(self.value) and value == self.value

    def values(self) -> Sequence[Scalar]:
        """The one value."""
        return (self.value,)

    def distribution(self) -> BaseDistribution:
        """Optuna's distribution with one choice."""
        return CategoricalDistribution([self.value])

    def to_json(self) -> dict[str, Any]:
        """Kind, value and conditions in plain containers."""
        return {"kind": "constant", "value": self.value, "when": _plain(self)}

    def __str__(self) -> str:
        return f"always {self.value!r}{self._condition()}"


_KINDS: dict[str, type[Parameter]] = {"float": Float, "int": Int, "categorical": Categorical, "constant": Constant}


def from_json(data: Mapping[str, Any]) -> Parameter:
    """The parameter that `to_json` described."""
    return _KINDS[data["kind"]](**{key: value for key, value in data.items() if key != "kind"})


def _plain(parameter: Parameter) -> dict[str, list[Scalar]]:
    return {key: list(values) for key, values in parameter.conditions.items()}


def _as_values(key: object, value: Any) -> tuple[Scalar, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not isinstance(key, str) or not values or not all(map(is_scalar, values)):
        raise SpaceError(f"`when` must map a parameter's name to its value or values, but got {{{key!r}: {value!r}}}.")
    return values


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _check_bounds(parameter: Float | Int, kinds: tuple[type, ...]) -> None:
    low, high = parameter.low, parameter.high
    what = "finite numbers" if float in kinds else "integers"
    if any(not isinstance(b, kinds) or isinstance(b, bool) or not abs(b) <= sys.float_info.max for b in (low, high)):
        raise SpaceError(f"Bounds must be {what}, but got {low=!r}, {high=!r}.")
    if not low < high:
        raise SpaceError(f"`low` must be less than `high`, but got {low=!r}, {high=!r}.")
    if not math.isfinite(float(high) - float(low)):
        raise SpaceError(f"`high - low` must be a finite number, but got {low=!r}, {high=!r}.")
    if not isinstance(parameter.log, bool):
        raise SpaceError(f"`log` must be True or False, but got {parameter.log!r}.")
    if parameter.log and low <= 0:
        raise SpaceError(f"A log scale needs positive bounds, but got {low=!r}, {high=!r}.")
