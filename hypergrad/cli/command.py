"""How a study was started from the command line, kept in its folder so that it can be resumed by its name."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypergrad.errors import ConfigurationError

FILE = "command.json"


@dataclass(frozen=True)
class Command:
    """What `Study.run` is to be called with.

    Args:
        train: `package.module:function`.
        trials, workers, timeout, retries, trial_timeout: as of `Study.run`.
    """

    train: str
    trials: int | None = None
    workers: int = 1
    timeout: float | None = None
    retries: int = 0
    trial_timeout: float | None = None

    def write(self, folder: Path) -> None:
        """Keep it in a study's folder."""
        temporary = folder / f"{FILE}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=1))
        os.replace(temporary, folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> Command | None:
        """What `write` kept; None where there is nothing, or something else."""
        try:
            return cls(**json.loads((folder / FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `Study.run` beside `train`."""
        return {key: value for key, value in asdict(self).items() if key != "train"}


def imported(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules in the current directory count.

    Raises:
        ConfigurationError: for a name that is none, or names nothing that can be called.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ConfigurationError(f"Name the train function as package.module:function, not {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ConfigurationError(
                f"There is no module {module!r}, in {os.getcwd()} or among the installed ones: start hypergrad where "
                "it can be imported."
            ) from error
        raise ConfigurationError(f"{module!r} cannot be imported: {error}.") from error
    for part in function.split("."):
        if not hasattr(found, part):
            functions = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise ConfigurationError(
                f"{module!r} has no {function!r}; it has {', '.join(functions) or 'no functions'}."
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigurationError(f"{name!r} is a {type(found).__name__}, which cannot be called with a trial.")
    function_found: Callable[..., Any] = found
    return function_found
