"""Run user code and leave no trace: every object it can reach is put back as it was."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from logging import Logger
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

# Plain values: nothing in them can change. Compared by exact type, which is what makes large containers cheap.
_ATOMS: frozenset[type] = frozenset(
    {str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size}
)
# Never entered: code, and data that an evaluation reads but does not own.
_OPAQUE = (type, Enum, ModuleType, FunctionType, BuiltinFunctionType, MethodType, Logger, Dataset, DataLoader)
_Undo = Callable[[], object]


@contextmanager
def preserved(*roots: object, parameters: bool = False, opaque: tuple[type, ...] = ()) -> Iterator[None]:
    """Put back everything reachable from `roots` when the block ends, also when it raises.

    Within the block, tensors that are not parameters (buffers, metric states, optimizer state, tensors kept in
    attributes, lists, tuples or dicts) and NumPy arrays are replaced by copies, so that in-place changes reach the
    copies only. Attributes, lists, dicts, sets, deques, train/eval flags and random generators are recorded and put
    back, also those of ordinary objects and of the modules' own classes.

    Not covered: what no attribute leads to, such as globals and variables that a closure holds; datasets.

    Args:
        roots: modules, optimizers or any Python objects with a `__dict__`.
        parameters: also record the values of parameters and put them back, in place; they have no `.grad` inside the
            block, and their own again after it. Without it parameters are taken to be left alone.
        opaque: further types that are neither entered nor copied.
    """
    recorder = _Recorder(parameters=parameters, opaque=(*_OPAQUE, *opaque))
    try:
        for root in roots:
            recorder.record(root)
        yield
    finally:
        recorder.undo()


class _Recorder:
    """Walks an object graph once, replacing tensors and arrays by copies and noting how to undo every change."""

    def __init__(self, *, parameters: bool, opaque: tuple[type, ...]) -> None:
        self._parameters = parameters
        self._handlers = _handlers(opaque)
        self._undo: list[_Undo] = []
        self._seen: dict[int, object] = {}  # also keeps objects alive, so that their ids stay their own
        self._copies: dict[int, Any] = {}
        self._training: list[tuple[torch.nn.Module, bool]] = []

    def undo(self) -> None:
        """Put everything back, what was recorded last first."""
        for module, training in self._training:
            vars(module)["training"] = training  # a plain flag: Module.__setattr__ costs more than the rest together
        while self._undo:
            self._undo.pop()()

    def record(self, value: Any) -> None:
        """Record whatever can change inside `value`, and everything below it."""
        handler = self._handlers[type(value)]
        if handler is None or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        handler(self, value)

    def _record_tuple(self, values: tuple[Any, ...]) -> None:
        for item in values:
            self.record(item)

    def _record_object(self, value: object) -> None:
        if hasattr(value, "__dict__"):
            self._record_dict(vars(value))

    def _record_tensor(self, tensor: torch.Tensor) -> None:
        if not (self._parameters and tensor.is_leaf):
            return
        # The gradient is taken away and not copied: nothing can write into it, and a copy of the model is saved.
        saved, grad = tensor.detach().clone(), tensor.grad
        tensor.grad = None

        def undo() -> None:
            with torch.no_grad():
                tensor.copy_(saved)
            tensor.grad = grad

        self._undo.append(undo)

    def _record_module(self, module: torch.nn.Module) -> None:
        attributes = vars(module)
        buffers, children = attributes["_buffers"], attributes["_modules"]
        if type(module).__module__.startswith("torch.nn.modules.") and not _has_state(attributes):
            # torch's own layers change nothing in an evaluation but buffers and, here, the train/eval flag.
            self._training.append((module, module.training))
        else:
            self._undo.append(_undo_dict(attributes))
            for name in attributes.keys() - _module_internals():
                if not _is_plain(attributes[name]):
                    attributes[name] = self._substitute(attributes[name])
            self._record_classes(type(module))
        if buffers:
            self._record_dict(buffers)
        if children:
            self._record_dict(children)
        if self._parameters:
            self.record(attributes["_parameters"])

    def _record_classes(self, kind: type) -> None:
        """Lists and dicts that a user's class keeps for all its instances, often by mistake."""
        for klass in kind.__mro__:
            if id(klass) in self._seen or klass.__module__.partition(".")[0] in _LIBRARIES:
                continue
            self._seen[id(klass)] = klass
            for name, value in vars(klass).items():
                if isinstance(value, (list, dict, set, deque)) and not name.startswith("__"):
                    self.record(value)

    def _record_dict(self, mapping: dict[Any, Any]) -> None:
        self._undo.append(_undo_dict(mapping))
        for key, value in list(mapping.items()):
            if type(key) not in _ATOMS:
                self.record(key)
            if not _is_plain(value):
                mapping[key] = self._substitute(value)

    def _record_sequence(self, values: list[Any] | deque[Any]) -> None:
        saved = list(values)

        def undo() -> None:
            values.clear()
            values.extend(saved)

        self._undo.append(undo)
        for i, item in enumerate(saved):
            if not _is_plain(item):
                values[i] = self._substitute(item)

    def _record_set(self, values: set[Any]) -> None:
        saved = set(values)

        def undo() -> None:
            values.clear()
            values.update(saved)

        self._undo.append(undo)
        for item in saved:
            self.record(item)

    def _record_torch_generator(self, value: torch.Generator) -> None:
        state = value.get_state()
        self._undo.append(lambda: value.set_state(state))

    def _record_numpy_generator(self, value: np.random.Generator) -> None:
        bits, state = value.bit_generator, value.bit_generator.state
        self._undo.append(lambda: setattr(bits, "state", state))

    def _record_legacy_generator(self, value: np.random.RandomState) -> None:
        state = value.get_state()
        self._undo.append(lambda: value.set_state(state))

    def _record_python_generator(self, value: random.Random) -> None:
        state = value.getstate()
        self._undo.append(lambda: value.setstate(state))

    def _substitute(self, value: Any) -> Any:
        """What stands in for `value` inside the block: a copy of a plain tensor, otherwise the value, recorded."""
        if self._handlers[type(value)] is None:
            return value
        if isinstance(value, np.ndarray):
            return self._copy_of(value, value.copy)
        if type(value) is tuple:
            return tuple(self._substitute(item) for item in value)
        # Parameters stay themselves, so that gradients reach them; a tensor with a graph is a cached activation.
        if isinstance(value, torch.Tensor) and not (isinstance(value, torch.nn.Parameter) or value.requires_grad):
            # A copy made here is an ordinary tensor, also where the original was made in inference mode (metric
            # states after a Trainer's validation), which autograd would refuse.
            return self._copy_of(value, value.clone)
        self.record(value)
        return value

    def _copy_of(self, value: object, copy: Callable[[], Any]) -> Any:
        if id(value) not in self._copies:
            self._seen[id(value)] = value
            self._copies[id(value)] = copy()
        return self._copies[id(value)]


