"""The same studies on a Ray that is really started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypergrad import ConfigurationError
from hypergrad.search import Float, Ray, Study, Trial
from tests.search.objectives import attempts_before, curve, die, fit, square

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SPACE = {"x": Float(-2.0, 2.0), "lr": Float(1e-3, 1e-1, log=True)}


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    import os
    import sys

    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    environment = {"env_vars": {"PYTHONPATH": path}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


def test_the_place_makes_no_difference(tmp_path: Path) -> None:
    there = Study(tmp_path / "ray", space=SPACE, seed=1).run(curve, 4, workers=2, execution="ray")
    here = Study(tmp_path / "local", space=SPACE, seed=1).run(curve, 4)
    assert [(r.params, r.value, r.curve, r.state) for r in there] == [
        (r.params, r.value, r.curve, r.state) for r in here
    ]
    assert ray.is_initialized()  # it was there before


def test_a_real_fit_with_pruning(tmp_path: Path) -> None:
    pruner = ("threshold", {"upper": 0.0})
    (record,) = Study(tmp_path / "s", space=SPACE, pruner=pruner).run(fit, 1, execution=Ray(1))
    assert (record.state, list(record.curve)) == ("pruned", [1])
    assert (record.folder / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("how", ["kill", "exception"])
def test_a_task_that_dies_is_continued(tmp_path: Path, how: str) -> None:
    def train(trial: Trial) -> float:
        if attempts_before(trial) == 0 and trial.number == 0:
            die(how)
        return square(trial)

    records = Study(tmp_path / "s", space=SPACE).run(train, 2, workers=2, retries=1, execution="ray")
    assert [(r.state, r.attempts) for r in records] == [("complete", 2), ("complete", 1)]
    expected = {"kill": "its Ray worker died", "exception": "ValueError: as asked for"}
    assert expected[how] in records[0].failures[0]


def test_a_hang_is_cancelled(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        if trial.attempt == 1:
            die("hang")
        return 1.0

    (record,) = Study(tmp_path / "s", space=SPACE).run(train, 1, retries=1, trial_timeout=2.0, execution="ray")
    assert (record.state, record.failures) == ("complete", ("no end within trial_timeout=2 s",))


def test_neither_the_queue_nor_the_start_of_a_task_is_charged_to_a_trial(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        time.sleep(1.5)
        return 1.0

    place = Ray(3, cpus_per_trial=2)  # one at a time
    records = Study(tmp_path / "s", space=SPACE).run(train, 3, trial_timeout=2.5, execution=place)
    assert [(r.state, r.attempts) for r in records] == [("complete", 1)] * 3
    assert max(r.duration for r in records) > 4.5


@pytest.mark.parametrize("settings", [{"workers": 0}, {"cpus_per_trial": -1}, {"gpus_per_trial": "all"}])
def test_mistakes(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="must be"):
        Ray(**settings)
