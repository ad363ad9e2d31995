"""The search space: domains, conditions, constraints, the grid, storage as JSON, and every mistake's message."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from hypergrad.search import Categorical, Constant, Float, Int, Space, SpaceError

FULL = {
    "model": Categorical(["mlp", "linear"]),
    "width": Int(16, 64, step=16, when={"model": "mlp"}),
    "lr": Float(1e-4, 1e-1, log=True),
    "momentum": Float(0.0, 0.9, step=0.3, when={"model": ["mlp", "linear"], "nesterov": True}),
    "nesterov": Categorical([True, False]),
    "epochs": 20,
    "note": None,
}


def test_what_depends_comes_after_what_it_depends_on() -> None:
    names = list(Space(FULL))
    assert sorted(names) == sorted(FULL)
    assert names.index("nesterov") < names.index("momentum")
    assert names.index("model") < names.index("width")


def test_a_space_survives_json() -> None:
    space = Space(FULL, ["width <= 48 or lr < 0.01"])
    again = Space.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert hash(again) == hash(space)
    assert not space.differences(again)
    assert isinstance(again["epochs"], Constant)


def test_differences_name_what_differs() -> None:
    changed = {**FULL, "lr": Float(1e-4, 1.0, log=True), "new": Int(1, 2)}
    del changed["note"]
    found = "; ".join(Space(FULL).differences(Space(changed, ["new > 1"])))
    for part in (
        "new is new",
        "note is gone",
        "lr: real in [0.0001, 0.1]",
        "became real in [0.0001, 1]",
        "constraints",
    ):
        assert part in found
    assert Space({"a": Categorical([1, 2])}) != Space({"a": Categorical([1.0, 2.0])})


def test_printing_shows_domain_scale_steps_and_conditions() -> None:
    text = str(Space(FULL, ["width <= 48"]))
    assert "width     integer in [16, 64] in steps of 16, when model is 'mlp'" in text
    assert "lr        real in [0.0001, 0.1] on a log scale" in text
    assert "when model is 'mlp' or 'linear' and nesterov is True" in text
    assert "epochs    always 20" in text
    assert text.endswith("such that width <= 48")
    assert "constraints=['width <= 48']" in repr(Space(FULL, ["width <= 48"]))


def test_the_grid_has_every_feasible_point_once_and_nothing_inactive() -> None:
    space = Space({k: v for k, v in FULL.items() if k != "lr"}, ["width != 32"])
    points = list(space.grid())
    # 3 widths or the linear model, times nesterov with 4 momenta or without.
    assert len(points) == (3 + 1) * (4 + 1)
    assert len({json.dumps(p, sort_keys=True) for p in points}) == len(points)
    for point in points:
        assert ("width" in point) == (point["model"] == "mlp")
        assert ("momentum" in point) == point["nesterov"]
        assert point["epochs"] == 20
        assert space.check(point) == point
    assert [p["momentum"] for p in points if p["model"] == "linear" and p["nesterov"]] == pytest.approx(
        [0, 0.3, 0.6, 0.9]
    )


def test_an_infinite_grid_says_what_is_continuous() -> None:
    with pytest.raises(SpaceError, match=r"\['lr'\] is infinite.*give each a `step`"):
        Space(FULL).grid()


def test_check_fills_in_constants_and_refuses_what_is_not_in_the_space() -> None:
    space = Space(FULL, ["width <= 48"])
    point = {"model": "mlp", "width": 32, "lr": 0.01, "nesterov": False}
    assert space.check(point) == {**point, "epochs": 20, "note": None}
    for wrong, message in (
        ({**point, "depth": 3}, "not in the space"),
        ({**point, "width": 33}, "outside its domain"),
        ({**point, "width": 64}, "violates"),
        ({**point, "momentum": 0.3}, "not active"),
        ({k: v for k, v in point.items() if k != "lr"}, "'lr' is missing"),
        ({**point, "nesterov": 1}, "outside its domain"),
        ({**point, "lr": math.nan}, "outside its domain"),
        ({**point, "epochs": 10}, "outside its domain"),
    ):
        with pytest.raises(SpaceError, match=message):
            space.check(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(1.0, 1.0), "`low` must be less than `high`, but got low=1.0, high=1.0"),
        (lambda: Float(0.0, 1.0, log=True), "log scale needs positive bounds"),
        (lambda: Float(0.0, math.inf), "finite numbers"),
        (lambda: Float("0", 1.0), "finite numbers"),
        (lambda: Float(0.0, True), "finite numbers"),
        (lambda: Float(0.0, 1.0, step=0.3), "divide high - low"),
        (lambda: Float(0.0, 1.0, step=-0.5), "must be positive"),
        (lambda: Float(0.1, 1.0, log=True, step=0.1), "log=True"),
        (lambda: Float(0.1, 1.0, log=1), "`log` must be"),
        (lambda: Int(1, 2.0), "integers"),
        (lambda: Int(1, 4, step=2), "divides high - low"),
        (lambda: Int(1, 8, step=7, log=True), "1 with log=True"),
        (lambda: Categorical("abc"), "list of at least two"),
        (lambda: Categorical(["a"]), "at least two"),
        (lambda: Categorical([1, True]), "differ from each other"),
        (lambda: Categorical([int, float]), "search their names"),
        (lambda: Categorical([1.0, math.nan]), "finite numbers"),
        (lambda: Float(0.0, 1.0, when="sgd"), "`when` must map"),
        (lambda: Float(0.0, 1.0, when={"optimizer": []}), "`when` must map"),
        (lambda: Space({}), "non-empty mapping"),
        (lambda: Space([Float(0.0, 1.0)]), "non-empty mapping"),
        (lambda: Space({"learning rate": Float(0.0, 1.0)}), "Python identifier"),
        (lambda: Space({"lr": [0.1, 0.2]}), "is no parameter: use Float"),
        (lambda: Space({"a": Float(0.0, 1.0, when={"b": 1})}), "not in the space"),
        (lambda: Space({"b": Int(2, 3), "a": Float(0.0, 1.0, when={"b": 1})}), "which it never is"),
        (lambda: Space({"a": Int(1, 2, when={"b": 1}), "b": Int(1, 2, when={"a": 1})}), "go in a circle"),
        (lambda: Space({"a": Int(1, 2)}, "a > 1"), "sequence of expressions"),
        (lambda: Space({"a": Int(1, 2)}, ["a >"]), "no Python expression"),
        (lambda: Space({"a": Int(1, 2)}, ["1 > 2"]), "names no parameter"),
        (lambda: Space({"a": Int(1, 2)}, ["a > b"]), r"names \['b'\]"),
        (lambda: Space({"a": Int(1, 2)}, ["a.real > 1"]), "contains 'a.real'"),
        (lambda: Space({"a": Int(1, 2)}, ["(lambda: a)() > 1"]), "only names, constants"),
    ],
)
def test_mistakes_are_told_at_construction(make: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make()


def test_a_constraint_on_an_inactive_parameter_does_not_apply() -> None:
    space = Space(FULL, ["width * lr <= 1"])
    assert space.is_feasible({"lr": 0.1})
    assert not space.is_feasible({"lr": 0.1, "width": 16})


def test_a_constraint_that_cannot_be_evaluated_says_where() -> None:
    space = Space({"a": Categorical(["x", 1]), "b": Int(0, 2)}, ["a < 2", "1 / b < 2"])
    with pytest.raises(SpaceError, match=r"'a < 2' cannot be evaluated at \{'a': 'x'\}"):
        space.is_feasible({"a": "x", "b": 1})
    with pytest.raises(SpaceError, match="division"):
        space.is_feasible({"a": 1, "b": 0})
