"""What the report says of given facts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hypergrad import Best
from hypergrad.callbacks._history import Update
from hypergrad.callbacks._report import Facts, correlation, report, sureness


def updates(signs: list[float], snr: float) -> list[Update]:
    return [
        Update(10 * i, 1.0, {"weight_decay": 0.1}, {"weight_decay": s}, signal_to_noise={"weight_decay": snr})
        for i, s in enumerate(signs)
    ]


FACTS = Facts(
    first={"lr": 1e-6, "weight_decay": 0.01},
    last={"lr": 0.01, "weight_decay": 0.2},
    history=updates([-1.0] * 10, 0.8),
    race={"lr": 0.01, "scores": [{1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}]},
    readings=[(100 * i, 1.0 / i, 1.1 / i) for i in range(1, 8)],
    predicted=[0.0, *(1.0 / (i + 1) - 1.0 / i for i in range(1, 7))],
    monitored=[],
    ended_with=Best(0.14, "averaged", 700),
    rewound=[],
    cost=1.24,
    steps=700,
)


def test_a_run_that_went_well_has_no_advice() -> None:
    text = report(FACTS)
    assert "lr 0.01 won the race" in text
    assert "weight_decay: 0.01 -> 0.2 (signal to noise 0.80; 100% of" in text
    assert "foretold by hypergradients and realised: correlation 1.00" in text
    assert "the averaged weights of step 700" in text
    assert "1.24 times" in text
    assert "=>" not in text


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"race": {"lr": 0.1, "scores": [{1e-3: 2.0, 1e-1: 1.0}]}}, "wider range"),
        (
            {
                "readings": [],
                "race": None,
                "history": [replace(u, val_loss=1.0 + u.step) for u in updates([1.0] * 20, 1.0)],
            },
            "no better than at first: a run of at least",
        ),
        ({"ended_with": Best(0.1, "raw", 200)}, "the best weights came at 200 of 700 steps: the run overfits"),
        ({"readings": [(100, 1.0, 1.1), (700, 1.99, 1.9)]}, "in the end the network was no better than an untrained"),
        ({"history": updates([1.0, -1.0] * 5, 0.01)}, "weight_decay hardly matters here"),
        ({"rewound": [(300, 200)]}, "the run went wrong on its way"),
    ],
)
def test_advice_follows_from_the_facts(change: dict[str, object], advice: str) -> None:
    assert advice in report(replace(FACTS, **change))  # type: ignore[arg-type]


def test_the_gap_between_what_is_tuned_on_and_what_is_not_is_told() -> None:
    monitored = [(100 * i, 1.0 / i + 0.01 * i) for i in range(1, 8)]
    assert "0.015 at first, 0.065 in the end" in report(replace(FACTS, monitored=monitored))


def test_too_few_numbers_say_nothing() -> None:
    assert sureness(updates([1.0] * 4, 1.0), "weight_decay") is None
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert correlation([1.0] * 9, list(map(float, range(9)))) is None
    quiet = report(replace(FACTS, history=[], readings=[], race=None, ended_with=None))
    assert "signal to noise" not in quiet
    assert "correlation" not in quiet


def test_sureness_counts_changes_of_sign() -> None:
    assert sureness(updates([1.0, 1.0, -1.0, -1.0, 1.0], 0.3), "weight_decay") == (0.3, 0.5)


def test_rates_between_those_that_lost_and_forks_are_not_at_the_edge() -> None:
    fork = {"lr": 0.1, "scores": [{1e-3: 2.0, 1e-1: 1.0}, {3e-2: 0.9, 0.1: 0.8, 0.3: 0.85}]}
    assert "wider range" not in report(replace(FACTS, race=fork))
    text = report(replace(FACTS, race={"lr": 0.1, "scores": [{1e-3: 2.0, 1e-1: 1.0, 1.0: float("inf")}]}))
    assert "wider range" not in text
    assert "1: blew up" in text


def test_a_larger_value_that_is_better_is_no_loss() -> None:
    rising = [replace(u, val_loss=1.0 + u.step) for u in updates([1.0] * 20, 1.0)]
    assert "no better" not in report(replace(FACTS, readings=[], race=None, history=rising, sign=-1.0))