_Handler = Callable[[_Recorder, Any], None]
# The first that fits. Objects of a user's own come last.
_BY_TYPE: tuple[tuple[type | tuple[type, ...], _Handler], ...] = (
    (torch.nn.Module, _Recorder._record_module),
    (torch.Tensor, _Recorder._record_tensor),
    (dict, _Recorder._record_dict),
    ((list, deque), _Recorder._record_sequence),
    (set, _Recorder._record_set),
    (tuple, _Recorder._record_tuple),
    (torch.Generator, _Recorder._record_torch_generator),
    (np.random.Generator, _Recorder._record_numpy_generator),
    (np.random.RandomState, _Recorder._record_legacy_generator),
    (random.Random, _Recorder._record_python_generator),
)


class _Handlers(dict[type, _Handler | None]):
    """How to record a value, by its exact type; None where nothing in it can change. Found out once per type."""

    def __init__(self, opaque: tuple[type, ...]) -> None:
        super().__init__(dict.fromkeys(_ATOMS))
        self._opaque = opaque

    def __missing__(self, kind: type) -> _Handler | None:
        handler: _Handler | None = None
        if not issubclass(kind, self._opaque):
            known = (handler for types, handler in _BY_TYPE if issubclass(kind, types))
            handler = next(known, None if _is_machinery(kind.__module__) else _Recorder._record_object)
        self[kind] = handler
        return handler


@lru_cache(maxsize=8)
def _handlers(opaque: tuple[type, ...]) -> _Handlers:
    return _Handlers(opaque)


# Libraries whose classes keep no state of a user's module.
_LIBRARIES = frozenset({"builtins", "torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"})


# Objects that do work of their own, in threads or outside the process: their insides are not ours to rewind.
_MACHINERY = (
    *("threading", "queue", "multiprocessing", "concurrent", "asyncio", "socket", "subprocess", "io", "_io", "ctypes"),
    *("weakref", "tensorboard", "torch.utils.tensorboard", "torch.distributed", "torch.cuda", "torch.jit", "torch.fx"),
    *("torch._dynamo", "torch._inductor", "torch._C"),
)


def _is_machinery(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in _MACHINERY)


def _undo_dict(mapping: dict[Any, Any]) -> _Undo:
    saved = list(mapping.items())

    def undo() -> None:
        # A dict that is cleared and refilled is a new one to the interpreter, whose inline caches then miss: every
        # attribute of a module would be slower to reach from then on. So nothing is written that has not changed.
        if len(mapping) > len(saved):
            known = {key for key, _ in saved}
            for key in [key for key in mapping if key not in known]:
                del mapping[key]
        if [*map(id, mapping)] != [id(key) for key, _ in saved]:
            mapping.clear()
        for key, value in saved:
            if key not in mapping or mapping[key] is not value:
                mapping[key] = value

    return undo


def _is_plain(value: object) -> bool:
    """A value in which nothing can change: a number, a string, or a tuple of those."""
    return type(value) in _ATOMS or (type(value) is tuple and all(type(item) in _ATOMS for item in value))


def _has_state(attributes: dict[str, Any]) -> bool:
    """Whether one of torch's own layers carries more than settings, such as a tensor that somebody attached."""
    internals = _module_internals()
    return any(
        type(value) not in _ATOMS and name not in internals and not _is_plain(value)
        for name, value in attributes.items()
    )


@lru_cache(maxsize=1)
def _module_internals() -> frozenset[str]:
    """Attributes that every bare Module has: its registries and hooks, which an evaluation does not change."""
    return frozenset(vars(torch.nn.Module()))
