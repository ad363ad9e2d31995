"""`hypergrad search | resume | list | report`; everything heavy is imported when a command needs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hypergrad.errors import ConfigurationError, HypergradError

if TYPE_CHECKING:
    from hypergrad.cli.command import Command
    from hypergrad.search import Study

_EPILOG = """\
a space file:
  width:      {int: [32, 512], log: true}           # both bounds included
  dropout:    {float: [0, 0.5], step: 0.1}
  optimizer:  [sgd, adamw]                          # or {categorical: [sgd, adamw]}
  momentum:   {float: [0.5, 0.99], when: {optimizer: sgd}}
  nesterov:   {constant: true, when: {optimizer: sgd}}
  epochs:     20                                    # a constant, always active
  constraints:
    - width * epochs <= 4096

options of a sampler or pruner are JSON behind its name: --pruner 'asha {"min_resource": 3}'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Its exit code: 0; 1 where the study failed; 2 for a mistake in the command; 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    parsed = _parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
    except KeyboardInterrupt:
        print("hypergrad: stopped; `hypergrad resume` goes on.", file=sys.stderr)
        return 130
    except ConfigurationError as error:
        print(f"hypergrad: {error}", file=sys.stderr)
        return 2
    except HypergradError as error:
        print(f"hypergrad: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):  # no extra that is missing, but a mistake of ours
            raise
        print(f"hypergrad: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `hypergrad list DIR | head`; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hypergrad", description="Searches whose trials tune themselves.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    search = commands.add_parser(
        "search",
        help="start a study, or go on with it if it was started alike",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    search.add_argument("train", metavar="PACKAGE.MODULE:FUNCTION", help="called with a Trial; or FILE.py:FUNCTION")
    search.add_argument("--space", type=Path, required=True, metavar="FILE", help="YAML; see below")
    search.add_argument("--folder", type=Path, help="where everything is kept (default: runs/<function>)")
    search.add_argument("--sampler", default="random", help="random, grid, qmc, tpe, gp, cmaes, genetic, refine, pbt")
    search.add_argument("--pruner", default="none", help="none, median, asha, hyperband, patience, wilcoxon")
    search.add_argument("--monitor", action="append", help="the objective (default: val_loss); again for a further one")
    search.add_argument("--direction", action="append", choices=["minimize", "maximize"], help="one per --monitor")
    search.add_argument("--prune-on", metavar="METRIC", help="of several monitored ones (default: the first)")
    search.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    _add_limits(search)
    search.set_defaults(run=_search)

    resume = commands.add_parser(
        "resume",
        help="run what is missing of a study",
        description="Run what is missing of a study, as it was run the last time but for what is said here.",
    )
    resume.add_argument("folder", type=Path, metavar="DIR")
    resume.add_argument("--train", metavar="PACKAGE.MODULE:FUNCTION", help="default: as it was started")
    _add_limits(resume)
    resume.set_defaults(run=_resume)

    listed = commands.add_parser("list", help="the trials of a study, or the studies of a folder")
    listed.add_argument("folder", type=Path, metavar="DIR")
    listed.set_defaults(run=_list)

    report = commands.add_parser("report", help="draw a study")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--output", type=Path, metavar="FILE", help="one HTML file (default: DIR/report.html)")
    report.add_argument("--png", type=Path, metavar="DIR", help="pictures as well")
    report.set_defaults(run=_report)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, help="how many there are to be in the end")
    parser.add_argument("--workers", type=int, help="trials at a time (default: 1)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of the whole run")
    parser.add_argument("--retries", type=int, help="of a trial that fails (default: 0)")
    parser.add_argument("--trial-timeout", type=float, metavar="SECONDS", help="of one attempt")
    alike = "stop when the first N trials have all failed of the same; 0: never (default: 5)"
    parser.add_argument("--alike-failures", type=int, metavar="N", help=alike)
    parser.add_argument("--execution", choices=["local", "ray"], help="where trials run (default: local)")


def _search(parsed: argparse.Namespace) -> int:
    from hypergrad.cli.command import Command, imported
    from hypergrad.cli.space_file import read_space
    from hypergrad.search import Study

    command = _with_limits(Command(parsed.train), parsed)
    train, space = imported(command.train, command.directory), read_space(parsed.space)
    folder = parsed.folder or Path("runs") / parsed.train.partition(":")[2]
    monitors = parsed.monitor or ["val_loss"]
    directions = parsed.direction or ["minimize"] * len(monitors)
    single = len(monitors) == len(directions) == 1
    study = Study(
        folder,
        space=space,
        sampler=parsed.sampler,
        pruner=parsed.pruner,
        monitor=monitors[0] if single else monitors,
        direction=directions[0] if single else directions,
        prune_on=parsed.prune_on,
        seed=parsed.seed,
    )
    command.write(folder)
    study.run(train, **command.settings, progress=True)
    return _end(study)


def _resume(parsed: argparse.Namespace) -> int:
    from hypergrad.cli.command import Command, imported
    from hypergrad.search import Study

    study, known = Study(parsed.folder), Command.read(parsed.folder)
    name = parsed.train or (known.train if known is not None else None)
    if name is None:
        raise ConfigurationError(
            f"{parsed.folder} was not started by `hypergrad search`: say --train package.module:function."
        )
    command = Command(name) if parsed.train or known is None else known
    if known is not None:
        command = replace(known, train=command.train, directory=command.directory)
    command = _with_limits(command, parsed)
    train = imported(command.train, command.directory)
    command.write(parsed.folder)
    study.resume(train, **command.settings, progress=True)
    return _end(study)


def _list(parsed: argparse.Namespace) -> int:
    from hypergrad.cli.table import studies_in, studies_table, study_table
    from hypergrad.search import Storage

    folders = list(studies_in(parsed.folder))
    if not folders:
        raise ConfigurationError(f"There is no study in {parsed.folder}.")
    print(study_table(Storage(parsed.folder)) if folders == [parsed.folder] else studies_table(folders))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from hypergrad.search import Storage
    from hypergrad.search.analysis.report import report_of

    if not Storage.exists(parsed.folder):
        raise ConfigurationError(f"There is no study in {parsed.folder}; `hypergrad list` shows those in a folder.")
    print(report_of(Storage(parsed.folder), parsed.output, png=parsed.png))
    return 0


def _with_limits(command: Command, parsed: argparse.Namespace) -> Command:
    names = ("trials", "workers", "timeout", "retries", "trial_timeout", "alike_failures", "execution")
    return replace(command, **{name: value for name in names if (value := getattr(parsed, name)) is not None})


def _end(study: Study) -> int:
    if study.stopped == "Ctrl-C":
        print(f"hypergrad: stopped; `hypergrad resume {study.folder}` goes on.", file=sys.stderr)
        return 130
    front = study.front
    for record in front[:10]:
        print(f"best: trial {record.number}, {record.value}, {dict(record.params)}, in {record.folder}")
    if not front:
        print(f"No trial is complete; see `hypergrad list {study.folder}`.")
    return 0 if front else 1
