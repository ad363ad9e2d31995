"""The command line, as a user types it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler

from hypergrad.cli.command import Command, imported
from hypergrad.cli.main import main
from hypergrad.cli.space_file import read_space
from hypergrad.errors import ConfigurationError
from hypergrad.search import Categorical, Constant, Float, Int, Space, SpaceError, Study

SPACE = """
x: {float: [-2, 2]}
n: {int: [1, 64], log: true}
kind: {categorical: [a, b]}
only: {float: [0, 1], step: 0.25, when: {kind: a}}
fixed: 3
constraints:
  - n * fixed <= 180
"""
MODULE = """
import time
def train(trial):
    time.sleep(trial.params.get("wait", 0.0))
    trial.report(1.0, 1)
    return trial.params["x"] ** 2
def broken(trial):
    raise ValueError("no such data")
number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("mine", None)
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def test_a_space_file_says_all_that_a_space_can(here: Path) -> None:
    assert read_space(here / "space.yaml") == Space(
        {
            "x": Float(-2, 2),
            "n": Int(1, 64, log=True),
            "kind": Categorical(["a", "b"]),
            "only": Float(0, 1, step=0.25, when={"kind": "a"}),
            "fixed": 3,
        },
        ["n * fixed <= 180"],
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x: {float: [1, 0]}", "x: .*`low` must be less"),
        ("x: {float: [0]}", "x: .*low and the high"),
        ("x: {flaot: [0, 1]}", "x: .*exactly one of float"),
        ("x: {float: [0, 1], int: [0, 1]}", "x: .*exactly one"),
        ("x: {float: [0, 1], lgo: true}", "x: .*lgo is unknown"),
        ("x: {categorical: [a]}", "x: .*at least two"),
        ("x: {float: [0, one]}", "x: .*finite numbers"),
        ("x: {float: [0, 1], when: {y: 1}}", "not in the space"),
        ("x: [0]", "x: .*at least two"),
        ("x: {float: [0, 1]}\ny: 1\nx: 2", "x comes twice"),
        ("x: {float: [0, 1]}\n? [1, 2]\n: 3", "no plain value"),
        ("x: {float: [0, 1], when: y}", "x: .*`when` must map"),
        ("x: {categorical: {a: 1}}", "x: .*list of at least two"),
        ("x: {int: [0, 1.5]}", "x: .*integers"),
        ("x: {float: [0, 1]}\nconstraints: x < 1", "constraints: .*list"),
        ("- a", "map names"),
        ("", "map names"),
        ("x: {", "no YAML"),
    ],
)
def test_mistakes_in_a_space_file_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError, match=rf"space.yaml.*{said}"):
        read_space(path)


def test_yaml_has_no_traps(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "lr: {float: [1e-5, 1E+0], log: true}\nstart: 1e-3\nrates: [1e-4, 2e-3]\naugment: [no, light, off]\n"
        "bias: [true, false]\nnesterov: {constant: true, when: {augment: [no, off]}}\nwhat: null\nname: 'é'\n",
        encoding="utf-8",
    )
    assert read_space(path) == Space(
        {
            "lr": Float(1e-5, 1.0, log=True),
            "start": 1e-3,
            "rates": Categorical([1e-4, 2e-3]),
            "augment": Categorical(["no", "light", "off"]),
            "bias": Categorical([True, False]),
            "nesterov": Constant(True, when={"augment": ["no", "off"]}),
            "what": None,
            "name": "é",
        }
    )
    path.write_bytes(b"x: \xff\xfe")
    with pytest.raises(SpaceError, match=r"space\.yaml is no"):
        read_space(path)


def test_the_example_in_the_help_is_a_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    text = capsys.readouterr().out.partition("a space file:\n")[2].partition("options of")[0]
    (tmp_path / "space.yaml").write_text(textwrap.dedent(text))
    space = read_space(tmp_path / "space.yaml")
    assert len(space) == 6
    assert len(space.constraints) == 1


