"""Every sampler and pruner by name: in the space, by the seed, whatever the number of workers, and doing its job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from hypergrad import ConfigurationError
from hypergrad.search import (
    PBT,
    Categorical,
    Float,
    Grid,
    Int,
    Refine,
    Space,
    SpaceError,
    Study,
    Trial,
    TrialRecord,
)
from hypergrad.search.storage import Storage
from tests.search.objectives import curve

MIXED = Space(
    {
        "x": Float(-2.0, 2.0),
        "lr": Float(1e-4, 1.0, log=True),
        "step": Float(0.0, 1.0, step=0.25),
        "n": Int(1, 64, log=True),
        "kind": Categorical(["a", "b"]),
        "momentum": Float(0.0, 0.9, when={"kind": "a"}),
        "epochs": 3,
    },
    ["n <= 32 or x > 0"],
)
NAMES: list[Any] = [
    "random",
    "qmc",
    "tpe",
    pytest.param("gp", marks=pytest.mark.slow),
    "cmaes",
    "genetic",
    ("refine", {"per_round": 4}),
    optuna.samplers.TPESampler,
]


def told(study: Study, value: Callable[[dict[str, Any]], Any], trials: int) -> list[TrialRecord]:
    """Ask and tell without processes, as the driver does."""
    storage, sampler = study._storage, study._sampler.item
    for _ in range(trials):
        if sampler.exhausted(storage):
            break
        number = storage.create()
        proposal = sampler.propose(storage, number)
        storage.set_params(number, proposal.params)
        result = value(dict(proposal.params))
        storage.finish(number, "failed" if result is None else "complete", None if result is None else [result])
    return study.trials


def bowl(params: dict[str, Any]) -> float:
    return float((params["x"] - 1) ** 2 + (params["n"] / 64) ** 2)


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_points_are_in_the_space_and_continue_after_reopening(tmp_path: Path, name: Any) -> None:
    # The object carries its own state, which a new process does not have: only its points are checked.
    sampler: Any = name(seed=0) if isinstance(name, type) else name
    whole = told(Study(tmp_path / "one", space=MIXED, sampler=sampler, seed=4), bowl, 14)
    assert len(whole) == 14
    for record in whole:
        assert MIXED.check(record.params) == record.params
    assert len({json.dumps(r.params, sort_keys=True) for r in whole}) >= 13
    if isinstance(name, type):
        return
    told(Study(tmp_path / "two", space=MIXED, sampler=sampler, seed=4), bowl, 7)
    parts = told(Study(tmp_path / "two"), bowl, 7)
    assert [r.params for r in parts] == [r.params for r in whole]
    other = told(Study(tmp_path / "three", space=MIXED, sampler=sampler, seed=5), bowl, 2)
    assert other[0].params != whole[0].params


@pytest.mark.parametrize(
    "name", ["tpe", "refine", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gp", "cmaes", "genetic"))]
)
def test_samplers_that_learn_end_nearer_to_the_optimum_than_chance(tmp_path: Path, name: str) -> None:
    space = {"x": Float(-2.0, 2.0), "y": Float(-2.0, 2.0)}
    options: dict[str, Any] = {"genetic": {"population_size": 10}}
    sampler = (name, options[name]) if name in options else name

    def far(params: dict[str, Any]) -> float:
        return float((params["x"] - 1.1) ** 2 + (params["y"] + 0.7) ** 2)

    records = told(Study(tmp_path / "s", space=space, sampler=sampler), far, 40)
    late = sorted(r.value for r in records[-10:])[5]
    chance = sorted(r.value for r in told(Study(tmp_path / "r", space=space), far, 40))[20]
    assert late < 0.5 * chance


def test_quasi_random_points_fill_the_space_more_evenly(tmp_path: Path) -> None:
    space = {"x": Float(0.0, 1.0), "y": Float(0.0, 1.0)}

    def cells(sampler: str) -> int:
        records = told(Study(tmp_path / sampler, space=space, sampler=sampler), lambda _: 0.0, 64)
        return len({(int(8 * r.params["x"]), int(8 * r.params["y"])) for r in records})

    assert cells("qmc") == 64  # one point in each of 8 x 8 cells: what makes a Sobol sequence
    assert cells("random") < 50


def test_refine_shrinks_around_the_best_and_reopens_for_constraints(tmp_path: Path) -> None:
    space = {"x": Float(1e-4, 1.0, log=True), "k": Categorical(["a", "b", "c"])}
    study = Study(tmp_path / "s", space=space, sampler=Refine(per_round=5, shrink=0.25))
    assert study.spec.sampler == 'refine {"per_round": 5, "shrink": 0.25}'
    records = told(study, lambda p: p["x"], 15)
    for start, width in ((5, 0.25), (10, 0.0625)):
        best = min(records[:start], key=lambda r: r.value)
        ratio = max(r.params["x"] for r in records[start : start + 5]) / min(
            r.params["x"] for r in records[start : start + 5]
        )
        assert ratio <= (1e4**width) * (1 + 1e-9)
        assert sum(r.params["k"] == best.params["k"] for r in records[start : start + 5]) >= 3
    # The best so far is at the edge of what is allowed, and the box around it has hardly a feasible point.
    tight = Space({"a": Int(1, 100), "b": Int(1, 100)}, ["a + b == 101"])
    records = told(Study(tmp_path / "t", space=tight, sampler=Refine(per_round=1)), lambda p: p["a"], 8)
    assert all(r.params["a"] + r.params["b"] == 101 for r in records)


def test_an_impossible_constraint_is_found_out_before_any_trial_is_spent(tmp_path: Path) -> None:
    space = Space({"a": Float(0.0, 1.0)}, ["a > 2"])
    with pytest.raises(SpaceError, match="No point of the space satisfies"):
        Study(tmp_path / "s", space=space)
    with pytest.raises(SpaceError, match="No point of the grid satisfies"):
        Study(tmp_path / "s", space=Space({"a": Int(0, 1)}, ["a > 2"]), sampler="grid")


def test_the_grid_visits_every_point_once_also_those_that_fail(tmp_path: Path) -> None:
    space = Space({"a": Int(1, 3), "b": Categorical(["x", "y"]), "c": Int(0, 1, when={"b": "y"})}, ["a != 2"])
    study = Study(tmp_path / "s", space=space, sampler="grid")
    study.enqueue(a=3, b="x")  # a grid point that the grid need not visit
    assert study._storage.numbers("waiting") == [0]

    def fails_at_one(params: dict[str, Any]) -> float | None:
        return None if params["a"] == 1 else 1.0

    told(study, fails_at_one, 2)
    records = told(Study(tmp_path / "s"), fails_at_one, 10)
    points = [json.dumps(r.params, sort_keys=True) for r in records if r.params]
    assert sorted(points) == sorted({json.dumps(p, sort_keys=True) for p in space.grid()})
    assert [r.state for r in records if r.params and r.params["a"] == 1] == ["failed"] * 3
    assert isinstance(study._sampler.item, Grid)


def test_a_grid_runs_without_a_number_of_trials(tmp_path: Path) -> None:
    study = Study(tmp_path / "s", space={"x": Float(0.0, 1.0, step=0.5)}, sampler="grid")
    records = study.run(curve, workers=2)
    assert [r.params["x"] for r in records] == [0.0, 0.5, 1.0]
    assert study.best.params == {"x": 1.0}


@pytest.mark.parametrize(
    ("pruner", "stopped"),
    [
        ("none", set()),
        (("median", {"n_startup_trials": 2}), {2, 3, 4}),
        (("asha", {"reduction_factor": 2}), {1, 2, 3, 4}),
        (("hyperband", {"max_resource": 8}), None),
        (("patience", {"patience": 1}), {3}),
        (("threshold", {"upper": 3.5}), {4}),
        (optuna.pruners.ThresholdPruner(upper=2.5), {3, 4}),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, optuna.pruners.BasePruner) else str(v),
)
def test_pruners(tmp_path: Path, pruner: Any, stopped: set[int] | None) -> None:
    def train(trial: Trial) -> float:
        for step in range(1, 5):
            worse = step * 0.1 if trial.number == 3 else -step * 0.1
            if not trial.report(trial.number + worse, step):
                return -100.0  # does not count
        return float(trial.number)

    records = Study(tmp_path / "s", space={"x": Float(0.0, 1.0)}, pruner=pruner).run(train, 5)
    found = {r.number for r in records if r.state == "pruned"}
    assert stopped is None or found == stopped
    for record in records:
        assert record.state in ("complete", "pruned")
        assert record.value == (record.number if record.state == "complete" else record.curve[max(record.curve)])
        if stopped is None and record.state == "pruned":
            assert "hyperband" in str(record.reason)


def _member(trial: Trial, steps: int = 6) -> float:
    """A training whose state is a number that grows by the learning rate's quality; the checkpoint is a file."""
    import torch

    path = trial.folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(exist_ok=True)
    state = torch.load(path) if trial.checkpoint else {"step": 0, "skill": 0.0, "by": []}
    while state["step"] < steps:
        state["step"] += 1
        state["skill"] += 1.0 - abs(trial.params["lr"] - 0.7)
        state["by"].append(trial.number)
        torch.save(state, path)
        if not trial.report(-state["skill"], state["step"]):
            return 0.0
    (trial.folder / "history.json").write_text(json.dumps(state["by"]))
    return -float(state["skill"])


