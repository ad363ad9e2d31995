"""User code runs and leaves no trace."""

from __future__ import annotations

import random
import types
from collections import deque

import numpy as np
import pytest
import torch

from hypergrad import preserved, preserved_rng


class Meter:
    def __init__(self) -> None:
        self.total, self.seen = 0.0, [1]


class Counter:
    """Has a state and can be called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


class Everything(torch.nn.Module):
    """Keeps state in every place where people keep it."""

    shared: list[int] = []  # noqa: RUF012 (a mistake that people make)

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.tied = self.norm
        self.count = 0
        self.outputs: list[torch.Tensor] = []
        self.nested = {"a": [torch.zeros(2)], "b": {"c": deque([1])}}
        self.names = {"x"}
        self.plain = torch.zeros(2)
        self.meter = Meter()
        self.counter = Counter()
        self.confusion = np.zeros((2, 2))
        self.pair = (torch.zeros(2), [torch.zeros(1)])
        self.norm.cache = torch.zeros(2)
        self.generator = torch.Generator().manual_seed(0)
        self.numpy_rng = np.random.default_rng(0)
        self.python_rng = random.Random(0)
        self.imported = types

    def mess_up(self) -> None:
        self.train(not self.training)
        self.norm.train()
        self.norm(torch.randn(4, 3))
        self.count += 1
        self.new_attribute = 1
        self.outputs.append(torch.ones(1))
        self.nested["a"][0].add_(1)  # type: ignore[index]
        self.nested["b"]["c"].append(2)  # type: ignore[index,union-attr]
        self.names.add("y")
        self.plain += 1
        self.counter()
        self.confusion += 1
        self.pair[0].add_(1)
        self.pair[1].append(torch.ones(1))
        self.norm.cache.add_(1)
        self.shared.append(1)
        self.meter.total += 1
        self.meter.seen.append(2)
        torch.rand(1, generator=self.generator)
        self.numpy_rng.random()
        self.python_rng.random()

    def fingerprint(self) -> str:
        numbers = [*self.norm.state_dict().values(), self.plain, self.nested["a"][0]]  # type: ignore[index]
        parts = (
            self.training,
            self.norm.training,
            self.count,
            hasattr(self, "new_attribute"),
            self.outputs,
            self.nested,
            self.names,
            vars(self.meter),
            self.counter.calls,
            self.confusion,
            self.pair,
            self.norm.cache,
            self.shared,
            self.generator.get_state().sum().item(),
            self.numpy_rng.bit_generator.state,
            self.python_rng.getstate()[1][-1],
            [n.tolist() for n in numbers],
            [id(b) for b in self.buffers()],
            id(self.plain),
        )
        return repr(parts)


class _Boom(RuntimeError):
    def __init__(self, module: Everything) -> None:
        module.mess_up()
        super().__init__("boom")


def test_everything_is_put_back_also_after_an_exception() -> None:
    module = Everything()
    before = module.fingerprint()
    with preserved(module):
        module.mess_up()
        assert module.fingerprint() != before
    assert module.fingerprint() == before
    with pytest.raises(RuntimeError, match="boom"), preserved(module):
        raise _Boom(module)
    assert module.fingerprint() == before


def test_gradients_still_reach_the_parameters() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval()
    with preserved(module):
        loss = module(torch.randn(4, 3)).square().sum()
        gradients = torch.autograd.grad(loss, list(module.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_parameters_and_gradients_are_put_back_in_place_when_asked() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 3.0)
    optimizer = torch.optim.Adam([p], lr=0.1)
    grad = p.grad
    with preserved(optimizer, parameters=True):
        optimizer.step()
        optimizer.zero_grad()
    assert p.tolist() == [1.0, 1.0]
    assert p.grad is grad
    assert grad.tolist() == [3.0, 3.0]
    assert not optimizer.state


def test_tensors_made_in_inference_mode_can_be_differentiated_through() -> None:
    module = torch.nn.Module()
    with torch.inference_mode():
        module.total = torch.ones(2)
    weight = torch.ones(2, requires_grad=True)
    with preserved(module):
        module.total.add_(1)
        (gradient,) = torch.autograd.grad((weight * module.total).sum(), [weight])
    assert gradient.tolist() == [2.0, 2.0]
    assert module.total.tolist() == [1.0, 1.0]


def _draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def test_rng_streams_are_put_back() -> None:
    with preserved_rng(7):
        first = _draw()
    with preserved_rng():
        expected = _draw()
    with preserved_rng(7):
        again = _draw()
        _draw()
    assert again == first
    assert _draw() == expected


def test_further_generators_start_from_the_seed_and_are_put_back() -> None:
    generators = [torch.Generator(), np.random.default_rng(1), np.random.RandomState(2), random.Random(3)]

    def draw() -> list[float]:
        own, new, legacy, python = generators
        return [torch.rand(1, generator=own).item(), new.random(), legacy.rand(), python.random()]

    with preserved_rng(7, generators):
        first = draw()
    with preserved_rng(None, generators):
        expected = draw()
    with preserved_rng(7, generators):
        assert draw() == first
    assert draw() == expected
