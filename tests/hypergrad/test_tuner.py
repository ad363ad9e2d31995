"""Offsets, bounds and what happens to numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from hypergrad import (
    Controller,
    Descent,
    Hold,
    HyperparameterError,
    Identity,
    Measurement,
    OptimizerHyperparameter,
    Reading,
    Tuner,
)
from hypergrad.tuner import MAX_DECAY_PER_STEP

LR, DECAY = OptimizerHyperparameter("lr"), OptimizerHyperparameter("weight_decay")


class Push(Controller):
    """Moves every coordinate by the same amount."""

    def __init__(self, by: float) -> None:
        self.by = by

    def moves(self, readings: Sequence[Reading]) -> list[float]:
        return [self.by] * len(readings)


def _measure(h: OptimizerHyperparameter, scheduled: float, value: float | None = None, **kwargs: Any) -> Measurement:
    numbers = {"hypergradient": 1.0, "scale": 2.0} | kwargs
    return Measurement(h.name, h, scheduled, scheduled if value is None else value, **numbers)


def _push(tuner: Tuner, h: OptimizerHyperparameter, scheduled: float, times: int = 1) -> float:
    group = {h.name: scheduled}
    for _ in range(times):
        value = tuner.values(group, {h.name: h})[h.name]
        tuner.update([_measure(h, scheduled, value)], loss=1.0)
    return tuner.values(group, {h.name: h})[h.name]


def test_hold_returns_the_scheduled_value_itself() -> None:
    tuner = Tuner(Hold())
    for value in (0.1, 1e-300, 0.0, 123.456):
        assert _push(tuner, LR, value) == value


def test_a_learned_lr_is_a_factor_on_whatever_the_schedule_says() -> None:
    tuner = Tuner(Push(math.log(2)))
    assert _push(tuner, LR, 0.1) == pytest.approx(0.2)
    assert tuner.values({"lr": 0.03}, {"lr": LR})["lr"] == pytest.approx(0.06)
    assert tuner.values({"lr": 0.0}, {"lr": LR})["lr"] == 0.0


def test_a_fraction_moves_along_its_logit() -> None:
    momentum = OptimizerHyperparameter("momentum")
    value = _push(Tuner(Push(1.0)), momentum, 0.9)
    assert math.log(value / (1 - value)) == pytest.approx(math.log(9.0) + 1.0)


@pytest.mark.parametrize("by", [-1000.0, -1.0, 1.0, 1000.0])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "betas[1]", "eps"])
def test_bounds_hold_and_do_not_wind_up(name: str, by: float) -> None:
    h = OptimizerHyperparameter(name)
    start = 0.5 if name in ("momentum", "betas[1]") else 1e-3
    tuner = Tuner(Push(by))
    group = {h.key: (0.0, start) if h.index else start}
    for _ in range(50):
        value = tuner.values(group, {name: h})[name]
        tuner.update([_measure(h, start, value)], loss=1.0)
    end = tuner.values(group, {name: h})[name]
    assert end == pytest.approx(h.bounds[by > 0], rel=1e-9, abs=0)
    tuner.controller = Push(-0.1 if by > 0 else 0.1)
    tuner.update([_measure(h, start, end)], loss=1.0)
    assert tuner.values(group, {name: h})[name] != pytest.approx(end, rel=1e-9, abs=0)


def test_a_start_outside_the_bounds_is_kept_and_may_come_back() -> None:
    assert _push(Tuner(Push(1.0)), LR, 50.0) == pytest.approx(50.0)
    assert _push(Tuner(Push(-1.0)), LR, 50.0) == pytest.approx(50.0 / math.e)


def test_weight_decay_of_zero_starts_from_its_floor_when_it_moves() -> None:
    tuner = Tuner(Push(0.0))
    assert _push(tuner, DECAY, 0.0) == 0.0
    tuner.controller = Push(1.0)
    assert _push(tuner, DECAY, 0.0) == pytest.approx(1e-5 * math.e)


def test_a_fraction_of_zero_starts_from_its_floor_and_one_outside_its_domain_is_an_error() -> None:
    assert 0.01 < _push(Tuner(Push(0.5)), OptimizerHyperparameter("momentum"), 0.0) < 0.1
    for start in (1.0, 1.5, -0.1):
        with pytest.raises(HyperparameterError, match=f"momentum={start:g} lies outside the domain of Logit.*Identity"):
            OptimizerHyperparameter("momentum").start(start)


def test_a_coordinate_of_ones_own() -> None:
    exponent = OptimizerHyperparameter("beta2_decay", transform=Identity(), upper=-0.1)
    assert _push(Tuner(Push(0.3)), exponent, -0.8) == pytest.approx(-0.5)
    assert _push(Tuner(Push(0.3)), exponent, -0.8, times=5) == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "settings",
    [{"name": "lr", "lower": 0.0}, {"name": "momentum", "upper": 1.0}, {"name": "lr", "lower": 2.0, "upper": 1.0}],
)
def test_bad_domains_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(HyperparameterError, match=r"`(lower|upper)` must"):
        OptimizerHyperparameter(**settings)


def test_no_wind_up_behind_the_bound_on_decay() -> None:
    tuner = Tuner(Push(1.0))
    coordinates = {"lr": LR, "weight_decay": DECAY}
    group = {"lr": 1.0, "weight_decay": 0.4}
    for _ in range(10):
        used = tuner.values(group, coordinates)
        tuner.update([_measure(DECAY, 0.4, used["weight_decay"])], loss=1.0)
    tuner.controller = Push(-0.5)
    tuner.update([_measure(DECAY, 0.4, tuner.values(group, coordinates)["weight_decay"])], loss=1.0)
    assert tuner.values(group, coordinates)["weight_decay"] < MAX_DECAY_PER_STEP * 0.7


def test_lr_times_weight_decay_stays_below_one_under_any_schedule() -> None:
    tuner = Tuner(Push(3.0))
    for _ in range(10):
        tuner.update([_measure(LR, 0.1), _measure(DECAY, 0.1)], loss=1.0)
    for scheduled in (0.1, 1.0, 10.0):
        values = tuner.values({"lr": scheduled, "weight_decay": 0.1}, {"lr": LR, "weight_decay": DECAY})
        assert values["lr"] * values["weight_decay"] <= MAX_DECAY_PER_STEP * (1 + 1e-12) < 1
        only_lr = tuner.values({"lr": scheduled, "weight_decay": 0.9}, {"lr": LR})
        assert only_lr["lr"] * 0.9 <= MAX_DECAY_PER_STEP * (1 + 1e-12)


def test_the_users_own_setting_is_never_corrected() -> None:
    values = Tuner(Hold()).values({"lr": 2.0, "weight_decay": 2.0}, {"lr": LR, "weight_decay": DECAY})
    assert values == {"lr": 2.0, "weight_decay": 2.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_move_nothing(bad: float) -> None:
    tuner = Tuner(Push(1.0))
    before = tuner.state_dict()
    assert tuner.update([_measure(LR, 0.1)], loss=bad).skipped == "non-finite validation loss"
    for field in ("hypergradient", "scale"):
        outcome = tuner.update([_measure(LR, 0.1), _measure(DECAY, 0.1, **{field: bad})], loss=1.0)
        assert outcome.skipped == "non-finite hypergradient"
    assert tuner.state_dict() == before


def test_a_controller_that_returns_nan_is_named() -> None:
    with pytest.raises(ValueError, match="Push moved 'lr' by nan"):
        Tuner(Push(math.nan)).update([_measure(LR, 0.1)], loss=1.0)


def test_a_zero_tangent_gives_no_cosine_and_no_move() -> None:
    tuner = Tuner(Descent())
    outcome = tuner.update([_measure(LR, 0.1, hypergradient=0.0, scale=0.0)], loss=1.0)
    assert outcome.cosines == {"lr": 0.0}
    assert tuner.values({"lr": 0.1}, {"lr": LR}) == {"lr": 0.1}


def test_state_dict_continues_exactly() -> None:
    def drive(tuner: Tuner, start: int, stop: int) -> None:
        for t in range(start, stop):
            tuner.update([_measure(LR, 0.1, hypergradient=math.sin(t)), _measure(DECAY, 0.1)], loss=1.0)

    whole, first, second = Tuner(Descent()), Tuner(Descent()), Tuner(Descent())
    drive(whole, 0, 20)
    drive(first, 0, 11)
    second.load_state_dict(first.state_dict())
    drive(second, 11, 20)
    assert second.state_dict() == whole.state_dict()
