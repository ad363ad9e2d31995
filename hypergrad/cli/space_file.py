"""A search space as a YAML file.

width:     {int: [32, 512], log: true}
dropout:   {float: [0, 0.5], step: 0.1}
optimizer: [sgd, adamw]            # short for {categorical: [sgd, adamw]}
momentum:  {float: [0.5, 0.99], when: {optimizer: sgd}}
nesterov:  {constant: true, when: {optimizer: sgd}}
epochs:    20                      # a constant, always active
constraints:
  - width * epochs <= 4096
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hypergrad.search import Categorical, Constant, Float, Int, Parameter, Space, SpaceError
from hypergrad.search.parameter import is_scalar

_KINDS = ("float", "int", "categorical", "constant")
_OPTIONS = {"float": {"log", "step"}, "int": {"log", "step"}, "categorical": set[str](), "constant": set[str]()}


def read_space(path: Path) -> Space:
    """The space that a file describes.

    Raises:
        SpaceError: for a file that cannot be read or describes no space; names the file and the key.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise SpaceError(f"The space file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path} is no text in UTF-8: {error}.") from error
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

    >>> print(parameter_of({"float": [1e-5, 1e-1], "log": True}))
    real in [1e-05, 0.1] on a log scale
    >>> print(parameter_of({"categorical": ["sgd", "adamw"]}))
    one of 'sgd', 'adamw'
    >>> print(parameter_of(["sgd", "adamw"]))
    one of 'sgd', 'adamw'
    """
    if isinstance(described, list):
        return Categorical(described)
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
    low, high = value
    options = {key: described[key] for key in ("log", "step") if key in described}
    return Float(low, high, when=when, **options) if kind == "float" else Int(low, high, when=when, **options)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without its traps: `1e-4` is a number, `no` and `off` are words, and no key comes twice."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _mapping(loader: Any, node: Any) -> Any:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    if not all(is_scalar(key) for key in keys):
        raise yaml.constructor.ConstructorError(None, None, "a key that is no plain value", node.start_mark)
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} comes twice", node.start_mark)
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
