"""Puts everything that can be drawn of a study into one HTML file that needs no network, and into PNGs."""

from __future__ import annotations

import html
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hypergrad.search.analysis.chart import Chart, NothingToDrawError
from hypergrad.search.analysis.charts import curves, history, learned
from hypergrad.search.analysis.material import Material
from hypergrad.search.analysis.optunas import Drawing, drawings
from hypergrad.search.analysis.parallel import Parallel
from hypergrad.search.record import TrialRecord
from hypergrad.search.storage import Storage

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin: 2em 0 .3em }
pre { background: #f6f6f6; padding: .8em } .why, .note { color: #777; margin: 0 } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .25em .7em; text-align: left; vertical-align: top }
tr:nth-child(even) { background: #f6f6f6 }
td:last-child { min-width: 14em } .failed { color: #b00020 } .pruned { color: #8a6d00 } .best { font-weight: bold }
"""
_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["zoom2d", "pan2d", "autoScale2d", "toImage"]],
}


@dataclass(frozen=True)
class Section:
    """A heading and a figure, or a word on why there is none."""

    title: str
    figure: Callable[[], Any]
    save: Callable[[Path], None]
    note: str = ""


def report_of(storage: Storage, path: str | Path | None = None, *, png: str | Path | None = None) -> Path:
    """See `Study.report`; needs no sampler or pruner that the study was made with."""
    material = Material(storage.spec, storage.records(), storage.study)
    target = Path(path) if path is not None else storage.folder / "report.html"
    return write_report(storage.folder, material, target, Path(png) if png is not None else None)


def write_report(folder: Path, material: Material, path: Path, png: Path | None = None) -> Path:
    """Write the report.

    Args:
        folder: of the study, for the heading.
        path: of the HTML file.
        png: a folder for pictures of the sections that have one.

    Raises:
        ModuleNotFoundError: without the packages that draw; says how to get them.
    """
    _check_installed(png is not None)
    sections = list(_sections(material))
    body = [_heading(folder, material), *_figures(sections), _trials(material, path.parent)]
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(folder.name)}</title>'
    page += f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
        for section in sections:
            try:
                section.save(png / f"{_file_name(section.title)}.png")
            except NothingToDrawError:
                continue
    return path


def _check_installed(pictures: bool) -> None:
    needed = ["plotly", *(["matplotlib"] if pictures else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"A report needs {' and '.join(missing)}: pip install 'hypergrad-lightning[report]'.", name=missing[0]
        )


def _sections(material: Material) -> Iterator[Section]:
    for objective, name in enumerate(material.spec.monitors):
        yield _of_chart(f"History of {name}", partial(history, material, objective))
    yield _of_chart("Learning curves", partial(curves, material))
    try:
        for chart in learned(material):
            yield _of_chart(chart.title, lambda chart=chart: chart)  # type: ignore[misc]
    except NothingToDrawError as error:
        yield _nothing("Learned hyperparameters", str(error))
    for objective, name in enumerate(material.spec.monitors):
        parallel = partial(Parallel, material, objective)
        yield Section(f"Parallel coordinates of {name}", *_lazily(parallel))
    for drawing in drawings(material):
        yield _of_drawing(drawing, material)


def _of_chart(title: str, make: Callable[[], Chart]) -> Section:
    return Section(title, *_lazily(make))


def _lazily(make: Callable[[], Chart | Parallel]) -> tuple[Callable[[], Any], Callable[[Path], None]]:
    return lambda: make().figure(), lambda path: make().save(path)


def _of_drawing(drawing: Drawing, material: Material) -> Section:
    note = drawing.note(material)
    return Section(drawing.title, partial(drawing.figure, material), partial(drawing.save, material), note)


def _nothing(title: str, why: str) -> Section:
    def raises(*_: Any) -> Any:
        raise NothingToDrawError(why)

    return Section(title, raises, raises)


def _figures(sections: list[Section]) -> Iterator[str]:
    from plotly.io import to_html

    library: bool = True  # goes into the file once
    for section in sections:
        yield f"<h2>{html.escape(section.title)}</h2>"
        try:
            figure = section.figure()
        except NothingToDrawError as error:
            yield f'<p class="why">{html.escape(str(error))}</p>'
            continue
        yield f'<p class="note">{html.escape(section.note)}</p>' if section.note else ""
        yield to_html(figure, include_plotlyjs=library, full_html=False, config=_CONFIG)
        library = False


def _heading(folder: Path, material: Material) -> str:
    states = Counter(record.state for record in material.records)
    counted = ", ".join(f"{count} {state}" for state, count in states.items()) or "no trials yet"
    goals = ", ".join(f"{d} {m}" for d, m in zip(material.spec.directions, material.spec.monitors, strict=True))
    settings = f"{goals}; sampler {material.spec.sampler}, pruner {material.spec.pruner}, seed {material.spec.seed}"
    best = material.ranked()[:1]
    said = "".join(
        f'<p class="best">Best: trial {r.number}, {html.escape(_number(r.value))}, '
        f"{html.escape(', '.join(f'{k} = {_number(v)}' for k, v in r.params.items()))}</p>"
        for r in best
        if len(material.spec.monitors) == 1
    )
    return (
        f"<h1>{html.escape(str(folder))}</h1><p>{counted}. {html.escape(settings)}.</p>{said}"
        f"<pre>{html.escape(str(material.spec.space))}</pre>"
    )


def _trials(material: Material, beside: Path) -> str:
    names = list(material.spec.space)
    heads = ("trial", "state", *material.spec.monitors, "seconds", "attempts", *names, "reason")
    rows = ["".join(f"<th>{html.escape(head)}</th>" for head in heads)]
    best = {record.number for record in material.ranked()[:1]}
    for record in material.records:
        values = record.value if isinstance(record.value, tuple) else (record.value,)
        missing = [None] * (len(material.spec.monitors) - len(values))
        cells: list[object] = [
            record.number,
            record.state,
            *values,
            *missing,
            round(record.duration, 1),
            record.attempts,
        ]
        cells += [record.params.get(name, "") for name in names]
        kind = "best" if record.number in best else record.state
        shown = [*(html.escape(_number(cell)) for cell in cells), html.escape(_why(record)) + _link(record, beside)]
        rows.append("".join(f'<td class="{kind}">{cell}</td>' for cell in shown))
    table = f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    return f'<h2>Trials</h2><div class="wide">{table}</div>'


def _why(record: TrialRecord) -> str:
    """The reason of its end, and those of the ends of its earlier attempts."""
    earlier = record.failures if record.state != "failed" else record.failures[:-1]
    before = f"earlier attempts: {'; '.join(earlier)}" if earlier else ""
    return "; ".join(part for part in (record.reason or "", before) if part)


def _link(record: TrialRecord, beside: Path) -> str:
    """To the tracebacks of its failed attempts, from a file in the folder `beside`."""
    if record.error is None:
        return ""
    address = quote(Path(os.path.relpath(record.error, beside)).as_posix())
    return f' <a href="{address}">traceback</a>'


def _number(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
