"""`hypergrad search | resume | list | report`; everything heavy is imported when a command needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hypergrad.errors import ConfigurationError, HypergradError

if TYPE_CHECKING:
    from hypergrad.cli.command import Command
    from hypergrad.search import Study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Its exit code: 0; 1 where the study failed; 2 for a mistake in the command; 130 after Ctrl-C."""
    parsed = _parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
    except KeyboardInterrupt:
        print("hypergrad: stopped; `hypergrad resume` goes on.", file=sys.stderr)
        return 130
    except ConfigurationError as error:
        print(f"hypergrad: {error}", file=sys.stderr)
        return 2
    except (HypergradError, ModuleNotFoundError, LookupError) as error:
        print(f"hypergrad: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hypergrad", description="Searches whose trials tune themselves.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    search = commands.add_parser("search", help="start a study, or go on with it if it was started alike")
    search.add_argument("train", metavar="PACKAGE.MODULE:FUNCTION", help="called with a Trial; returns the objective")
    search.add_argument("--space", type=Path, required=True, metavar="FILE", help="YAML; see the README")
    search.add_argument("--folder", type=Path, help="where everything is kept (default: runs/<function>)")
    search.add_argument("--sampler", default="random", help="random, grid, qmc, tpe, gp, cmaes, genetic, refine, pbt")
    search.add_argument("--pruner", default="none", help="none, median, asha, hyperband, patience, wilcoxon")
    search.add_argument("--monitor", action="append", help="the objective (default: val_loss); again for a further one")
    search.add_argument("--direction", action="append", choices=["minimize", "maximize"], help="one per --monitor")
    search.add_argument("--seed", type=int, default=0)
    _add_limits(search)
    search.set_defaults(run=_search)

    resume = commands.add_parser("resume", help="run what is missing of a study")
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


def _search(parsed: argparse.Namespace) -> int:
    from hypergrad.cli.command import Command, imported
    from hypergrad.cli.space_file import read_space
    from hypergrad.search import Study

    train, space = imported(parsed.train), read_space(parsed.space)
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
        seed=parsed.seed,
    )
    command = _with_limits(Command(parsed.train), parsed)
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
    command = _with_limits(replace(known, train=name) if known is not None else Command(name), parsed)
    train = imported(name)
    command.write(parsed.folder)
    study.resume(train, **command.settings, progress=True)
    return _end(study)


def _list(parsed: argparse.Namespace) -> int:
    from hypergrad.cli.table import studies_in, studies_table, trials_table
    from hypergrad.search import Study

    folders = studies_in(parsed.folder)
    if not folders:
        raise ConfigurationError(f"There is no study in {parsed.folder}.")
    if folders == [parsed.folder]:
        study = Study(parsed.folder)
        print(f"{study!r}\n{study.space}\n")
        print(trials_table(study.trials))
    else:
        print(studies_table(folders))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from hypergrad.search import Study

    study = Study(parsed.folder)
    path = study.report(parsed.output or parsed.folder / "report.html", png=parsed.png)
    print(path)
    return 0


def _with_limits(command: Command, parsed: argparse.Namespace) -> Command:
    names = ("trials", "workers", "timeout", "retries", "trial_timeout")
    return replace(command, **{name: value for name in names if (value := getattr(parsed, name)) is not None})


def _end(study: Study) -> int:
    front = study.front
    for record in front[:10]:
        print(f"best: trial {record.number}, {record.value}, {dict(record.params)}, in {record.folder}")
    if not front:
        print(f"No trial is complete; see `hypergrad list {study.folder}`.")
    return 0 if front else 1
