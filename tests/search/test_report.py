"""Reports of studies of every kind: complete, empty, odd."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from hypergrad.search import Categorical, Float, Int, Study, Trial

SPACE = {
    "lr": Float(1e-4, 1.0, log=True),
    "width": Int(1, 9),
    "kind": Categorical(["a", "b"]),
    "momentum": Float(0.0, 1.0, when={"kind": "a"}),
    "epochs": 3,
}


def bowl(trial: Trial) -> float:
    """A smooth objective with a curve, what was learned, a pruned and a failed trial."""
    if trial.number == 3:
        raise RuntimeError("an <odd> & bad day")
    writer = SummaryWriter(str(trial.folder))
    value = math.log10(trial.params["lr"] / 0.01) ** 2 + trial.params["width"] / 10 + trial.params.get("momentum", 0.3)
    for step in range(1, 4):
        writer.add_scalar("hypergradient/lr/value", 0.1 / step, step)
        if not trial.report(value + 1 / step, step):
            break
    writer.close()
    return float(value)


def sections(page: str) -> dict[str, str]:
    parts = re.split(r"<h2>(.*?)</h2>", page)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = Study(tmp_path_factory.mktemp("report") / "study", space=SPACE, pruner="median", seed=1)
    made.run(bowl, 14)
    return made


def test_everything_is_drawn_in_one_file(study: Study, tmp_path: Path) -> None:
    assert {r.state for r in study.trials} == {"complete", "pruned", "failed"}
    path = study.report(tmp_path / "out" / "report.html", png=tmp_path / "png")
    page = path.read_text()
    found = sections(page)
    assert list(found) == [
        "History of val_loss",
        "Learning curves",
        "lr, learned inside the best 10 trials"
        if len(study.front) > 10
        else next(t for t in found if t.startswith("lr, ")),
        "Parallel coordinates of val_loss",
        "Importance for val_loss",
        "Slices",
        "Contours",
        "Trials",
    ]
    for title, body in found.items():
        assert ("Plotly.newPlot" in body) == (title != "Trials"), title
        assert 'class="why"' not in body, title
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', page)  # needs no network
    assert "an &lt;odd&gt; &amp; bad day" in found["Trials"]
    assert found["Trials"].count("<tr>") == 15
    pictures = sorted(p.stem for p in (tmp_path / "png").glob("*.png"))
    assert len(pictures) == 7
    assert all(p.stat().st_size > 5000 for p in (tmp_path / "png").glob("*.png"))


def test_by_default_it_lies_in_the_folder_and_replaces_the_last(study: Study) -> None:
    first = study.report()
    assert first == study.folder / "report.html"
    assert study.report() == first
    assert not list(study.folder.glob("*.tmp"))


def _titles_without_a_figure(page: str) -> set[str]:
    return {title for title, body in sections(page).items() if 'class="why"' in body}


def test_a_study_without_trials_says_so(tmp_path: Path) -> None:
    page = Study(tmp_path / "study", space=SPACE).report(png=tmp_path / "png").read_text()
    assert "no trials yet" in page
    assert len(_titles_without_a_figure(page)) == 7
    assert not list((tmp_path / "png").glob("*.png"))


def _constant(trial: Trial) -> float:
    return 1.0


def _one(trial: Trial) -> float:
    return float(trial.params["x"])


@pytest.mark.parametrize(
    ("space", "train", "trials"),
    [
        ({"x": Float(-1.0, 1.0)}, _one, 1),
        ({"x": Float(-1.0, 1.0), "y": Float(0.0, 1.0)}, _constant, 6),
        ({"x": 2.0}, _one, 5),
        ({"x": Categorical([1, 2, 3])}, _one, 6),
        ({"k": Categorical(["a", "b"]), "x": Float(0.0, 1.0, when={"k": "a"})}, _constant, 8),
    ],
    ids=["one trial", "all alike", "constants", "categories", "conditional"],
)
def test_what_cannot_be_drawn_says_why(space: Any, train: Any, trials: int, tmp_path: Path) -> None:
    study = Study(tmp_path / "study", space=space)
    study.run(train, trials)
    page = study.report(png=tmp_path / "png").read_text()
    for title in _titles_without_a_figure(page):
        why = re.search(r'class="why">(.*?)</p>', sections(page)[title])
        assert why is not None
        assert len(why.group(1)) > 15
        assert why.group(1).endswith(".")
    assert "History of val_loss" not in _titles_without_a_figure(page)


def test_several_objectives_have_a_front_and_a_section_each(tmp_path: Path) -> None:
    def both(trial: Trial) -> tuple[float, float]:
        return trial.params["x"] ** 2, (trial.params["x"] - 1.0) ** 2 + trial.params["y"]

    space = {"x": Float(-1.0, 2.0), "y": Float(0.0, 1.0)}
    study = Study(tmp_path / "study", space=space, monitor=["a", "b"], direction=["minimize", "minimize"])
    study.run(both, 8)
    page = study.report(png=tmp_path / "png").read_text()
    assert {"History of a", "History of b", "Pareto front", "Importance for a", "Importance for b"} <= set(
        sections(page)
    )
    assert _titles_without_a_figure(page) == {"Learning curves", "Learned hyperparameters"}


def test_folders_that_are_gone_cost_what_was_in_them(study: Study, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(study.folder, copy)
    for folder in copy.glob("trial-*"):
        shutil.rmtree(folder)
    page = Study(copy).report().read_text()
    assert _titles_without_a_figure(page) == {"Learned hyperparameters"}


def test_missing_packages_are_named(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"plotly.*hypergrad-lightning\[report\]"):
        study.report()


def test_failed_trials_and_earlier_attempts_are_in_it(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        if trial.number == 1 or trial.attempt == 1:
            raise ValueError(f"attempt {trial.attempt}")
        return float(trial.params["x"])

    study = Study(tmp_path / "study", space={"x": Float(0.0, 1.0), "k": Categorical(["a", "b"])})
    study.run(train, 3, retries=1)
    page = study.report().read_text()
    found = sections(page)
    for number in (0, 1, 2):
        assert f'<a href="trial-{number:04}/error.txt">traceback</a>' in page
    assert 'href="../study/trial-0001/error.txt"' in study.report(tmp_path / "elsewhere" / "r.html").read_text()
    assert "failed, without a value" in found["History of val_loss"]
    assert "earlier attempts: ValueError: attempt 1" in found["Trials"]
    assert "ValueError: attempt 2; earlier attempts: ValueError: attempt 1" in found["Trials"]


def test_a_study_in_which_everything_failed_or_was_not_a_number(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        trial.report(math.nan if trial.number % 2 else 1.0, 1)
        return math.nan

    study = Study(tmp_path / "study", space={"x": Float(0.0, 1.0), "k": Categorical(["a", "b"])})
    assert {r.state for r in study.run(train, 4)} == {"failed", "pruned"}
    page = study.report(png=tmp_path / "png").read_text()
    assert "History of val_loss" in _titles_without_a_figure(page)
    assert "val_loss is nan at step 1" in sections(page)["Trials"]


def test_what_folds_and_continued_attempts_have_learned(tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        for i in range(2):
            with SummaryWriter(str(trial.folder / f"fold-{i}")) as writer:
                for step, value in ((1, 0.5), (2, 0.25)):
                    writer.add_scalar("hypergradient/lr/value", value, step)
        with SummaryWriter(str(trial.folder)) as writer:
            for step, decay in enumerate((0.0, 1e-5, 1e-3)):
                writer.add_scalar("hypergradient/weight_decay/value", decay, step)
                writer.add_scalar("hypergradient/dampening/value", decay - 1e-4, step)
        return float(trial.params["x"])

    study = Study(tmp_path / "study", space={"x": Float(0.0, 1.0)})
    (record,) = study.run(train, 1)
    with SummaryWriter(str(record.folder / "fold-1"), filename_suffix=".later") as writer:
        writer.add_scalar("hypergradient/lr/value", 0.125, 2)
        writer.add_scalar("hypergradient/lr/value", math.nan, 3)
    from hypergrad.search.analysis.charts import learned
    from hypergrad.search.analysis.material import Material

    charts = learned(Material(study.spec, study.trials, study._storage.study))
    # A weight decay starts from 0 where the optimizer has none; what may be negative has no logarithm.
    assert {c.y: c.log_y for c in charts if " in " not in c.y} == {"weight_decay": True, "dampening": False}
    charts = [c for c in charts if " in " in c.y]
    assert [(c.y, list(c.series[0].x), list(c.series[0].y)) for c in charts] == [
        ("lr in fold-0", [1, 2], [0.5, 0.25]),
        ("lr in fold-1", [1, 2], [0.5, 0.125]),
    ]


def test_event_files_that_are_cut_off_cost_their_end_only(study: Study, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(study.folder, copy)
    for i, file in enumerate(sorted(copy.glob("trial-*/events.out.tfevents.*"))):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) - 7] if i % 2 else b"no event file")
    assert "Trials" in sections(Study(copy).report().read_text())


def test_pictures_leave_the_style_of_the_process_alone(study: Study, tmp_path: Path) -> None:
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    before = {key: mpl.rcParams[key] for key in ("axes.facecolor", "axes.prop_cycle", "figure.figsize")}
    study.report(png=tmp_path / "png")
    assert {key: mpl.rcParams[key] for key in before} == before
    assert plt.get_fignums() == []
