"""TensorBoard's HParams for a whole study: one experiment record, one session per trial, true ends.

The driver writes them, because a killed worker cannot write its own end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from hypergrad.search.cross_validation import FILE
from hypergrad.search.parameter import Constant, Float, Int, Parameter
from hypergrad.search.record import TrialRecord
from hypergrad.search.spec import StudySpec

log = logging.getLogger("hypergrad.search")
_INACTIVE = "(inactive)"


class Board:
    """Event files of a study: the experiment in its folder, sessions in the trials' folders.

    A full disk or a lost folder costs the picture, not the study: errors of writing are logged, once.

    Args:
        folder: of the study.
        spec: its space and objectives.
    """

    def __init__(self, folder: Path, spec: StudySpec) -> None:
        self._folder, self._spec = folder, spec
        single = len(spec.monitors) == 1
        self._objectives = ["objective"] if single else [f"objective/{name}" for name in spec.monitors]
        self._sign = 1.0 if spec.pruning_direction == "minimize" else -1.0
        self._best: dict[int, float] = {}
        self._judged = 0  # complete and pruned trials, and how many of them have each metric
        self._metrics: Counter[str] = Counter()
        self._tags: list[str] = []
        self._experiment: Path | None = None
        self._failed = False

    def open(self, records: Iterable[TrialRecord]) -> None:
        """Write the experiment record, with the metrics of the trials so far."""
        for record in records:
            self._count(record)
        with self._tolerantly():
            for stale in self._folder.glob("events.out.tfevents.*.study"):
                stale.unlink()
            self._write_experiment()

    def started(self, record: TrialRecord) -> None:
        """A session begins, or begins again."""
        with self._tolerantly():
            _append(record.folder, "start", [session_start(self._spec, record.params, record.folder.name)])

    def reported(self, number: int, step: int, value: float, folder: Path) -> None:
        """Keep the best so far in sight while the trial runs."""
        if math.isfinite(value):
            best = min(self._best.get(number, math.inf), self._sign * value)
            self._best[number] = best
            tag = self._objectives[self._spec.monitors.index(self._spec.prune_on)]
            with self._tolerantly():
                _append(folder, "start", [_scalar_event(tag, self._sign * best, step)])

    def finished(self, record: TrialRecord, logged: Iterable[str]) -> None:
        """The session ends as the trial did; what its own logger has not written is written now."""
        self._best.pop(record.number, None)
        step = max(record.curve, default=0) + 1
        values: dict[str, float] = {k: v for k, v in record.metrics.items() if k not in set(logged)}
        if record.state == "complete":
            result = record.value if isinstance(record.value, tuple) else (record.value,)
            values.update({t: v for t, v in zip(self._objectives, result, strict=True) if v is not None})
        values.update({"pruned": float(record.state == "pruned"), "duration": record.duration})
        status = api_pb2.STATUS_FAILURE if record.state == "failed" else api_pb2.STATUS_SUCCESS
        events = [_scalar_event(tag, value, step) for tag, value in values.items() if math.isfinite(value)]
        with self._tolerantly():
            # In a file of its own: TensorBoard may have read past the one that the start is in.
            _append(record.folder, "end", [*events, session_end(status)])
            self._write_folds(record, status)
            self._count(record)
            if self._tags != self._ordered_tags():
                self._write_experiment()

    # ----------------------------------------------------------------------------------------------------- inside

    def _count(self, record: TrialRecord) -> None:
        if record.state in ("complete", "pruned"):
            self._judged += 1
            self._metrics.update(record.metrics.keys())

    def _ordered_tags(self) -> list[str]:
        """The columns. What every trial has comes first: TensorBoard selects the first five, and leaves a trial out of
        its plots that lacks a selected one.
        """
        # Of what HyperGradient logs, the learned values are results; how they were found is in the trial's charts.
        results = [t for t in sorted(self._metrics) if not t.startswith("hypergradient/") or t.endswith("/value")]
        common = [tag for tag in results if self._metrics[tag] == self._judged]
        rare = [tag for tag in results if self._metrics[tag] < self._judged]
        return [*self._objectives, "pruned", *common, "duration", *rare]

    def _write_folds(self, record: TrialRecord, status: int) -> None:
        """Every fold as a session of the trial's group, over which TensorBoard averages."""
        with contextlib.suppress(FileNotFoundError):
            stored = json.loads((record.folder / FILE).read_text())
            for i, metrics in enumerate(stored["metrics"]):
                value = metrics.get(stored["plan"]["monitor"], math.nan)
                objective = [_scalar_event(self._objectives[0], value, 1)] if math.isfinite(value) else []
                start = session_start(self._spec, record.params, record.folder.name)
                _append(record.folder / f"fold-{i}", "end", [start, *objective, session_end(status)])

    def _write_experiment(self) -> None:
        # Constants would take the place of what varies: TensorBoard shows the first few columns.
        infos = [_hparam_info(n, p) for n, p in self._spec.space.items() if not isinstance(p, Constant)]
        self._tags = self._ordered_tags()
        metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=tag) for tag in self._tags]
        text = f"hypergrad study {self._folder.name}"
        content = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics, description=text)
        event = _plugin_event(metadata.EXPERIMENT_TAG, experiment=content)
        # TensorBoard knows the first record only: it is replaced when a metric is new.
        before, self._experiment = self._experiment, _append(self._folder, "study", [event], fresh=True)
        if before is not None:
            before.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _tolerantly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                log.warning("TensorBoard files cannot be written (%s); the study goes on.", error)
            self._failed = True


