"""Parallel coordinates in which every complete trial is drawn, whatever it has no value of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad.search.analysis.chart import LAYOUT, NothingToDrawError
from hypergrad.search.analysis.material import Material
from hypergrad.search.parameter import Float, Int, Parameter

_INACTIVE = "inactive"
_BELOW = -0.12  # where what is not active is drawn, with the domain on [0, 1]


@dataclass(frozen=True)
class Axis:
    """One hyperparameter: where each trial is on it, in [0, 1] or below, and what stands beside it."""

    name: str
    positions: list[float]
    ticks: dict[float, str]


class Parallel:
    """Axes of everything that varied, and the value of each trial as its color."""

    def __init__(self, material: Material, objective: int) -> None:
        pairs = material.values(objective)
        names = material.varying()
        if len(pairs) < 2:
            raise NothingToDrawError("It needs at least 2 complete trials.")
        if not names:
            raise NothingToDrawError("No hyperparameter has had two different values.")
        space = material.spec.space
        self.values = [value for _, value in pairs]
        self.label = material.spec.monitors[objective]
        self.axes = [_axis(name, space[name], [r.params.get(name) for r, _ in pairs]) for name in names]

    def figure(self) -> Any:
        """As a figure of plotly."""
        import plotly.graph_objects as go

        dimensions = [
            {
                "label": axis.name,
                "values": axis.positions,
                "range": [min(0.0, *axis.positions), 1.0],
                "tickvals": list(axis.ticks),
                "ticktext": list(axis.ticks.values()),
            }
            for axis in self.axes
        ]
        color = {"color": self.values, "colorscale": "Viridis", "showscale": True, "colorbar": {"title": self.label}}
        figure = go.Figure(go.Parcoords(line=color, dimensions=dimensions, domain={"x": [0.0, 0.96]}))
        figure.update_layout(**{**LAYOUT, "margin": {"t": 60, "b": 40, "l": 80, "r": 80}})
        return figure

    def save(self, path: Path) -> None:
        """As a PNG."""
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 1.6 * len(self.axes)), 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        colors = ScalarMappable(Normalize(min(self.values), max(self.values)), mpl.colormaps["viridis"])
        for at, color in enumerate(colors.to_rgba(np.array(self.values))):
            axes.plot([axis.positions[at] for axis in self.axes], color=color, alpha=0.7)
        for x, axis in enumerate(self.axes):
            axes.axvline(x, color="#999", linewidth=0.8)
            for y, text in axis.ticks.items():
                axes.annotate(text, (x, y), fontsize=8, xytext=(3, 0), textcoords="offset points", va="center")
        axes.set_xticks(range(len(self.axes)), [axis.name for axis in self.axes])
        axes.set_yticks([])
        figure.colorbar(colors, ax=axes, label=self.label)
        figure.savefig(path, dpi=120)


def _axis(name: str, parameter: Parameter, values: list[Any]) -> Axis:
    missing = {_BELOW: _INACTIVE} if None in values and not parameter.contains(None) else {}
    if isinstance(parameter, (Float, Int)):
        low, high = _scaled(parameter, parameter.low), _scaled(parameter, parameter.high)
        places = [_BELOW if v is None else (_scaled(parameter, v) - low) / (high - low) for v in values]
        middle = low + (high - low) / 2
        ends = {0.0: parameter.low, 0.5: math.exp(middle) if parameter.log else middle, 1.0: parameter.high}
        return Axis(name, places, {**missing, **{at: f"{value:.3g}" for at, value in ends.items()}})
    choices = list(parameter.values() or ())
    at = {repr(choice): i / max(len(choices) - 1, 1) for i, choice in enumerate(choices)}
    places = [at.get(repr(value), _BELOW) for value in values]
    return Axis(name, places, {**missing, **{at[repr(choice)]: str(choice) for choice in choices}})


def _scaled(parameter: Float | Int, value: float) -> float:
    return math.log(value) if parameter.log else float(value)
