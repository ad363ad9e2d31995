"""Something chosen by name and options, or given as an object, and the text that stands for it in the storage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hypergrad.errors import ConfigurationError

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """The object, and `text`, from which `chosen` makes it again unless it ends in " object"."""

    text: str
    item: T


def chosen(what: str, choice: Any, by_name: Mapping[str, Callable[..., T]]) -> Choice[T]:
    """`"name"`, `("name", {option: value})`, or the text of either, as a `Choice`.

    Raises:
        ConfigurationError: for a name that is not known, or that stands for an object that must be passed again.

    >>> chosen("pruner", ("patience", {"n": 3}), {"patience": lambda n: n + 1})
    Choice(text='patience {"n": 3}', item=4)
    """
    name, options = _split(what, choice)
    if name.endswith(" object"):
        raise ConfigurationError(
            f"The study was created with a {name} as `{what}`, which is not stored: pass it again, as in "
            f"Study(folder, {what}=...)."
        )
    if name not in by_name:
        raise ConfigurationError(f"`{what}` must be one of {list(by_name)} or an object of Optuna's, got {choice!r}.")
    text = f"{name} {json.dumps(options, sort_keys=True)}" if options else name
    return Choice(text, by_name[name](**options))


def _split(what: str, choice: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(choice, str):
        name, brace, options = choice.partition(" {")
        return name, json.loads("{" + options) if brace else {}
    if isinstance(choice, (tuple, list)) and len(choice) == 2 and isinstance(choice[1], Mapping):
        return str(choice[0]), dict(choice[1])
    raise ConfigurationError(f"`{what}` must be a name, (name, options) or an object of Optuna's, but got {choice!r}.")
