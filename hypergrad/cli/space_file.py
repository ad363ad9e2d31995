"""A search space as a YAML file.

width:     {int: [32, 512], log: true}
dropout:   {float: [0, 0.5], step: 0.1}
optimizer: {categorical: [sgd, adamw]}
momentum:  {float: [0.5, 0.99], when: {optimizer: sgd}}
epochs:    20                      # a constant
constraints:
  - width * epochs <= 4096
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hypergrad.search import Categorical, Constant, Float, Int, Parameter, Space, SpaceError

_KINDS = ("float", "int", "categorical", "constant")
_OPTIONS = {"float": {"log", "step"}, "int": {"log", "step"}, "categorical": set[str](), "constant": set[str]()}


def read_space(path: Path) -> Space:
    """The space that a file describes.

    Raises:
        SpaceError: for a file that cannot be read or describes no space; names the file and the key.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SpaceError(f"The space file {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise SpaceError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict) or not data:
        raise SpaceError(f"{path} must map names to parameters, as in `width: {{int: [32, 512], log: true}}`.")
    constraints = data.pop("constraints", None) or []
    if not isinstance(constraints, list):
        raise SpaceError(f"{path}, constraints: must be a list of expressions, but got {constraints!r}.")
    parameters = {}
    for name, described in data.items():
        try:
            parameters[name] = parameter_of(described)
        except SpaceError as error:
            raise SpaceError(f"{path}, {name}: {error}") from error
    try:
        return Space(parameters, constraints)
    except SpaceError as error:
        raise SpaceError(f"{path}: {error}") from error


def parameter_of(described: Any) -> Parameter:
    """One parameter, from what stands behind its name.

    Raises:
        SpaceError: for what describes no parameter.

    >>> print(parameter_of({"float": [1e-5, "1e-1"], "log": True}))
    real in [1e-05, 0.1] on a log scale
    >>> print(parameter_of({"categorical": ["sgd", "adamw"]}))
    one of 'sgd', 'adamw'
    """
    if not isinstance(described, Mapping):
        return Constant(described)
    kinds = [kind for kind in _KINDS if kind in described]
    if len(kinds) != 1:
        raise SpaceError(f"needs exactly one of {', '.join(_KINDS)}, but got {dict(described)!r}.")
    kind = kinds[0]
    unknown = sorted(str(key) for key in set(described) - {kind, "when"} - _OPTIONS[kind])
    if unknown:
        known = ", ".join(sorted({"when", *_OPTIONS[kind]}))
        raise SpaceError(f"{', '.join(unknown)} is unknown beside {kind!r}, where there can be: {known}.")
    when, value = described.get("when") or {}, described[kind]
    if kind == "constant":
        return Constant(value, when=when)
    if kind == "categorical":
        return Categorical(value, when=when)
    if not isinstance(value, list) or len(value) != 2:
        raise SpaceError(f"`{kind}` must be a list of the low and the high bound, but got {value!r}.")
    low, high = map(_number, value)
    options = {key: _number(described[key]) for key in ("log", "step") if key in described}
    return Float(low, high, when=when, **options) if kind == "float" else Int(low, high, when=when, **options)


def _number(value: Any) -> Any:
    """YAML takes 1e-5, without a point, for a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
