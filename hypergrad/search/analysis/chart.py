"""A chart as plain data, drawn by plotly for the browser and by matplotlib for pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#ff7f0e", "#7f7f7f")
LAYOUT: Mapping[str, Any] = {"template": "plotly_white", "height": 440, "margin": {"t": 40, "b": 50, "l": 70, "r": 60}}


class NothingToDrawError(Exception):
    """What a chart lacks, in one sentence."""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Args:
        texts: what is said of each point under the pointer.
        faint: drawn in the background.
        marker: of the last point; `"x"` for what was cut short.
        color: index of the color; None for one after the other.
        named: whether the legend has it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["lines", "steps", "markers", "crosses"] = "lines"
    texts: Sequence[str] = ()
    faint: bool = False
    marker: Literal["", "x"] = ""
    color: int | None = None
    named: bool = True


@dataclass(frozen=True)
class Chart:
    """A title, two axes, and what is drawn between them."""

    title: str
    x: str
    y: str
    series: list[Series] = field(default_factory=list)
    log_y: bool = False

    def figure(self) -> Any:
        """As a figure of plotly."""
        import plotly.graph_objects as go

        figure = go.Figure()
        for at, s in enumerate(self.series):
            color = COLORS[(at if s.color is None else s.color) % len(COLORS)]
            opacity = 0.35 if s.faint else 1.0
            figure.add_trace(
                go.Scatter(
                    x=list(s.x),
                    y=list(s.y),
                    name=s.name,
                    mode="lines" if s.kind in ("lines", "steps") else "markers",
                    text=list(s.texts) or None,
                    opacity=opacity,
                    line={"color": color, "width": 1.5, "shape": "hv" if s.kind == "steps" else "linear"},
                    marker={"color": color, "size": 7, "symbol": "x" if s.kind == "crosses" else "circle"},
                    showlegend=s.named,
                )
            )
            if s.marker and len(s.x):
                mark = {"color": color, "size": 9, "symbol": "x"}
                figure.add_trace(
                    go.Scatter(x=[s.x[-1]], y=[s.y[-1]], mode="markers", marker=mark, opacity=opacity, showlegend=False)
                )
        figure.update_layout(xaxis_title=self.x, yaxis_title=self.y, **LAYOUT)
        if self.log_y:
            figure.update_yaxes(type="log", exponentformat="power")
        return figure

    def save(self, path: Path) -> None:
        """As a PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for at, s in enumerate(self.series):
            color, alpha = COLORS[(at if s.color is None else s.color) % len(COLORS)], 0.35 if s.faint else 1.0
            style: dict[str, Any] = {"linestyle": "", "marker": "x" if s.kind == "crosses" else "o", "markersize": 4}
            if s.kind in ("lines", "steps"):
                style = {"drawstyle": "steps-post" if s.kind == "steps" else "default"}
            axes.plot(s.x, s.y, color=color, alpha=alpha, label=s.name if s.named else None, linewidth=1.2, **style)
            if s.marker and len(s.x):
                axes.plot(s.x[-1:], s.y[-1:], color=color, alpha=alpha, marker="x", linestyle="")
        axes.set(title=self.title, xlabel=self.x, ylabel=self.y, yscale="log" if self.log_y else "linear")
        if 1 < sum(s.named for s in self.series) <= 12:
            axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)
