"""``vovnet-fast tuning``: the engines that were measured to be fastest, shown and shared."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import tuning
from ..backends import BackendError
from . import regret


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of ``vovnet-fast``."""
    command = commands.add_parser(
        "tuning",
        help="the engines that were measured to be fastest",
        description=(
            "Show or share the choices that were made by measuring on this machine, kept in "
            f"~/.cache/vovnet_fast or in the folder that {tuning.CACHE_ENVIRONMENT} names. "
            f"{tuning.TABLE_ENVIRONMENT} names an exported file to ask for what is not in there."
        ),
    )
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show", help="list problems and engines by machine, with times measured and predicted"
    )
    show.add_argument("--json", action="store_true", help="print JSON instead of tables")
    show.set_defaults(run=_show)
    export = actions.add_parser("export", help="write the choices to a file")
    export.add_argument("file", metavar="FILE", type=Path)
    export.add_argument("--force", action="store_true", help="replace FILE if it exists")
    export.set_defaults(run=_export)
    for action in (show, export):
        action.add_argument(
            "--machine", default="", metavar="TEXT", help="only machines whose name contains this"
        )
    regrets = actions.add_parser(
        "regret",
        help="hold the cost model's choices against measured times",
        description=(
            "For every problem of which several engines were measured: the fastest, what would "
            "be taken without measuring (static), what would be found among those that are "
            "measured by default (tuned), and their times over the fastest's. "
            f"{tuning.ENVIRONMENT}={tuning.ALL} measures all there are, as this needs it."
        ),
    )
    regrets.add_argument(
        "files", nargs="*", metavar="FILE", type=Path, help="exported; by default what is known"
    )
    regrets.add_argument("--json", action="store_true", help="print JSON instead of a table")
    regrets.set_defaults(run=_regret)
    take = actions.add_parser("import", help="take over the choices of an exported file")
    take.add_argument("file", metavar="FILE", type=Path)
    take.add_argument("--replace", action="store_true", help="also where a choice is known already")
    take.set_defaults(run=_import)


def _choices(text: str) -> tuning.Choices:
    """What is known of the machines whose name contains ``text``."""
    known = tuning.table().choices()
    found = {machine: choices for machine, choices in known.items() if text in machine}
    if text and not found:
        raise ValueError(
            f"no machine's name contains {text!r}; known are: {', '.join(sorted(known)) or 'none'}"
        )
    return found


def _show(args: argparse.Namespace) -> None:
    found = _choices(args.machine)
    if args.json:
        content = {m: {p: c.as_json() for p, c in known.items()} for m, known in found.items()}
        print(json.dumps(content, indent=2, sort_keys=True))
        return
    console = Console(highlight=False)
    if not found:
        console.print("Nothing has been measured yet: run a model on a GPU.")
    unpredicted: Exception | None = None
    for machine, choices in sorted(found.items()):
        table = Table(title=escape(machine), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("problem", overflow="fold")
        table.add_column("engine", no_wrap=True)
        for heading in ("us", "predicted"):
            table.add_column(heading, justify="right", no_wrap=True)
        for problem, choice in sorted(choices.items()):
            try:
                predicted = regret.predicted(choice).get(choice.name)
            except (BackendError, ValueError) as error:
                unpredicted, predicted = error, None
            times = map(_microseconds, (choice.seconds.get(choice.name), predicted))
            table.add_row(escape(problem), escape(choice.name), *times)
        console.print(table)
    if unpredicted is not None:
        console.print(escape(str(unpredicted)))


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def _regret(args: argparse.Namespace) -> None:
    found = tuning.table().choices() if not args.files else {}
    for file in args.files:
        found = tuning.merge(found, _file(file))
    rows = list(regret.rows(found))
    if args.json:
        print(json.dumps(regret.as_dict(rows), indent=2))
        return
    console = Console(highlight=False)
    if not rows:
        console.print(
            f"No problem has the times of several engines: {tuning.ENVIRONMENT}={tuning.ALL} "
            "measures them, on a GPU."
        )
        return
    for machine, group in itertools.groupby(rows, lambda row: row.machine):
        found_here = list(group)
        console.print(_regrets(machine, found_here))
        of = regret.Summary.of(found_here)
        for name, mean, worst in (
            ("static", of.static_mean, of.static_worst),
            ("tuned", of.tuned_mean, of.tuned_worst),
        ):
            words = f"geometric mean {mean:.3f}, worst {worst:.3f}, of {of.problems} problems"
            console.print(f"regret {name}: {words}")


def _regrets(machine: str, rows: Sequence[regret.Row]) -> Table:
    table = Table(title=escape(machine), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("problem", overflow="fold")
    for heading in ("fastest", "us", "static", "regret", "tuned", "regret"):
        table.add_column(heading, justify="right" if heading in ("us", "regret") else "left")
    for row in rows:
        table.add_row(
            escape(row.problem), escape(row.best), _microseconds(row.seconds),
            escape(row.static), f"{row.static_regret:.3f}",
            escape(row.tuned), f"{row.tuned_regret:.3f}",
        )  # fmt: skip
    return table


def _export(args: argparse.Namespace) -> None:
    if args.file.exists() and not args.force:
        raise ValueError(f"{args.file} exists; --force replaces it")
    found = _choices(args.machine)
    if not found:
        raise ValueError("there is nothing to export: run a model on a GPU first")
    tuning.export(found, args.file)
    print(f"{_count(found)} written to {args.file}")


def _file(file: Path) -> tuning.Choices:
    try:
        return tuning.load(file)
    except ValueError as error:
        raise ValueError(
            f"{file} is no table of choices: {error}; make one with vovnet-fast tuning "
            "export, on the machine where they were measured"
        ) from error


def _import(args: argparse.Namespace) -> None:
    found = _file(args.file)
    tuning.cache_file()  # To keep them in memory alone would be of no use here.
    table = tuning.table()
    table.add(found, replace=args.replace)
    fate = "replaced" if args.replace else "kept"
    print(f"{_count(found)} added to {table.path}; what it knew already was {fate}")


def _count(choices: tuning.Choices) -> str:
    return f"{sum(map(len, choices.values()))} choices of {len(choices)} machine(s)"