def test_population_based_training(tmp_path: Path) -> None:
    sampler = PBT(population=4, interval=2, steps=6, resample=0.0)
    space = {"lr": Float(0.0, 1.0), "kind": Categorical(["a", "b"])}
    one = Study(tmp_path / "one", space=space, sampler=sampler, seed=1).run(_member)
    # Two rankings, each replaces one of four.
    assert [r.state for r in one].count("pruned") == 2
    assert [r.state for r in one].count("complete") == 4
    assert len(one) == 6
    for child in one[4:]:
        stored = Storage(tmp_path / "one")
        attributes = stored.attributes(child.number)
        parent, lost = one[attributes["parent"]], one[attributes["replaces"]]
        step = 2 * attributes["level"]
        alive = [r for r in one[: child.number] if step in r.curve]
        assert lost.curve[step] == max(r.curve[step] for r in alive)
        assert parent.curve[step] == min(r.curve[step] for r in alive)
        assert f"PBT replaced it at step {step}" in str(lost.reason)
        assert child.params["lr"] != parent.params["lr"]
        assert child.params["kind"] == parent.params["kind"]
        if child.state == "complete":
            history = json.loads((child.folder / "history.json").read_text())
            if parent.number < 4:
                assert history[:step] == [parent.number] * step
            assert history[step:] == [child.number] * (6 - step)
            assert min(child.curve) == step + 1
    # Neither workers nor an interruption change anything.
    Study(tmp_path / "two", space=space, sampler=sampler, seed=1).run(_member, 6, workers=2, timeout=1.0)
    two = Study(tmp_path / "two").run(_member, 6, workers=2)
    assert [(r.params, r.state, r.value) for r in two] == [(r.params, r.state, r.value) for r in one]


