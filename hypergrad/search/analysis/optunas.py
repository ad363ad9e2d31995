"""What Optuna draws: importance, slices, contours, the Pareto front."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hypergrad.search.analysis.chart import LAYOUT, NothingToDrawError
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

    def note(self, material: Material) -> str:
        """What it leaves out; empty where that is nothing."""
        left_out = [name for name in material.varying() if name not in _everywhere(material)]
        if self._draw in (_slices, _front) or not left_out or len(left_out) == len(material.varying()):
            return ""
        return f"Without {', '.join(left_out)}: conditional, and not active in every complete trial."

    def figure(self, material: Material) -> Any:
        """As a figure of plotly.

        Raises:
            NothingToDrawError: saying why there is none.
        """
        figure = self._made(optuna.visualization, material)
        figure.update_layout(**{**LAYOUT, "title": None, "width": None, "autosize": True, "height": self._height})
        _relieve_plotly(figure)
        return figure

    def save(self, material: Material, path: Path) -> None:
        """As a PNG; see `figure`."""
        import matplotlib as mpl
        import matplotlib.pyplot as plt
        import numpy as np

        with mpl.rc_context(), plt.ioff():  # Optuna sets a style for the whole process
            made = np.atleast_1d(self._made(optuna.visualization.matplotlib, material))
            figure = made.flat[0].figure
            figure.set_size_inches(9 if made.size == 1 else max(9.0, 2.6 * made.shape[-1]), 6 if made.ndim == 1 else 8)
            figure.suptitle("")
            for axes in made.flat:
                axes.set_title("")
                _relieve_matplotlib(axes)
            made.flat[0].set_title(self.title, loc="left")
            figure.savefig(path, dpi=120, bbox_inches="tight")
            plt.close(figure)

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


def _relieve_plotly(figure: Any) -> None:
    """No ticks on top of each other on the log axes of narrow panels."""
    for letter, axes in (("x", figure.select_xaxes()), ("y", figure.select_yaxes())):
        for axis in axes:
            name = letter + axis.plotly_name.removeprefix(f"{letter}axis")
            drawn = [
                t for t in figure.data if t.type != "bar" and (getattr(t, f"{letter}axis", None) or letter) == name
            ]
            numbers = [
                v for t in drawn for v in (getattr(t, letter, None) or ()) if isinstance(v, (int, float)) and v > 0
            ]
            if axis.type == "log" and numbers:
                at = _log_ticks(min(numbers), max(numbers))
                axis.update(tickvals=at, ticktext=[f"{value:.3g}" for value in at])


def _relieve_matplotlib(axes: Any) -> None:
    """The same there."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
        if axis.get_scale() == "log":
            axis.set_minor_locator(NullLocator())
            axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
            axis.set_major_formatter(StrMethodFormatter("{x:.3g}"))


def _log_ticks(low: float, high: float) -> list[float]:
    """Four powers of ten at most, or where there are not two of them, three values that part the range evenly.

    >>> [_log_ticks(1e-5, 1.0), _log_ticks(2, 50)]
    [[1e-05, 0.001, 0.1], [2.8, 10.0, 36.2]]
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 1:
        return [10.0**power for power in range(first, last + 1, 1 + (last - first) // 4)]
    return [round(low * (high / low) ** at, 1 - math.floor(math.log10(low))) for at in (0.1, 0.5, 0.9)]


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
        found.insert(0, Drawing("Pareto front", _front))
    return found


def _front(module: ModuleType, material: Material, _: int) -> Any:
    return module.plot_pareto_front(material.study, target_names=list(material.spec.monitors))


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