def test_search_list_report_and_resume(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--space", "space.yaml", "--trials", "3", "--folder", "runs/one", "--seed", "4", "--sampler", "qmc"]
    assert main(["search", "mine:train", *options]) == 0
    said = capsys.readouterr()
    assert "3/3 trials" in said.err
    best = Study(here / "runs/one").best
    assert f"best: trial {best.number}, {best.value}" in said.out

    assert main(["list", "runs/one"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == ["trial", "state", "value", "seconds", "attempts", "parameters", "reason"]
    assert [line.split()[1] for line in lines[-3:]] == ["complete"] * 3

    assert main(["resume", "runs/one", "--trials", "5"]) == 0
    assert len(Study(here / "runs/one").trials) == 5
    assert Command.read(here / "runs/one") == Command("mine:train", trials=5)

    assert main(["search", "mine:train", "--space", "space.yaml", "--trials", "1", "--folder", "runs/two"]) == 0
    capsys.readouterr()
    assert main(["list", "runs"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["runs/one", "5/5"],
        ["runs/two", "1/1"],
    ]

    assert main(["report", "runs/one", "--output", "one.html", "--png", "pictures"]) == 0
    assert capsys.readouterr().out.strip() == "one.html"
    assert (here / "pictures" / "history-of-val-loss.png").exists()


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["search", "mine", "--space", "space.yaml"], 2, "package.module:function"),
        (["search", "nowhere:train", "--space", "space.yaml"], 2, "no module 'nowhere'"),
        (["search", "mine:trian", "--space", "space.yaml"], 2, "it has train, broken"),
        (["search", "mine:number", "--space", "space.yaml"], 2, "is a int"),
        (["search", "mine:train", "--space", "none.yaml"], 2, "cannot be read"),
        (["search", "mine:train", "--space", "space.yaml"], 2, "trials="),
        (["search", "mine:train", "--space", "space.yaml", "--sampler", "tep"], 2, "tep"),
        (["search", "mine:train", "--space", "space.yaml", "--trials", "0"], 2, "trials"),
        (["search", "mine:broken", "--space", "space.yaml", "--trials", "9"], 1, "no such data"),
        (["resume", "nothing"], 2, "no study"),
        (["search", "none.py:train", "--space", "space.yaml"], 2, "There is no file"),
        (["search", "syntax:train", "--space", "space.yaml"], 2, "cannot be imported: SyntaxError"),
        (["search", "raises.py:train", "--space", "space.yaml"], 2, "ZeroDivisionError: division by zero ("),
        (["search", "twice.py:train", "--space", "space.yaml"], 2, "hidden by another module"),
        (["search", "mine:train", "--space", "space.yaml", "--pruner", "asha {", "--trials", "1"], 2, "asha {"),
        (["list", "nothing"], 2, "no study"),
        (["report", "nothing"], 2, "no study"),
    ],
)
def test_mistakes_are_one_line(
    command: list[str],
    code: int,
    said: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (here / "syntax.py").write_text("def train(trial:\n")
    (here / "raises.py").write_text("1 / 0\n")
    (here / "twice.py").write_text("train = print\n")
    another = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("twice", None))
    monkeypatch.setitem(sys.modules, "twice", another)
    assert main(command) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hypergrad: ")
    assert said in error


def test_a_changed_search_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--space", "space.yaml", "--trials", "1", "--folder", "one"]
    assert main(["search", "mine:train", *options]) == 0
    assert main(["search", "mine:train", *options, "--seed", "5"]) == 1
    assert "seed: 0 became 5" in capsys.readouterr().err


def test_a_study_of_a_script_is_resumed_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Study(here / "script", space={"x": Float(0, 1)})
    assert main(["resume", "script", "--trials", "1"]) == 2
    assert "--train" in capsys.readouterr().err
    assert main(["resume", "script", "--trials", "1", "--train", "mine:train"]) == 0


def test_a_module_that_fails_to_import_says_what_it_lacks(here: Path) -> None:
    (here / "lacks.py").write_text("import something_that_is_not_there\n")
    with pytest.raises(ConfigurationError, match=r"'lacks' cannot be imported.*something_that_is_not_there"):
        imported("lacks:train", str(here))


def test_a_file_is_named_by_its_path_and_resumed_from_elsewhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "code").mkdir()
    (here / "code" / "filed.py").write_text("import helper\ndef train(trial):\n    return helper.value\n")
    (here / "code" / "helper.py").write_text("value = 2.0\n")
    options = ["--space", "space.yaml", "--trials", "1", "--folder", str(here / "one")]
    assert main(["search", "code/filed.py:train", *options]) == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert main(["resume", str(here / "one"), "--trials", "2"]) == 0
    assert [r.value for r in Study(here / "one").trials] == [2.0, 2.0]


