"""The global random streams: put back after a block, or swapped for private ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Put the global RNG streams of torch (CPU and the current CUDA device), NumPy and Python back at the end.

    Args:
        seed: start the block from this seed; None starts it from where the streams stand.
    """
    state = RngState.capture()
    try:
        if seed is not None:
            RngState.seed(seed)
        yield
    finally:
        state.restore()


class RngState:
    """The state of every global RNG stream that training code draws from."""

    def __init__(self, cpu: torch.Tensor, cuda: torch.Tensor | None, numpy: Any, python: Any) -> None:
        self._cpu, self._cuda, self._numpy, self._python = cpu, cuda, numpy, python

    @classmethod
    def capture(cls) -> RngState:
        """The streams as they stand; CUDA only once it is in use, which capturing must not start."""
        cuda = torch.cuda.get_rng_state() if _cuda_in_use() else None
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Make the streams continue from here."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    @staticmethod
    def seed(seed: int) -> None:
        """Start every stream from one seed."""
        # torch.manual_seed would also queue a seed for a CUDA context that does not exist yet.
        torch.default_generator.manual_seed(seed)
        if _cuda_in_use():
            torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


class RngStream:
    """A private set of RNG streams: code run inside `active()` draws from them and not from the global ones."""

    def __init__(self, seed: int) -> None:
        self._active = False
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the private streams anew; inside `active()` too."""
        if self._active:
            RngState.seed(seed)
            return
        with preserved_rng(seed):
            self._state = RngState.capture()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Swap the private streams in, and the global ones back at the end. Does not nest."""
        outer = RngState.capture()
        self._state.restore()
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._state = RngState.capture()
            outer.restore()


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
