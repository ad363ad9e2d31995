"""Controllers are pure objects: lists of floats in, lists of floats out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hypergrad import Cautious, ConfigurationError, Controller, Descent, Gated, Hold, Reading


def _drive(descent: Descent, cosines: list[float]) -> list[float]:
    return [descent.moves([Reading("lr", slope=1.0, cosine=c)])[0] for c in cosines]


def test_hold_never_moves() -> None:
    assert Hold().moves([Reading("a", 1.0, 1.0), Reading("b", -1.0, -1.0)]) == [0.0, 0.0]


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.9])
def test_agreeing_readings_move_at_full_rate_whatever_their_size(size: float) -> None:
    assert _drive(Descent(rate=0.3), [-size] * 20) == pytest.approx([0.3] * 20)
    assert _drive(Descent(rate=0.3), [size] * 20) == pytest.approx([-0.3] * 20)


def test_noise_moves_an_order_of_magnitude_less_than_signal() -> None:
    noise = random.Random(0)
    moves = _drive(Descent(rate=0.5), [noise.gauss(0.0, 0.1) for _ in range(2000)])[100:]
    assert sum(map(abs, moves)) / len(moves) < 0.05
    assert abs(sum(moves)) / len(moves) < 0.01


def test_a_bias_in_the_noise_is_followed() -> None:
    noise = random.Random(0)
    moves = _drive(Descent(), [0.05 + noise.gauss(0.0, 0.1) for _ in range(1000)])
    assert sum(moves) < -20.0


def test_never_against_the_latest_reading_and_never_beyond_the_rate() -> None:
    noise = random.Random(0)
    cosines = [noise.uniform(-1.0, 1.0) * 10 ** noise.uniform(-8, 0) for _ in range(1000)]
    for cosine, move in zip(cosines, _drive(Descent(rate=0.7), cosines), strict=True):
        assert move * cosine <= 0.0
        assert abs(move) <= 0.7


def test_zero_readings_are_harmless() -> None:
    assert _drive(Descent(), [0.0, 0.0, 0.0]) == [0.0, 0.0, 0.0]


def test_coordinates_are_independent() -> None:
    together, alone = Descent(), Descent()
    for i in range(10):
        moves = together.moves([Reading("a", 1.0, math.sin(i)), Reading("b", 1.0, 0.5)])
        assert moves[0] == alone.moves([Reading("a", 1.0, math.sin(i))])[0]


def test_state_dict_continues_exactly_and_does_not_share_memory() -> None:
    cosines = [math.sin(3 * i) for i in range(30)]
    whole = _drive(Descent(), cosines)
    first, second = Descent(), Descent()
    start = _drive(first, cosines[:13])
    state = first.state_dict()
    _drive(first, cosines)
    second.load_state_dict(state)
    assert start + _drive(second, cosines[13:]) == whole


class Push(Controller):
    def __init__(self, by: float) -> None:
        self.by = by

    def moves(self, readings: Sequence[Reading]) -> list[float]:
        return [self.by] * len(readings)


@pytest.mark.parametrize(("name", "by", "late"), [("lr", 0.5, 0.15), ("lr", -0.5, -0.5), ("weight_decay", 0.5, 0.5)])
def test_cautious_slows_the_late_growth_of_lr_only(name: str, by: float, late: float) -> None:
    cautious = Cautious(Push(by), free=3, slowdown=0.3)
    moves = [cautious.moves([Reading("k", 1.0, 1.0, name)])[0] for _ in range(5)]
    assert moves == pytest.approx([by, by, by, late, late])


def test_cautious_on_noise_drifts_down_and_not_up() -> None:
    noise, cautious = random.Random(0), Cautious(Descent())
    moves = [cautious.moves([Reading("k", 1.0, noise.gauss(0.0, 0.1), "lr")])[0] for _ in range(2000)]
    assert sum(moves) < 0.0


def test_cautious_continues_from_its_state() -> None:
    def moves(cautious: Cautious, start: int, stop: int) -> list[float]:
        return [cautious.moves([Reading("k", 1.0, math.sin(i), "lr")])[0] for i in range(start, stop)]

    whole, first, second = (Cautious(Descent(), free=10) for _ in range(3))
    start = moves(first, 0, 8)
    second.load_state_dict(first.state_dict())
    assert start + moves(second, 8, 30) == moves(whole, 0, 30)


@pytest.mark.parametrize("settings", [{"free": -1}, {"free": 1.5}, {"slowdown": 1.1}, {"slowdown": math.nan}])
def test_bad_settings_of_cautious_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="but got"):
        Cautious(Descent(), **settings)
    with pytest.raises(ConfigurationError, match="instance of Controller"):
        Cautious("descent")  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, -1.0, 2.1, math.nan, math.inf])
def test_bad_rates_are_named(rate: float) -> None:
    with pytest.raises(ValueError, match=r"`rate` must lie in \(0, 2\], but got rate="):
        Descent(rate)


@pytest.mark.parametrize("memory", [-0.1, 1.0, math.nan])
def test_bad_memories_are_named(memory: float) -> None:
    with pytest.raises(ValueError, match="`memory` must lie"):
        Descent(memory=memory)
    with pytest.raises(ValueError, match="`scale_memory` must lie"):
        Descent(scale_memory=memory)


def _gate(gated: Gated, strengths: Sequence[float | torch.Tensor]) -> list[Any]:
    return [gated.moves([Reading("a", slope=s, cosine=None)])[0] for s in strengths]


def test_the_gate_opens_for_signal_and_stays_shut_on_noise() -> None:
    noise = random.Random(0)
    readings = [noise.gauss(0.0, 1.0) for _ in range(2000)]
    for threshold, most in ((0.3, 0.5), (1.0, 0.02)):
        moved = _gate(Gated(Push(0.5), threshold=threshold), readings)[20:]
        assert sum(m != 0.0 for m in moved) / len(moved) < most
        assert all(_gate(Gated(Push(0.5), threshold=threshold), [r + 5.0 for r in readings])[20:])


def test_a_gate_at_zero_is_always_open() -> None:
    assert _gate(Gated(Push(0.5), threshold=0.0), [1.0, -1.0, 1.0, -1.0])[1:] == [0.5] * 3


def test_the_gate_is_the_ratio_of_mean_and_deviation() -> None:
    noise = random.Random(1)
    readings = [noise.gauss(0.4, 1.0) for _ in range(10)]
    mean = sum(readings) / 10
    ratio = abs(mean) / math.sqrt(sum((r - mean) ** 2 for r in readings) / 10)
    for threshold, move in ((ratio * 0.99, 0.5), (ratio * 1.01, 0.0)):
        assert _gate(Gated(Push(0.5), threshold=threshold, memory=0.9), readings)[-1] == move


def test_each_element_of_a_tensor_has_a_gate_and_each_coordinate_as_well() -> None:
    class Each(Push):
        def moves(self, readings: Sequence[Reading]) -> list[Any]:
            return [r.slope * 0.0 + self.by for r in readings]

    noise = random.Random(2)
    rows = [[noise.gauss(0.2, 1.0), noise.gauss(3.0, 1.0)] for _ in range(30)]
    together = _gate(Gated(Each(0.5), threshold=0.5), [torch.tensor(row, dtype=torch.float64) for row in rows])
    apart = [_gate(Gated(Each(0.5), threshold=0.5), column) for column in zip(*rows, strict=True)]
    assert [tuple(t.tolist()) for t in together[1:]] == list(zip(*apart, strict=True))[1:]
    assert 0.0 < sum(m != 0.0 for m in apart[0]) < 29 < sum(m != 0.0 for m in apart[1]) + 1


def test_gated_continues_from_its_state() -> None:
    readings = [math.sin(3 * i) + 0.4 for i in range(30)]
    whole, first, second = Gated(Descent()), Gated(Descent()), Gated(Descent())
    start = _gate(first, readings[:13])
    second.load_state_dict(first.state_dict())
    _gate(first, readings)
    assert start + _gate(second, readings[13:]) == _gate(whole, readings)


@pytest.mark.parametrize(
    "settings", [{"threshold": -0.1}, {"threshold": math.nan}, {"memory": 1.0}, {"least": 1}, {"least": 2.5}]
)
def test_bad_settings_of_a_gate_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        Gated(Push(0.1), **settings)
    with pytest.raises(ConfigurationError, match="controller"):
        Gated(0.1)  # type: ignore[arg-type]
