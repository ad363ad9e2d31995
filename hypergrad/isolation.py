"""Run user code and leave no trace: every object it can reach is put back as it was, and so are the RNG streams."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from logging import Logger
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# Never entered: code, plain values, and data that an evaluation reads but does not own.
_OPAQUE = (
    *(str, bytes, int, float, complex, bool, type(None), type, ModuleType, Logger),
    *(np.ndarray, torch.dtype, torch.device, Dataset, DataLoader, Sampler),
)
_Undo = Callable[[], None]


@contextmanager
def preserved(*roots: object, parameters: bool = False, opaque: tuple[type, ...] = ()) -> Iterator[None]:
    """Put back everything reachable from `roots` when the block ends, also when it raises.

    Within the block, tensors that are not parameters (buffers, metric states, optimizer state, tensors kept in
    attributes, lists or dicts) are replaced by copies, so that in-place changes reach the copies only. Attributes,
    lists, dicts, sets, deques, train/eval flags and random generators are recorded and put back.

    Args:
        roots: modules, optimizers or any Python objects with a `__dict__`.
        parameters: also record the values and `.grad` of parameters and put them back, in place. Without it
            parameters are taken to be left alone.
        opaque: further types that are neither entered nor copied.
    """
    recorder = _Recorder(parameters=parameters, opaque=(*_OPAQUE, *opaque))
    with ExitStack() as stack:
        recorder.stack = stack
        for root in roots:
            recorder.record(root)
        yield


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Put the global RNG streams of torch (CPU and current accelerator), NumPy and Python back at the end.

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
        self._depth = 0
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the private streams anew; inside `active()` too."""
        if self._depth:
            RngState.seed(seed)
            return
        with preserved_rng(seed):
            self._state = RngState.capture()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Swap the private streams in, and the global ones back at the end."""
        outer = RngState.capture()
        self._state.restore()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._state = RngState.capture()
            outer.restore()


class _Recorder:
    """Walks an object graph once, replacing tensors by copies and pushing one undo per changed place."""

    def __init__(self, *, parameters: bool, opaque: tuple[type, ...]) -> None:
        self.stack = ExitStack()
        self._parameters = parameters
        self._opaque = opaque
        self._seen: set[int] = set()
        self._copies: dict[int, torch.Tensor] = {}
        self._alive: list[object] = []  # ids stay unique only while their objects live

    def record(self, value: object) -> None:
        """Record whatever can change inside `value`, and everything below it."""
        if isinstance(value, self._opaque) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._alive.append(value)
        if isinstance(value, torch.Tensor):
            self._record_tensor(value)
        elif isinstance(value, torch.nn.Module):
            self._record_module(value)
        elif isinstance(value, dict):
            self._record_dict(value)
        elif isinstance(value, (list, deque, set)):
            self._record_sequence(value)
        elif isinstance(value, tuple):
            for item in value:
                self.record(item)
        elif not self._record_generator(value) and not callable(value) and hasattr(value, "__dict__"):
            self._record_dict(vars(value))

    def _record_tensor(self, tensor: torch.Tensor) -> None:
        if not (self._parameters and tensor.is_leaf):
            return
        saved, grad = tensor.detach().clone(), tensor.grad
        saved_grad = None if grad is None else grad.detach().clone()

        def undo() -> None:
            with torch.no_grad():
                tensor.copy_(saved)
                if grad is not None and saved_grad is not None:
                    grad.copy_(saved_grad)
            tensor.grad = grad

        self.stack.callback(undo)

    def _record_module(self, module: torch.nn.Module) -> None:
        attributes = vars(module)
        self.stack.callback(_undo_dict(attributes))
        for name, value in list(attributes.items()):
            if name not in _module_internals():
                attributes[name] = self._substitute(value)
        for name in ("_parameters", "_buffers", "_modules"):
            if attributes[name]:
                self._record_dict(attributes[name])

    def _record_dict(self, mapping: dict[Any, Any]) -> None:
        self.stack.callback(_undo_dict(mapping))
        for key, value in list(mapping.items()):
            self.record(key)
            mapping[key] = self._substitute(value)

    def _record_sequence(self, values: list[Any] | deque[Any] | set[Any]) -> None:
        saved = list(values)

        def undo() -> None:
            values.clear()
            (values.update if isinstance(values, set) else values.extend)(saved)

        self.stack.callback(undo)
        if isinstance(values, set):
            for item in saved:
                self.record(item)
            return
        for i, item in enumerate(saved):
            values[i] = self._substitute(item)

    def _record_generator(self, value: object) -> bool:
        if isinstance(value, torch.Generator):
            self.stack.callback(value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            bits, state = value.bit_generator, value.bit_generator.state
            self.stack.callback(lambda: setattr(bits, "state", state))
        elif isinstance(value, np.random.RandomState):
            self.stack.callback(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            self.stack.callback(value.setstate, value.getstate())
        else:
            return False
        return True

    def _substitute(self, value: Any) -> Any:
        """What stands in for `value` inside the block: a copy of a plain tensor, otherwise the value, recorded."""
        # Parameters stay themselves, so that gradients reach them; a tensor with a graph is a cached activation.
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter) or value.requires_grad:
            self.record(value)
            return value
        if id(value) not in self._copies:
            # A copy made here is an ordinary tensor, also where the original was made in inference mode
            # (metric states after a Trainer's validation), which autograd would refuse.
            self._copies[id(value)] = value.clone()
            self._alive.append(value)
        return self._copies[id(value)]


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _undo_dict(mapping: dict[Any, Any]) -> _Undo:
    saved = list(mapping.items())

    def undo() -> None:
        mapping.clear()
        mapping.update(saved)

    return undo


@lru_cache(maxsize=1)
def _module_internals() -> frozenset[str]:
    """Attributes that every bare Module has: its registries and hooks, which an evaluation does not change."""
    return frozenset(vars(torch.nn.Module()))
