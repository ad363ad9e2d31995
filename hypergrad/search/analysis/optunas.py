"""What Optuna draws: importance, slices, contours, the Pareto front."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hypergrad.search.analysis.chart import NothingToDrawError
from hypergrad.search.analysis.material import Material

# Of optuna.visualization, or of optuna.visualization.matplotlib, whose functions have the same names.
_Draw = Callable[[ModuleType, Material, int], Any]


class Drawing:
    """One kind of picture of one objective.

    Args:
        draw: calls the function.
        least: complete trials that it needs.
        height: in pixels.
    """

    def __init__(self, title: str, draw: _Draw, objective: int = 0, least: int = 2, height: int = 480) -> None:
        self.title = title
        self._height = height
        self._draw, self._objective, self._least = draw, objective, least

    def figure(self, material: Material) -> Any:
        """As a figure of plotly.

        Raises:
            NothingToDrawError: saying why there is none.
        """
        figure = self._made(optuna.visualization, material)
        figure.update_layout(template="plotly_white", title=None, width=None, autosize=True, height=self._height)
        return figure

    def save(self, material: Material, path: Path) -> None:
        """As a PNG; see `figure`."""
        import matplotlib as mpl

        mpl.use("agg", force=False)
        import matplotlib.pyplot as plt

        axes = self._made(optuna.visualization.matplotlib, material)
        first = axes if hasattr(axes, "figure") else axes.flat[0]
        first.figure.set_size_inches(9, 6)
        first.figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(first.figure)

    def _made(self, module: ModuleType, material: Material) -> Any:
        if len(material.values(self._objective)) < self._least:
            raise NothingToDrawError(f"It needs at least {self._least} complete trials.")
        if not material.varying():
            raise NothingToDrawError("No hyperparameter has had two different values.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experimental functions, and of matplotlib's layout
            level = optuna.logging.get_verbosity()
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            try:
                return self._draw(module, material, self._objective)
            except (ValueError, RuntimeError, ZeroDivisionError, KeyError, IndexError) as error:
                raise NothingToDrawError(f"Optuna cannot draw it: {error}") from error
            finally:
                optuna.logging.set_verbosity(level)


def drawings(material: Material) -> list[Drawing]:
    """All that apply to a study."""
    names, several = material.spec.monitors, len(material.spec.monitors) > 1
    found = []
    for i, name in enumerate(names):
        of = f" of {name}" if several else ""
        found += [
            Drawing(f"Importance for {name}", _importance, i, least=4),
            Drawing(f"Slices{of}", _slices, i),
            Drawing(f"Contours{of}", _contours, i, least=4, height=760),
        ]
    if several and len(names) <= 3:
        found.insert(
            0, Drawing("Pareto front", lambda module, m, _: module.plot_pareto_front(m.study, target_names=list(names)))
        )
    return found


def _target(material: Material, objective: int) -> Callable[[FrozenTrial], float] | None:
    return (lambda trial: trial.values[objective]) if len(material.spec.monitors) > 1 else None


def _everywhere(material: Material) -> list[str]:
    """Of what varies, what every complete trial has: conditional hyperparameters have no place in a contour."""
    return [name for name in material.varying() if all(name in r.params for r in material.complete)]


def _important(material: Material, objective: int) -> dict[str, float]:
    names = _everywhere(material)
    if not names:
        raise NothingToDrawError("Every hyperparameter that varied is conditional.")
    if len({value for _, value in material.values(objective)}) < 2:
        raise NothingToDrawError("All trials have the same value.")
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    target = _target(material, objective)
    return optuna.importance.get_param_importances(material.study, evaluator=evaluator, params=names, target=target)


def _importance(module: ModuleType, material: Material, objective: int) -> Any:
    names = list(_important(material, objective))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    options = {
        "params": names,
        "target": _target(material, objective),
        "target_name": material.spec.monitors[objective],
    }
    return module.plot_param_importances(material.study, evaluator=evaluator, **options)


def _slices(module: ModuleType, material: Material, objective: int) -> Any:
    name, target = material.spec.monitors[objective], _target(material, objective)
    return module.plot_slice(material.study, params=material.varying(), target=target, target_name=name)


def _contours(module: ModuleType, material: Material, objective: int) -> Any:
    names = list(_important(material, objective))[:3]
    if len(names) < 2:
        raise NothingToDrawError("It needs two hyperparameters that every trial has.")
    target = _target(material, objective)
    return module.plot_contour(
        material.study, params=names, target=target, target_name=material.spec.monitors[objective]
    )