def _hparam_info(name: str, parameter: Parameter) -> api_pb2.HParamInfo:
    described = f"{parameter}" + ("; where it is not active, the low bound is shown" if parameter.when else "")
    if isinstance(parameter, (Float, Int)):
        interval = api_pb2.Interval(min_value=parameter.low, max_value=parameter.high)
        kind = api_pb2.DATA_TYPE_FLOAT64
        return api_pb2.HParamInfo(name=name, description=described, type=kind, domain_interval=interval)
    info = api_pb2.HParamInfo(name=name, description=str(parameter))
    values = [_shown(parameter, value) for value in parameter.values() or ()]
    values += [_INACTIVE] if parameter.when else []
    info.type = _type_of(values)
    info.domain_discrete.extend([str(v) if info.type == api_pb2.DATA_TYPE_STRING else v for v in values])
    return info


def _type_of(values: list[Any]) -> Any:
    if all(isinstance(v, bool) for v in values):
        return api_pb2.DATA_TYPE_BOOL
    if all(isinstance(v, float) for v in values):
        return api_pb2.DATA_TYPE_FLOAT64
    return api_pb2.DATA_TYPE_STRING


def _shown(parameter: Parameter, value: Any) -> Any:
    """A value as TensorBoard has it: of one type per column, and present in every trial, or it drops the trial."""
    if isinstance(parameter, (Float, Int)):
        return float(parameter.low if value is None else value)
    choices = parameter.values() or ()
    if parameter.when and value is None and (None not in choices):
        return _INACTIVE
    if parameter.when or not all(isinstance(c, (int, float)) for c in choices):
        return str(value)
    if all(isinstance(c, bool) for c in choices):
        return bool(value)
    return str(value) if any(isinstance(c, bool) for c in choices) else float(value)


def session_start(spec: StudySpec, params: Mapping[str, Any], group: str) -> Event:
    """The record that a session, with these parameters, belongs to the trial `group`."""
    info = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=time.time())
    for name, parameter in spec.space.items():
        if isinstance(parameter, Constant):
            continue
        value = _shown(parameter, params.get(name))
        kind = (
            "bool_value" if isinstance(value, bool) else "number_value" if isinstance(value, float) else "string_value"
        )
        setattr(info.hparams[name], kind, value)
    return _plugin_event(metadata.SESSION_START_INFO_TAG, session_start_info=info)


def session_end(status: int) -> Event:
    """The record that a session has ended."""
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    return _plugin_event(metadata.SESSION_END_INFO_TAG, session_end_info=info)


def _plugin_event(tag: str, **content: Any) -> Event:
    described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    value = Summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)
    return Event(wall_time=time.time(), summary=Summary(value=[value]))


def _scalar_event(tag: str, value: float, step: int) -> Event:
    return Event(wall_time=time.time(), step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


_serial = 0


def _append(folder: Path, part: str, events: Iterable[Event], *, fresh: bool = False) -> Path:
    """Append to this process' file for one part of a trial; no file stays open.

    TensorBoard reads a folder's files in the order of their names, which must be that in which they were made.
    """
    global _serial
    ours = sorted(folder.glob(f"events.out.tfevents.*.{os.getpid()}.*.{part}"))
    if ours and not fresh:
        path = ours[-1]
    else:
        _serial += 1
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{_serial:08}.{part}"
        path = folder / name
    new = not path.exists()
    with open(path, "ab") as file:
        writer = RecordWriter(file)
        if new:
            writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for event in events:
            writer.write(event.SerializeToString())
    return path
