"""The package as a whole: what importing it costs, what it exports, and what the tools say of it."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hypergrad
import hypergrad.callbacks
import hypergrad.search

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    {m.name for m in pkgutil.walk_packages(hypergrad.__path__, "hypergrad.")}
    | {m.name for m in pkgutil.iter_modules(hypergrad.callbacks.__path__, "hypergrad.callbacks.")}
)


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_importing_hypergrad_loads_neither_lightning_nor_optuna_nor_torchs_compiler() -> None:
    script = """
import sys, torch
before = set(sys.modules)
import hypergrad
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = new & {"lightning", "pytorch_lightning", "optuna", "higher", "sklearn", "tensorboard", "scipy", "torchmetrics"}
assert not heavy, heavy
assert not new & {"cloudpickle", "sqlalchemy", "ray"}, new
assert not {m for m in set(sys.modules) - before if m.startswith(("torch._dynamo", "torch._inductor"))}
"""
    _run(sys.executable, "-c", script)


def test_importing_search_loads_neither_lightning_nor_the_extras() -> None:
    script = """
import sys
import hypergrad.search
heavy = {m.partition(".")[0] for m in sys.modules} & {"lightning", "pytorch_lightning", "ray", "sklearn", "pandas"}
assert not heavy, heavy
"""
    _run(sys.executable, "-c", script)


def test_callbacks_are_installed_inside_hypergrad_and_nowhere_else() -> None:
    script = "import hypergrad.callbacks, importlib.util as u; assert u.find_spec('callbacks') is None"
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", [hypergrad, hypergrad.callbacks, hypergrad.search])
def test_everything_exported_exists_and_is_documented(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert len(names) == len(set(names))  # their order is ruff's to check
    for name in names:
        assert (getattr(package, name).__doc__ or "").strip(), f"{name} has no docstring"


def _public_definitions() -> list[tuple[str, ast.AST]]:
    found = []
    for folder in ("hypergrad", "callbacks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "hypergrad" and "callbacks" in path.relative_to(ROOT).parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node))
    return found


def test_public_classes_and_functions_have_docstrings_and_no_star_imports() -> None:
    top = [(where, node) for where, node in _public_definitions() if isinstance(node, ast.ClassDef)]
    assert len(top) > 20
    assert [where for where, node in top if not ast.get_docstring(node)] == []
    for folder in ("hypergrad", "callbacks", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^from \S+ import \*", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests() -> None:
    assert len(MODULES) > 20
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) > 15


def _readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*GPU available.*", "ignore:.*`val_dataloader`.*")
def test_readme_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = _readme_blocks()
    assert len(blocks) >= 3
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_ruff() -> None:
    _run(_tool("ruff"), "check", ".")
    _run(_tool("ruff"), "format", "--check", ".")


def test_types() -> None:
    _run(sys.executable, "-m", "mypy")


def test_import_rules() -> None:
    _run(_tool("lint-imports"))


def test_the_wheel_holds_both_packages_and_the_type_marker(tmp_path: Path) -> None:
    import shutil
    import zipfile

    # From a copy: a build leaves folders behind in which the next one finds files that are long gone.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("hypergrad", "callbacks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    _run(sys.executable, *command)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    core = {str(p.relative_to(ROOT)) for p in (ROOT / "hypergrad").rglob("*.py") if "callbacks" not in p.parts}
    callbacks = {f"hypergrad/{p.relative_to(ROOT)}" for p in (ROOT / "callbacks").glob("*.py")}
    assert {"hypergrad/py.typed"} | core | callbacks == {name for name in names if name.endswith((".py", "py.typed"))}
    assert not any(name.startswith("callbacks/") for name in names)
