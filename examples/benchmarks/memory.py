"""How much memory tensors hold at the peak of a computation, on any device and whatever the allocator keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that come into being under it, as long as they live; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self._now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            self._now -= size
            del self._storages[key]

        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, freed)
            self._now += size
            self.peak = max(self.peak, self._now)


def peak(call: Callable[[], object], existing: Iterable[torch.Tensor] = ()) -> int:
    """The most bytes of tensors that live at the same time: of a call's, and of those that were there before it."""
    gc.collect()
    with Held() as held:
        for tensor in existing:
            held.count(tensor.untyped_storage())
        del existing
        call()
    return held.peak
