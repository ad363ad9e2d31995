"""The search space: declared up front, checked when it is built, printable, storable as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution

from hypergrad.search.constraint import Constraint
from hypergrad.search.errors import SpaceError
from hypergrad.search.parameter import Constant, Parameter, Scalar, from_json, is_scalar


class Space(Mapping[str, Parameter]):
    """Parameters by name, in an order in which every condition is decided before what depends on it.

    Args:
        parameters: `Float`, `Int` or `Categorical` by name; a plain number, string, bool or None is a constant.
        constraints: conditions on the values, as Python expressions of names, numbers, strings, arithmetic and
            comparisons: `"batch_size <= width"`. Points that violate one are never tried. A constraint that names a
            parameter that is not active at a point does not apply there.

    Raises:
        SpaceError: for anything that is no parameter, conditions that no point meets or that go in a circle, and
            constraints that do not parse or name what is not in the space.

    >>> from hypergrad.search import Categorical, Float, Int
    >>> momentum = Float(0, 0.99, when={"optimizer": "sgd"})
    >>> print(Space({"optimizer": Categorical(["sgd", "adam"]), "momentum": momentum}))
    optimizer  one of 'sgd', 'adam'
    momentum   real in [0, 0.99], when optimizer is 'sgd'
    """

    def __init__(self, parameters: Mapping[str, Parameter | Scalar], constraints: Sequence[str] = ()) -> None:
        if not isinstance(parameters, Mapping) or not parameters:
            raise SpaceError(f"A space is a non-empty mapping from names to parameters, but got {parameters!r}.")
        self._parameters = _ordered({name: _checked(name, p) for name, p in parameters.items()})
        if isinstance(constraints, str) or not all(isinstance(c, str) for c in constraints):
            raise SpaceError(f"`constraints` must be a sequence of expressions, but got {constraints!r}.")
        self.constraints = tuple(Constraint(text) for text in constraints)
        for constraint in self.constraints:
            unknown = sorted(constraint.names - set(self._parameters))
            if unknown:
                raise SpaceError(f"The constraint {constraint.text!r} names {unknown}, not in the space {list(self)}.")

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def is_active(self, name: str, params: Mapping[str, Any]) -> bool:
        """Whether the conditions of `name` hold, given the values of the parameters before it."""
        return all(key in params and params[key] in allowed for key, allowed in self[name].conditions.items())

    def is_feasible(self, params: Mapping[str, Any]) -> bool:
        """Whether every constraint that applies to `params` holds."""
        return all(constraint.holds(params) for constraint in self.constraints)

    def check(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` with constants filled in, in the space's order.

        Raises:
            SpaceError: if a value is missing, too many, out of its domain, or violates a constraint.
        """
        unknown = sorted(set(params) - set(self))
        if unknown:
            raise SpaceError(f"{unknown} are not in the space {list(self)}.")
        point: dict[str, Any] = {}
        for name, parameter in self.items():
            if not self.is_active(name, point):
                if name in params:
                    raise SpaceError(f"{name}={params[name]!r} is given where it is not active: {parameter}.")
                continue
            if name not in params and not isinstance(parameter, Constant):
                raise SpaceError(f"A value of {name!r} is missing: {parameter}.")
            value = params.get(name, parameter.value if isinstance(parameter, Constant) else None)
            if not parameter.contains(value):
                raise SpaceError(f"{name}={value!r} is outside its domain: {parameter}.")
            point[name] = value
        violated = [c.text for c in self.constraints if not c.holds(point)]
        if violated:
            raise SpaceError(f"{point} violates {violated}.")
        return point

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of what varies, conditional parameters among them."""
        return {name: p.distribution() for name, p in self.items() if not isinstance(p, Constant)}

    def grid(self, *, feasible: bool = True) -> Iterator[dict[str, Any]]:
        """Every point once, the last parameter changing fastest; with `feasible` those that satisfy the constraints.

        Raises:
            SpaceError: at once, if a parameter is continuous.
        """
        continuous = [name for name, p in self.items() if p.values() is None]
        if continuous:
            raise SpaceError(
                f"A grid over {continuous} is infinite, for they are continuous: give each a `step` (without `log`), "
                "or Categorical([...]) with the values to try."
            )
        return (point for point in self._points(list(self), {}) if not feasible or self.is_feasible(point))

    def _points(self, names: list[str], before: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not names:
            yield before
        elif not self.is_active(names[0], before):
            yield from self._points(names[1:], before)
        else:
            for value in self[names[0]].values() or ():
                yield from self._points(names[1:], {**before, names[0]: value})

    def to_json(self) -> dict[str, Any]:
        """Plain containers, from which `Space.from_json` builds an equal space."""
        return {
            "parameters": {name: parameter.to_json() for name, parameter in self.items()},
            "constraints": [constraint.text for constraint in self.constraints],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Space:
        """The space that `to_json` described."""
        return cls({name: from_json(p) for name, p in data["parameters"].items()}, data["constraints"])

    def differences(self, other: Space) -> list[str]:
        """What `other` has differently, in words; empty where the spaces are equal."""
        found = [f"{name} is new: {other[name]}" for name in other if name not in self]
        found += [f"{name} is gone: {self[name]}" for name in self if name not in other]
        found += [f"{n}: {self[n]} became {other[n]}" for n in self if n in other and _text(self[n]) != _text(other[n])]
        mine, theirs = (sorted(c.text for c in space.constraints) for space in (self, other))
        return found + ([f"constraints: {mine} became {theirs}"] if mine != theirs else [])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and not self.differences(other)

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_json(), sort_keys=True))

    def __str__(self) -> str:
        width = max(map(len, self))
        lines = [f"{name:{width}}  {parameter}" for name, parameter in self.items()]
        return "\n".join(lines + [f"such that {constraint.text}" for constraint in self.constraints])

    def __repr__(self) -> str:
        constraints = f", constraints={[c.text for c in self.constraints]}" if self.constraints else ""
        return f"Space({self._parameters!r}{constraints})"


def _text(parameter: Parameter) -> str:
    return json.dumps(parameter.to_json(), sort_keys=True)  # in which 1 and 1.0 differ


def _checked(name: Any, parameter: Any) -> Parameter:
    if not isinstance(name, str) or not name.isidentifier():
        raise SpaceError(f"The name of a parameter must be a Python identifier, but got {name!r}.")
    if isinstance(parameter, Parameter):
        return parameter
    if is_scalar(parameter):
        return Constant(parameter)
    raise SpaceError(
        f"{name}={parameter!r} is no parameter: use Float(low, high), Int(low, high), Categorical([...]), or a number, "
        "string, bool or None as a constant."
    )


def _ordered(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    for name, parameter in parameters.items():
        for key, allowed in parameter.conditions.items():
            if key not in parameters:
                raise SpaceError(
                    f"{name} has the condition when={key!r}, which is not in the space {list(parameters)}."
                )
            if parameters[key].values() is None:
                raise SpaceError(f"{name} waits for {key} to be {list(allowed)}: of all reals, chance never draws it.")
            impossible = [value for value in allowed if not parameters[key].contains(value)]
            if impossible:
                raise SpaceError(f"{name} waits for {key} to be {impossible}, which it never is: {parameters[key]}.")
    ordered: dict[str, Parameter] = {}
    while len(ordered) < len(parameters):
        ready = [n for n, p in parameters.items() if n not in ordered and all(key in ordered for key in p.when)]
        if not ready:
            circle = [name for name in parameters if name not in ordered]
            raise SpaceError(f"The conditions of {circle} go in a circle: each waits for another.")
        ordered[ready[0]] = parameters[ready[0]]
    needed: dict[str, dict[str, set[Scalar]]] = {}
    for name, parameter in ordered.items():
        needed[name] = _needed(name, parameter, needed)
    return ordered


def _needed(name: str, parameter: Parameter, before: Mapping[str, Mapping[str, set[Scalar]]]) -> dict[str, set[Scalar]]:
    """What all that `parameter` depends on, directly or not, must be for it to be active."""
    found = {key: set(values) for key, values in parameter.conditions.items()}
    for key in parameter.conditions:
        for other, values in before[key].items():
            found[other] = found.get(other, values) & values
            if not found[other]:
                raise SpaceError(f"{name} is never active: it and {key}, which it waits for, need different {other}.")
    return found
