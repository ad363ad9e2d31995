"""The rules of race, shape, readout, rewind and pace, fed with numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from hypergrad import (
    Best,
    ConfigurationError,
    Controller,
    Cosine,
    Descent,
    Frozen,
    Linear,
    Race,
    Reading,
    Readout,
    Rewind,
    best_arms,
    boldest_arms,
)


def reading(name: str, slope: float) -> Reading:
    return Reading(name, slope=slope, cosine=None, name=name)


@pytest.mark.parametrize("steps", [385, 1000, 1001, 54_321])
def test_rungs_are_shares_of_the_run(steps: int) -> None:
    ends = Race().ends(steps)
    assert [kept for _, kept in ends] == [3, 1, 1]
    for (end, _), share in zip(ends, (1 / 128, 1 / 64, 1 / 32), strict=True):
        assert share * steps <= end < share * steps + 1


def test_a_run_too_short_for_the_first_rung_has_no_race() -> None:
    assert Race().ends(384) == []
    assert Race(least=3).ends(384) != []


def test_the_cost_is_that_of_the_arms_beside_the_run_itself() -> None:
    race = Race(rates=(1e-3, 1e-2), rungs=((0.1, 2), (0.2, 1), (0.5, 1)), forks=(2.0,))
    # three arms for 10 steps, two for 10, the best and its fork for 30
    assert race.cost(100) == 2 * 10 + 1 * 10 + 1 * 30
    assert race.scores == 1 + 3 + 2 + 2  # and the untrained network


def test_the_users_own_rate_races_and_is_no_arm_twice() -> None:
    assert Race(rates=(1e-3, 1e-2)).arms(0.5) == [0.5, 1e-3, 1e-2]
    assert Race(rates=(1e-3, 1e-2)).arms(0.0095) == [0.0095, 1e-3]


def test_arms_without_a_number_go_on_only_if_all_are() -> None:
    assert best_arms({0: math.nan, 1: 2.0, 2: math.inf, 3: 1.0}, 3) == [3, 1]
    assert best_arms({0: math.nan, 1: math.inf}, 2) == [0]


@pytest.mark.parametrize(
    "settings",
    [
        {"rates": ()},
        {"rates": (1e-3, -1.0)},
        {"rates": (math.nan,)},
        {"rungs": ()},
        {"rungs": ((0.1, 3), (0.05, 1))},
        {"rungs": ((0.1, 1), (0.2, 2))},
        {"rungs": ((0.1, 3), (0.2, 2))},
        {"rungs": ((0.5, 3), (1.0, 1))},
        {"forks": (0.0,)},
        {"least": 0},
    ],
)
def test_what_makes_no_race_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=str(next(iter(settings)))):
        Race(**settings)


def test_cosine_falls_from_one_to_its_floor() -> None:
    factors = [Cosine(0.2).factor(i / 100) for i in range(101)]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(0.2)
    assert factors == sorted(factors, reverse=True)
    assert Cosine().factor(1.5) == pytest.approx(0.0)
    with pytest.raises(ConfigurationError, match="`floor`"):
        Cosine(-0.1)


def test_linear_falls_from_one_to_zero() -> None:
    assert [Linear().factor(p) for p in (-0.1, 0.0, 0.5, 1.0, 1.5)] == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(("checkpoints", "steps"), [(20, 1000), (7, 100), (1, 50), (5, 5)])
def test_checkpoints_are_evenly_spaced_and_end_with_the_run(checkpoints: int, steps: int) -> None:
    due = [s for s in range(1, steps + 1) if Readout(checkpoints=checkpoints).is_due(s, steps)]
    assert len(due) == checkpoints
    assert due[-1] == steps
    gaps = {b - a for a, b in zip([0, *due], due, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_the_average_is_plain_at_first_and_then_has_its_window() -> None:
    readout = Readout(window=0.1)
    assert [readout.weight(n, 300) for n in (1, 2, 30)] == [1.0, 0.5, 1 / 30]
    assert readout.weight(500, 300) == 1 / 30
    assert readout.weight(5, 3) == 1.0  # a window of less than a step


def test_a_window_is_as_long_however_many_steps_lie_between_its_states() -> None:
    readout = Readout(window=0.1)
    for steps in (100, 1000, 12_345):
        stride = readout.stride(steps)
        assert stride / readout.weight(10**6, steps) == pytest.approx(0.1 * steps)
        assert 0.1 * steps / stride >= 10  # states in it


@pytest.mark.parametrize("settings", [{"checkpoints": 0}, {"window": 0.0}, {"window": 1.5}, {"batches": 0}])
def test_what_makes_no_readout_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Readout(**settings)


def test_the_best_is_the_lowest_number() -> None:
    best = Best()
    taken = [best.beaten_by(s, "raw", i) for i, s in enumerate([math.nan, 3.0, math.inf, 2.0, 2.0])]
    assert taken == [False, True, False, True, False]
    assert (best.score, best.step) == (2.0, 3)


def test_what_counts_as_blown_up() -> None:
    rewind = Rewind(limit=2.0)
    assert not rewind.has_blown_up(6.9, first=2.0)
    assert rewind.has_blown_up(7.1, first=2.0)
    assert not rewind.has_blown_up(-5.0, first=-1.0)  # an objective that is to be made large, negated
    assert rewind.has_blown_up(math.nan, first=1.0)
    for settings in ({"limit": 0.5}, {"shrink": 1.0}, {"times": 0}, {"lost": 0.0}, {"patience": 0.0}, {"anew": -0.1}):
        with pytest.raises(ConfigurationError):
            Rewind(**settings)


def test_what_counts_as_relapsed() -> None:
    rewind = Rewind(lost=0.5)
    assert not rewind.has_relapsed(1.4, first=2.0, best=1.0)
    assert rewind.has_relapsed(1.6, first=2.0, best=1.0)
    assert rewind.has_relapsed(math.nan, first=2.0, best=1.0)
    assert not rewind.has_relapsed(2.03, first=2.0, best=2.0)  # nothing gained, and hardly anything lost
    assert rewind.has_relapsed(2.05, first=2.0, best=2.0)
    assert not rewind.has_relapsed(-4.6, first=-3.0, best=-6.0)  # to be made large, negated
    assert rewind.has_relapsed(-4.4, first=-3.0, best=-6.0)
    for first, best in ((math.nan, 1.0), (2.0, math.nan), (2.0, math.inf)):
        assert not rewind.has_relapsed(9.0, first=first, best=best)
    assert not Rewind(lost=math.inf).has_relapsed(9.0, first=2.0, best=1.0)


def test_while_nobody_has_learned_the_boldest_go_on() -> None:
    rates = [1e-3, 1e-5, 1e-1, 1.0, 1e-2]
    still = {0: 2.301, 1: 2.300, 2: 2.305, 3: 2.331, 4: 2.299}
    assert boldest_arms(still, rates, 3, 2.3) == [2, 4, 0]  # that at 1.0 has done harm
    assert boldest_arms({**still, 0: 2.2}, rates, 3, 2.3) == [0, 4, 1]
    assert boldest_arms(still, rates, 3, math.nan) == [4, 1, 0]  # as always where that is not known
    assert boldest_arms({0: math.nan, 2: 2.4, 3: 2.5}, rates, 2, 2.3) == [2, 3]  # all harmed: the least


@pytest.mark.parametrize(("updates", "largest"), [(None, 0.5), (10, 0.5), (100, 0.2), (1000, 0.02)])
def test_descent_paces_itself_by_the_length_of_the_run(updates: int | None, largest: float) -> None:
    descent = Descent(rate=0.5, travel=20.0)
    descent.begin(updates)
    moves = [descent.moves([reading("weight_decay", -1.0)])[0] for _ in range(5)]
    assert moves == pytest.approx([largest] * 5)
    with pytest.raises(ConfigurationError, match="`travel`"):
        Descent(travel=0.0)


def test_a_pace_slows_some_hyperparameters_only() -> None:
    descent = Descent(rate=0.5, pace={"weight_decay": 0.2})
    moves = descent.moves([reading("weight_decay", -1.0), reading("l2", -1.0)])
    assert moves == pytest.approx([0.1, 0.5])
    for factor in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigurationError, match="`pace`"):
            Descent(pace={"lr": factor})


def test_frozen_holds_some_and_hands_on_the_others() -> None:
    class Push(Controller):
        seen: Sequence[Reading] = ()
        updates: int | None = None

        def begin(self, updates: int | None) -> None:
            self.updates = updates

        def moves(self, readings: Sequence[Reading]) -> list[float]:
            self.seen = readings
            return [0.1 * (i + 1) for i in range(len(readings))]

        def state_dict(self) -> dict[str, Any]:
            return {"updates": self.updates}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.updates = state["updates"]

    push = Push()
    frozen = Frozen(push, ("lr",))
    frozen.begin(7)
    assert frozen.moves([reading("weight_decay", 1.0), reading("lr", 1.0), reading("l2", 1.0)]) == [0.1, 0.0, 0.2]
    assert [r.name for r in push.seen] == ["weight_decay", "l2"]
    again = Frozen(Push())
    again.load_state_dict(frozen.state_dict())
    assert again.state_dict() == {"controller": {"updates": 7}}
    with pytest.raises(ConfigurationError, match="Controller"):
        Frozen(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"such as \('lr',\)"):
        Frozen(push, "lr")
    # The same in every process: a checkpoint compares it.
    assert repr(Frozen(push, ("lr", "betas[0]"))).endswith(", names=('lr', 'betas[0]'))")
