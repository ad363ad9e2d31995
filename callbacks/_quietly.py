"""Running a user's step once more without a trace: module, metrics, buffers and loggers are as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from hypergrad import preserved

# Reached from every LightningModule, and not its state.
_OPAQUE = (pl.Trainer, pl.LightningDataModule, pl.Callback, Logger, torch.optim.Optimizer)


@contextmanager
def quietly(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[dict[str, Any]]:
    """Inside the block nothing that the module does to itself, its metrics or its loggers lasts.

    Yields what it logs with `self.log`, by key. Parameters and RNG streams are the caller's.
    """
    logged: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(preserved(module, opaque=_OPAQUE))
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [_SilentLogger(logger) for logger in trainer.loggers]
        _record_logs(stack, module, logged)
        yield logged


def _record_logs(stack: ExitStack, module: pl.LightningModule, logged: dict[str, Any]) -> None:
    """`self.log` writes into `logged`, and nowhere else; a module's own `log` still runs, down to Lightning's."""

    def record(name: str, value: Any, *_: Any, **__: Any) -> None:
        logged[name] = value

    if type(module).log is pl.LightningModule.log:
        module.__dict__["log"] = record  # `preserved` takes it out again
        return
    stack.callback(setattr, pl.LightningModule, "log", pl.LightningModule.log)
    pl.LightningModule.log = lambda _, *args, **kwargs: record(*args, **kwargs)  # type: ignore[method-assign]


class _SilentLogger(DummyLogger):
    """Takes what a module logs by hand and keeps it to itself; its name and folders are those of the real logger."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def name(self) -> Any:
        return self._logger.name

    @property
    def version(self) -> Any:
        return self._logger.version

    @property
    def log_dir(self) -> Any:
        return self._logger.log_dir

    @property
    def save_dir(self) -> Any:
        return self._logger.save_dir

    @property
    def root_dir(self) -> Any:
        return self._logger.root_dir
