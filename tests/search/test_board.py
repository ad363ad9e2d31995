"""What TensorBoard itself says of a study, through its own HTTP endpoint."""

from __future__ import annotations

import json
import logging
import math
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard import program
from torch.utils.data import TensorDataset

from hypergrad.search import Categorical, Float, Int, Study, Trial, cross_validate
from hypergrad.search.board import Board, _append
from tests.callbacks.modules import Net, data
from tests.search.objectives import die

SPACE = {
    "lr": Float(1e-3, 1e-1, log=True),
    "width": Int(8, 16),
    "flag": Categorical([True, False]),
    "kind": Categorical(["a", "b"]),
    "slope": Float(0.5, 0.9, when={"kind": "b"}),
    "mode": Categorical(["fast", "slow"], when={"kind": "b"}),
    "maybe": Categorical([None, 1]),
    "epochs": 3,
}


class Saves(Net):
    """Saves its hyperparameters, as many modules do: Lightning then logs them."""

    def __init__(self, lr: float, width: int) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()


def _train(trial: Trial) -> Any:
    if trial.number == 1:
        trial.report(0.5, 1)
        die("kill")
    if trial.number == 2:
        trial.report(3.0, 1)
        trial.report(math.nan, 2)
        return 0.0
    if trial.number == 3:
        values = iter((0.25, 0.75))
        dataset = TensorDataset(torch.zeros(4, 1))
        return cross_validate(lambda *_: {"val_loss": next(values), "folded": 7.0}, dataset, 2).metrics
    trainer = trial.trainer(max_epochs=3, accelerator="cpu", log_every_n_steps=1)
    trainer.fit(Saves(trial.params["lr"], trial.params["width"]), data(), data(seed=1))
    return {**trainer.callback_metrics, "returned": 5.0}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = Study(tmp_path_factory.mktemp("board") / "s", space=SPACE, seed=1)
    made.run(_train, 6, workers=2)
    return made


@pytest.fixture(scope="module")
def tensorboard(study: Study) -> str:
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(study.folder), "--port", "0", "--load_fast=false"])
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    return str(server.launch())


def _post(url: str, path: str, **request: Any) -> Any:
    body = json.dumps({"experimentName": "", **request}).encode()
    asked = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.loads(answer.read())


def _groups(url: str) -> dict[str, Any]:
    import time

    statuses = ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"]
    for _ in range(100):  # it loads in the background
        options = {"allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 100}
        groups = _post(url, "data/plugin/hparams/session_groups", **options).get("sessionGroups", [])
        if len(groups) == 6 and all(s.get("endTimeSecs") for g in groups for s in g["sessions"]):
            break
        time.sleep(0.1)
    return {group["name"]: group for group in groups}


def _metric(group: Any, tag: str) -> float:
    return next(m["value"] for m in group["metricValues"] if m["name"]["tag"] == tag)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_tensorboard_shows_every_trial_as_it_is(study: Study, tensorboard: str) -> None:
    groups = _groups(tensorboard)
    assert sorted(groups) == [f"trial-{i:04}" for i in range(6)]
    records = study.trials
    assert [r.state for r in records] == ["complete", "failed", "pruned", "complete", "complete", "complete"], records
    for record in records:
        group = groups[record.folder.name]
        (session,) = (s for s in group["sessions"] if s["name"] == record.folder.name)
        assert session["status"] == ("STATUS_FAILURE" if record.state == "failed" else "STATUS_SUCCESS")
        shown = group["hparams"]
        # A trial without a value in some column would be missing from parallel coordinates.
        assert set(shown) == set(SPACE) - {"epochs"}
        assert shown["lr"] == pytest.approx(record.params["lr"])
        assert (shown["width"], shown["flag"]) == (record.params["width"], record.params["flag"])
        assert shown["maybe"] == str(record.params["maybe"])
        assert shown["slope"] == pytest.approx(record.params.get("slope", 0.5))
        assert shown["mode"] == record.params.get("mode", "(inactive)")
        assert _metric(group, "pruned") == (record.state == "pruned")
        if record.state == "complete":
            assert _metric(group, "objective") == pytest.approx(record.value)
    assert {r.params["kind"] for r in records} == {"a", "b"}
    assert _metric(groups["trial-0002"], "objective") == 3.0  # the best before it was pruned
    assert _metric(groups["trial-0004"], "returned") == 5.0
    assert _metric(groups["trial-0004"], "train_loss") == pytest.approx(records[4].metrics["train_loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_folds_are_sessions_of_their_trial(study: Study, tensorboard: str) -> None:
    group = _groups(tensorboard)["trial-0003"]
    names = sorted(session["name"] for session in group["sessions"])
    assert names == ["trial-0003", "trial-0003/fold-0", "trial-0003/fold-1"]
    by_name = {s["name"]: s for s in group["sessions"]}
    assert _metric(by_name["trial-0003/fold-1"], "objective") == 0.75
    assert _metric(group, "objective") == 0.5


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_experiment_has_the_whole_space_and_all_metrics(tensorboard: str) -> None:
    experiment = _post(tensorboard, "data/plugin/hparams/experiment")
    infos = {info["name"]: info for info in experiment["hparamInfos"]}
    assert set(infos) == set(SPACE) - {"epochs"}
    assert infos["lr"]["domainInterval"] == {"minValue": 0.001, "maxValue": 0.1}
    assert infos["mode"]["domainDiscrete"] == ["fast", "slow", "(inactive)"]
    assert "when kind is 'b'; where it is not active, the low bound is shown" in infos["slope"]["description"]
    tags = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert tags[:2] == ["objective", "pruned"]
    # Those that some trials lack come last, where TensorBoard does not select them by itself.
    assert tags.index("duration") < min(tags.index(tag) for tag in ("train_loss", "returned", "folded"))
    assert {"val_loss", "train_loss", "returned", "folded", "val_loss_std", "duration"} <= set(tags)


def test_a_folder_that_cannot_be_written_costs_the_picture_only(
    study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board = Board(tmp_path / "gone", study.spec)
    board.open([])
    board.started(study.trials[0])
    assert sum("TensorBoard files cannot be written" in r.message for r in caplog.records) == 1


def test_the_files_of_a_trial_sort_as_they_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a second, too: TensorBoard would otherwise take the first report for the result."""
    monkeypatch.setattr("time.time", lambda: 1e9)
    made = [_append(tmp_path, "end", [], fresh=True) for _ in range(120)]
    assert made == sorted(made, key=lambda path: path.name)
    assert len(set(made)) == 120
