"""How a study was started from the command line, kept in its folder so that it can be resumed by its name."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from hypergrad.errors import ConfigurationError

FILE = "command.json"


@dataclass(frozen=True)
class Command:
    """What `Study.run` is to be called with.

    Args:
        train: `package.module:function`, or `path/file.py:function`.
        directory: modules and files are looked for there first.
        trials, workers, timeout, retries, trial_timeout, alike_failures, execution: as of `Study.run`; 0 alike failures
            stand for no limit.
    """

    train: str
    directory: str = field(default_factory=os.getcwd)
    trials: int | None = None
    workers: int = 1
    timeout: float | None = None
    retries: int = 0
    trial_timeout: float | None = None
    alike_failures: int = 5
    execution: str = "local"

    def write(self, folder: Path) -> None:
        """Keep it in a study's folder."""
        temporary = folder / f"{FILE}.tmp"
        try:
            temporary.write_text(json.dumps(asdict(self), indent=1))
            os.replace(temporary, folder / FILE)
        except OSError as error:
            raise ConfigurationError(f"{folder / FILE} cannot be written: {error.strerror or error}.") from error

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
        given = {key: value for key, value in asdict(self).items() if key not in ("train", "directory")}
        return {**given, "alike_failures": self.alike_failures or None}


def imported(name: str, directory: str) -> Callable[..., Any]:
    """The function that `package.module:function` or `path/file.py:function` names.

    Args:
        name: of the function.
        directory: modules and files in it come before what is installed.

    Raises:
        ConfigurationError: for a name that is none, or names nothing that can be called; for a module that cannot be
            imported.
    """
    place, colon, function = name.partition(":")
    if not colon or not place or not function:
        raise ConfigurationError(
            f"Name the train function as package.module:function or file.py:function, not {name!r}."
        )
    if directory not in sys.path:
        sys.path.insert(0, directory)
    found: Any = _module(place, directory)
    for part in function.split("."):
        if not hasattr(found, part):
            functions = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise ConfigurationError(f"{place!r} has no {function!r}; it has {', '.join(functions) or 'no functions'}.")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigurationError(f"{name!r} is a {type(found).__name__}, which cannot be called with a trial.")
    function_found: Callable[..., Any] = found
    return function_found


def _module(place: str, directory: str) -> ModuleType:
    name = place
    if place.endswith(".py"):
        path = Path(directory, place).resolve()
        if not path.is_file():
            raise ConfigurationError(f"There is no file {path}.")
        name = path.stem
        if str(path.parent) not in sys.path:  # workers import it by its name, and look there, too
            sys.path.insert(0, str(path.parent))
        known = importlib.util.find_spec(name)
        if known is None or known.origin is None or Path(known.origin).resolve() != path:
            raise ConfigurationError(f"{path} is hidden by another module {name!r}: give the file another name.")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigurationError(
                f"There is no module {name!r}, in {directory} or among the installed ones: start hypergrad where it "
                "can be imported, or name the file, as in path/file.py:function."
            ) from error
        raise ConfigurationError(_told(name, error)) from error
    except Exception as error:  # whatever a module of the user's raises
        raise ConfigurationError(_told(name, error)) from error


def _told(name: str, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}"
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
    return f"{name!r} cannot be imported: {type(error).__name__}: {error} ({where})."
