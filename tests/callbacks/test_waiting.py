"""On a device, reading a number makes the host wait: counted here on the CPU, where nobody would notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hypergrad import Cosine, Descent, Readout, Rewind
from hypergrad.callbacks import HyperGradient
from tests.callbacks.modules import Net, data, trainer


class _Reads(TorchDispatchMode):
    """Counts what `item()`, `float()` and `bool()` of a tensor come down to."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Counts(pl.Callback):
    """Numbers read in each training batch, from its start until the next one starts."""

    def __init__(self, reads: _Reads) -> None:
        self.reads, self.batches = reads, [0]

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches.append(self.reads.count)


@contextmanager
def _reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Reads]:
    with _Reads() as reads:
        for name in ("tolist", "cpu", "numpy"):  # these copy from a device, too
            original = getattr(torch.Tensor, name)

            def counted(self: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                reads.count += 1
                return original(self, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, counted)
        yield reads


class Batches:
    """An iterator of a DataLoader would read its seed, on the CPU."""

    def __init__(self) -> None:
        self.batches = list(data(seed=2))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


EPOCHS, BATCHES = 10, 6


def _reads_by_step(callback: HyperGradient | None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    # Other rules read their counters, and other hyperparameters are tensors that a rule compares with 0: those are on
    # the CPU wherever the parameters are.
    module = Net("SGD", lr=0.01)
    with monkeypatch.context() as patches, _reading(patches) as reads:
        counts = Counts(reads)
        callbacks = [counts, *([callback] if callback else [])]
        fitted = trainer(None, callbacks=callbacks, max_epochs=EPOCHS, log_every_n_steps=1000)
        fitted.fit(module, data(), data(seed=1))
    found = [*counts.batches[1:], reads.count]
    return [b - a for a, b in pairwise(found)]


@pytest.mark.parametrize("pieces", [{}, {"rewind": Rewind(), "shape": Cosine()}], ids=["plain", "pieces"])
def test_a_step_reads_nothing_and_an_update_once(pieces: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _reads_by_step(None, monkeypatch)
    callback = HyperGradient("lr", val_dataloaders=Batches(), every_n_steps=4, controller=Descent(), **pieces)
    tuned = _reads_by_step(callback, monkeypatch)
    steps = EPOCHS * BATCHES
    extra = {step: b - a for step, (a, b) in enumerate(zip(plain, tuned, strict=True), start=1)}
    updates = {u.step for u in callback.history}
    checkpoints = {step for step in extra if "rewind" in pieces and Readout().is_due(step, steps)}
    # After the last batch of an epoch Lightning validates.
    plain_steps = {step for step in extra if step % BATCHES} - updates - checkpoints
    assert len(updates) >= 14
    assert len(plain_steps) >= 20
    assert {extra[step] for step in plain_steps} == {0}
    assert {extra[step] for step in updates - checkpoints if step % BATCHES} == {1}
