"""The global random streams: put back after a block, or swapped for private ones."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

_SPARE: list[np.random.BitGenerator] = []  # to make one takes longer than everything else here

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


@contextmanager
def preserved_rng(seed: int | None = None, generators: Sequence[Generator] = ()) -> Iterator[None]:
    """Put the global RNG streams of torch (CPU and the current CUDA device), NumPy and Python back at the end.

    Args:
        seed: start the block from this seed; None starts it from where the streams stand.
        generators: further random generators (of torch, NumPy or Python) that are treated as the global ones are.
    """
    if seed is not None:
        with _private_numpy():
            state = RngState.capture(generators, numpy=False)
            try:
                RngState.seed(seed, generators)
                yield
            finally:
                state.restore()
        return
    state = RngState.capture(generators)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def _private_numpy() -> Iterator[None]:
    """NumPy's global functions draw from a bit generator of ours: to swap it costs less than to read and write one."""
    # Public since NumPy 1.24, and missing from its stubs.
    get, put = np.random.get_bit_generator, np.random.set_bit_generator  # type: ignore[attr-defined]
    before = get()
    put(_SPARE.pop() if _SPARE else np.random.MT19937())
    try:
        yield
    finally:
        _SPARE.append(get())
        put(before)


class RngState:
    """The state of every global RNG stream that training code draws from, and of further generators."""

    def __init__(self, cpu: torch.Tensor, cuda: torch.Tensor | None, numpy: Any, python: Any, others: Any) -> None:
        self._cpu, self._cuda, self._numpy, self._python, self._others = cpu, cuda, numpy, python, others

    @classmethod
    def capture(cls, generators: Sequence[Generator] = (), *, numpy: bool = True) -> RngState:
        """The streams as they stand, without NumPy's if it is not asked for.

        CUDA only once it is in use, which capturing must not start.
        """
        cuda = torch.cuda.get_rng_state() if _cuda_in_use() else None
        others = [(generator, _get_state(generator)) for generator in generators]
        return cls(torch.get_rng_state(), cuda, np.random.get_state() if numpy else None, random.getstate(), others)

    def restore(self) -> None:
        """Make the streams continue from here."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        if self._numpy is not None:
            np.random.set_state(self._numpy)
        random.setstate(self._python)
        for generator, state in self._others:
            _set_state(generator, state)

    def state_dict(self) -> dict[str, Any]:
        """The global streams in plain containers.

        Raises:
            TypeError: where NumPy's global stream is not its usual one, or there are further generators.
        """
        if self._others or not isinstance(self._numpy, tuple):
            raise TypeError("Only the global streams of the usual kinds can be written down.")
        kind, keys, *rest = self._numpy
        version, words, gauss = self._python
        return {
            "cpu": self._cpu,
            "cuda": self._cuda,
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
            "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> RngState:
        """The streams whose `state_dict` this is."""
        kind, keys, *rest = state["numpy"]
        version, words, gauss = state["python"]
        python = version, tuple(words.tolist()), gauss
        cuda = None if state["cuda"] is None else state["cuda"].cpu()
        return cls(state["cpu"].cpu(), cuda, (kind, keys.cpu().numpy().astype(np.uint32), *rest), python, [])

    @staticmethod
    def seed(seed: int, generators: Sequence[Generator] = ()) -> None:
        """Start every stream from one seed."""
        # torch.manual_seed would also queue a seed for a CUDA context that does not exist yet.
        torch.default_generator.manual_seed(seed)
        if _cuda_in_use():
            torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for generator in generators:
            _seed(generator, seed)


def generators_of(root: object, limit: int = 10_000) -> list[Generator]:
    """Random generators that attributes, lists, tuples and dicts lead to from an object, such as a dataset's own.

    Args:
        root: where to start.
        limit: stop after this many objects, so that data kept in Python lists is not searched item by item.
    """
    found: list[Generator] = []
    queue, seen = deque([root]), {id(root)}
    while queue and len(seen) < limit:
        value = queue.popleft()
        if isinstance(value, Generator):
            found.append(value)
            continue
        children: Iterable[object] = ()
        if isinstance(value, dict):
            children = value.values()
        elif isinstance(value, (list, tuple)):
            children = value
        elif hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType, torch.Tensor)):
            children = vars(value).values()
        for child in itertools.islice(children, limit):
            if id(child) not in seen and not isinstance(child, (str, bytes, int, float)):
                seen.add(id(child))
                queue.append(child)
    return found


def _get_state(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed(generator: Generator, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    else:
        generator.seed(seed % 2**32)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