def test_options_of_samplers_and_limits_reach_the_study(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--space", "space.yaml", "--trials", "8", "--folder", "one"]
    options += ["--pruner", 'asha {"min_resource": 3}', "--sampler", 'tpe {"n_startup_trials": 2}']
    assert main(["search", "mine:broken", *options, "--alike-failures", "2"]) == 1
    assert "first 2 trials" in capsys.readouterr().err
    assert Study(here / "one").spec.pruner == 'asha {"min_resource": 3}'
    assert main(["resume", "one", "--alike-failures", "0"]) == 1
    assert [r.state for r in Study(here / "one").trials] == ["failed"] * 8
    two = ["--monitor", "a", "--monitor", "b", "--direction", "minimize", "--direction", "maximize", "--prune-on", "b"]
    assert main(["search", "mine:train", "--space", "space.yaml", "--folder", "two", "--trials", "1", *two]) == 1
    assert Study(here / "two").spec.prune_on == "b"


def test_list_and_report_read_what_they_cannot_resume(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(here / "deep" / "er" / "one", space={"x": Float(0, 1)}, sampler=RandomSampler(), pruner=NopPruner())
    study.run(lambda trial: trial.params["x"], 1)
    broken = here / "deep" / "broken"
    broken.mkdir()
    (broken / "study.db").write_text("no database at all, and long enough to be one" * 100)
    assert main(["list", "deep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("deep/broken")
    assert "not a database" in lines[1]
    assert lines[2].split()[:2] == ["deep/er/one", "1/1"]
    assert main(["list", "deep/er/one"]) == 0
    assert "RandomSampler object" in capsys.readouterr().out
    assert main(["report", "deep/er/one"]) == 0
    assert (here / "deep" / "er" / "one" / "report.html").exists()


def test_a_reader_that_goes_away_is_no_error(here: Path) -> None:
    Study(here / "one", space={"x": Float(0, 1)}).run(lambda trial: trial.params["x"], 1)
    command = f"{sys.executable} -m hypergrad list one | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", command], cwd=here, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_leaves_a_study_to_be_resumed(here: Path) -> None:
    (here / "space.yaml").write_text("x: {float: [0, 1]}\nwait: 1.5\n")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "hypergrad", "search", "mine:train", "--space", "space.yaml", "--trials", "30"]
    process = subprocess.Popen(
        [*command, "--folder", "one"], cwd=here, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 60
        while not list(here.glob("one/trial-*")) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "`hypergrad resume one` goes on" in said
    assert "Traceback" not in said
    states = [r.state for r in Study(here / "one").trials]
    assert 0 < len(states) < 30
    assert "running" not in states


def test_help_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "hypergrad", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("search", "resume", "list", "report"))


def test_the_space_file_of_the_readme_is_one(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    text = readme.partition("cat > space.yaml << END\n")[2].partition("END\n")[0]
    (tmp_path / "space.yaml").write_text(text)
    assert "nesterov" in read_space(tmp_path / "space.yaml")
