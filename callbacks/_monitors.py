"""`LearningRateMonitor` reads param groups: while it does, the values that the next step uses stand there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateMonitor

from hypergrad.callbacks._attachment import Attachment

_READS_IN = ("on_train_batch_start", "on_train_epoch_start")


class Monitors:
    """Stands around the hooks of the Trainer's LearningRateMonitors, which would log the scheduled values alone.

    No code of the user's runs while the learned values stand there, so that nothing else can read or change them.
    """

    def __init__(self, trainer: pl.Trainer, attachments: Sequence[Attachment]) -> None:
        self._attachments = attachments
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._monitors = [c for c in callbacks if isinstance(c, LearningRateMonitor)]
        self._own: list[tuple[LearningRateMonitor, str, Any]] = []
        for monitor in self._monitors:
            for hook in _READS_IN:
                self._own.append((monitor, hook, vars(monitor).get(hook)))  # of the instance, which is rare
                setattr(monitor, hook, self._showing(getattr(monitor, hook)))

    def detach(self) -> None:
        """Leave the monitors as they were found. May be called twice."""
        while self._own:
            monitor, hook, own = self._own.pop()
            if own is None:
                delattr(monitor, hook)
            else:
                setattr(monitor, hook, own)

    def _showing(self, hook: Callable[..., None]) -> Callable[..., None]:
        def shown(*args: Any, **kwargs: Any) -> None:
            with ExitStack() as stack:
                for attachment in self._attachments:
                    stack.enter_context(attachment.values_shown())
                hook(*args, **kwargs)

        return shown