@pytest.mark.slow
def test_population_based_training_beats_the_same_population_left_alone(tmp_path: Path) -> None:
    space = {"lr": Float(0.0, 1.0)}
    alone = Study(tmp_path / "alone", space=space, seed=2).run(_member, 4)
    evolved = Study(tmp_path / "pbt", space=space, sampler=PBT(4, interval=1, steps=6), seed=2).run(_member)
    assert [r.params for r in evolved[:4]] == [r.params for r in alone]
    assert sorted(r.value for r in evolved if r.state == "complete")[-1] < sorted(r.value for r in alone)[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 1}, "`population` must be"),
        ({"interval": 0}, "`interval` must be"),
        ({"steps": 0}, "`steps` must be"),
        ({"fraction": 0.6}, "`fraction` must lie"),
        ({"factor": 1.0}, "`factor` must be"),
        ({"resample": 2.0}, "`resample` must lie"),
    ],
)
def test_pbt_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PBT(**settings)


def test_pbt_and_a_pruner_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="leave out pruner='asha'"):
        Study(tmp_path / "s", space={"x": Float(0.0, 1.0)}, sampler="pbt", pruner="asha")


def test_the_copied_weights_go_on_with_the_new_hyperparameters(tmp_path: Path) -> None:
    def train(trial: Trial) -> Any:
        import torch

        from tests.callbacks.modules import Net, data

        class Scheduled(Net):
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=trial.params["lr"], momentum=trial.params["momentum"])
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

        trainer = trial.trainer(max_epochs=4, accelerator="cpu", num_sanity_val_steps=0)
        trainer.fit(Scheduled(), data(), data(seed=1), ckpt_path=trial.checkpoint)
        group = trainer.optimizers[0].param_groups[0]
        trial.record(final_lr=group["lr"], final_momentum=group["momentum"])
        return trainer.callback_metrics["val_loss"]

    space = {"lr": Float(1e-3, 1e-1, log=True), "momentum": Float(0.1, 0.9)}
    records = Study(tmp_path / "s", space=space, sampler=PBT(2, interval=2, steps=4)).run(train)
    assert [r.state for r in records].count("complete") == 2, records
    for record in records:
        if record.state == "complete":
            # The schedule went on: halved after each of four epochs, from the trial's own rate.
            assert record.metrics["final_lr"] == pytest.approx(record.params["lr"] * 0.5**4)
            assert record.metrics["final_momentum"] == pytest.approx(record.params["momentum"])
    assert len(records) == 3
    assert records[2].state == "complete"
