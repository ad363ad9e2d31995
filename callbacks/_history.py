"""What the run has measured and what it has cost."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Update:
    """One hypergradient, taken after `step`; dictionaries are by label, such as `"lr"` or `"lr/backbone"`.

    Args:
        step: optimizer steps taken so far (the largest count, with several optimizers).
        val_loss: the hyper-validation loss of the batch that was used.
        values: the value that the step used.
        hypergradients: d(monitored value)/d(value), in natural units.
        cosines: the hypergradient divided by the norms of both of its factors, signed so that positive means that a
            larger value makes the objective worse.
        signal_to_noise: |mean| / standard deviation over about the last 20 updates.
        skipped: why no value moved, or None.
        status: what the estimator says is wrong with these numbers, or None.
    """

    step: int
    val_loss: float
    values: dict[str, float]
    hypergradients: dict[str, float]
    cosines: dict[str, float] = field(default_factory=dict)
    signal_to_noise: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None
    status: str | None = None

    def scalars(self) -> dict[str, float]:
        """Every finite number of this update under the tag it has in TensorBoard."""
        scalars = {"hypergradient/val_loss": self.val_loss}
        if self.skipped is not None:
            scalars["hypergradient/skipped"] = 1.0
        columns = (
            ("value", self.values),
            ("hypergradient", self.hypergradients),
            ("cosine", self.cosines),
            ("snr", self.signal_to_noise),
        )
        for column, numbers in columns:
            scalars.update({f"hypergradient/{label}/{column}": number for label, number in numbers.items()})
        return {tag: number for tag, number in scalars.items() if math.isfinite(number)}


def pack(history: list[Update]) -> dict[str, Any]:
    """A history as one table of float64 and its column names: small, and loadable with `weights_only=True`."""
    maps = ("values", "hypergradients", "cosines", "signal_to_noise")
    columns = list(dict.fromkeys(f"{name}:{label}" for u in history for name in maps for label in getattr(u, name)))
    rows = [
        [u.step, u.val_loss, *(getattr(u, c.partition(":")[0]).get(c.partition(":")[2], _ABSENT) for c in columns)]
        for u in history
    ]
    return {
        "columns": columns,
        "table": torch.tensor(rows, dtype=torch.float64).reshape(len(history), 2 + len(columns)),
        "skipped": {str(i): u.skipped for i, u in enumerate(history) if u.skipped is not None},
        "status": {str(i): u.status for i, u in enumerate(history) if u.status is not None},
    }


def unpack(packed: dict[str, Any]) -> list[Update]:
    """The history that `pack` was given."""
    history = []
    for i, (step, loss, *cells) in enumerate(packed["table"].tolist()):
        maps: dict[str, dict[str, float]] = {}
        for column, cell in zip(packed["columns"], cells, strict=True):
            if cell != _ABSENT:
                name, _, label = column.partition(":")
                maps.setdefault(name, {})[label] = cell
        empty: dict[str, dict[str, float]] = {"values": {}, "hypergradients": {}}
        skipped, status = packed["skipped"].get(str(i)), packed["status"].get(str(i))
        history.append(Update(int(step), loss, **{**empty, **maps}, skipped=skipped, status=status))
    return history


_ABSENT = 1.7976931348623157e308  # no measurement is the largest float; NaN and infinities are


class Stopwatch:
    """Adds up the time between `start` and `stop` on the device that does the work, without waiting for it.

    On CUDA that is the time between two events in the stream, read once they have passed.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = seconds
        self._began: float | torch.cuda.Event | None = None
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Begin a block; a block that was never stopped is forgotten."""
        self._began = self._now()

    def stop(self) -> None:
        """End the block that `start` began, if any."""
        began, self._began = self._began, None
        if isinstance(began, float):
            self._seconds += time.perf_counter() - began
        elif began is not None:
            self._events.append((began, self._event()))
            self._collect(wait=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure this block."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    @property
    def seconds(self) -> float:
        """The total so far; on CUDA this waits for the device."""
        self._collect(wait=True)
        return self._seconds

    def _now(self) -> float | torch.cuda.Event:
        return self._event() if self._cuda else time.perf_counter()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _collect(self, *, wait: bool) -> None:
        while self._events:
            start, end = self._events[0]
            if wait:
                end.synchronize()
            elif not end.query():  # type: ignore[no-untyped-call]
                return
            self._seconds += start.elapsed_time(end) / 1e3
            self._events.popleft()
