"""The ``vovnet-fast`` command."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import checkpoints, specs, tuning
from .._version import __version__
from ..backends import BackendError
from ..checkpoints import LAYOUTS, CheckpointError
from ..deploy.export import ExportError
from ..network.model import VoVNet
from . import doctor, explain, export, regret
from .bench import command as bench
from .compile import command as compiling

_REPORTED = (
    BackendError,
    CheckpointError,
    ExportError,
    specs.UnknownSpecError,
    OSError,
    ValueError,
)
_SAFE_ENDINGS = (".pth", ".pt", ".bin", ".safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after the command's name; the process's own by default.

    Returns:
        the exit status: 0, or 1 after an error that was reported, and where ``doctor`` found
        something wrong.
    """
    args = _parser().parse_args(argv)
    try:
        status: int | None = args.run(args)
    except _REPORTED as error:
        Console(stderr=True).print(f"[bold red]vovnet-fast {args.command}:[/] ", end="")
        print(error, file=sys.stderr)
        return 1
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vovnet-fast", description="Tools for VoVNet backbones.")
    parser.add_argument("--version", action="version", version=f"vovnet-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = commands.add_parser(
        "convert",
        help="rename a checkpoint's backbone between key layouts",
        description=(
            "Take the VoVNet backbone out of a checkpoint, check that it is complete, and write "
            "it under another layout's keys. Heads and necks are left out. The layout, the "
            "prefix and the architecture are recognised unless given."
        ),
        epilog=(
            "example: vovnet-fast convert ese_vovnet19b_dw.safetensors v19-dw.pth "
            "--spec V-19-dw-eSE --from timm --to detectron2"
        ),
    )
    convert.add_argument("src", metavar="SRC", help="a file or an http(s) address")
    convert.add_argument(
        "dst", metavar="DST", type=Path, help=f"file to write ({', '.join(_SAFE_ENDINGS)})"
    )
    convert.add_argument("--spec", help="architecture (see: vovnet-fast specs)")
    convert.add_argument("--from", dest="layout", choices=LAYOUTS, help="layout of SRC")
    convert.add_argument(
        "--to", choices=LAYOUTS, default="native", help="layout of DST (default: %(default)s)"
    )
    convert.add_argument("--prefix", help="what stands before the backbone's keys in SRC")
    convert.add_argument(
        "--add-prefix", default="", metavar="PREFIX", help="what to put before them in DST"
    )
    convert.add_argument("--force", action="store_true", help="replace DST if it exists")
    convert.set_defaults(run=_convert)

    listing = commands.add_parser(
        "specs",
        help="list the architectures",
        description="List every published architecture with its widths and size.",
    )
    listing.add_argument("names", nargs="*", metavar="NAME", help="only these")
    listing.set_defaults(run=_specs)

    export.add(commands)
    bench.add(commands)
    compiling.add(commands)
    explain.add(commands)
    _add_tuning(commands)
    _add_doctor(commands)
    return parser


def _add_tuning(commands: argparse._SubParsersAction) -> None:
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
    show.set_defaults(run=_tuning_show)
    export = actions.add_parser("export", help="write the choices to a file")
    export.add_argument("file", metavar="FILE", type=Path)
    export.add_argument("--force", action="store_true", help="replace FILE if it exists")
    export.set_defaults(run=_tuning_export)
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
    regrets.set_defaults(run=_tuning_regret)
    take = actions.add_parser("import", help="take over the choices of an exported file")
    take.add_argument("file", metavar="FILE", type=Path)
    take.add_argument("--replace", action="store_true", help="also where a choice is known already")
    take.set_defaults(run=_tuning_import)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "doctor",
        help="what is installed, what of it is used, and whether it computes right numbers",
        description=(
            "Print what vovnet_fast finds: versions, GPUs, the extension and how it was built, "
            "every backend or why it cannot run; then run every function of the backends that "
            "can run on small tensors, and compare with fp64. The exit status is 1 if one of "
            "them computes wrong numbers, or if something does not go together: packages of "
            "OpenMMLab's, or what --config says."
        ),
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--config",
        metavar="FILE",
        help="look at a training config too: backbone, neck, init_cfg, load_from (it is run)",
    )
    command.add_argument(
        "--no-self-test",
        dest="self_test",
        action="store_false",
        help="only look, compute nothing; on a GPU the self-test may take minutes",
    )
    command.set_defaults(run=_doctor)


def _convert(args: argparse.Namespace) -> None:
    if args.dst.suffix not in _SAFE_ENDINGS:
        raise ValueError(f"DST must end in {', '.join(_SAFE_ENDINGS)}, got {args.dst}")
    if args.dst.exists() and not args.force:
        raise ValueError(f"{args.dst} exists; --force replaces it")
    if args.spec is not None:
        specs.get(args.spec)  # Before a long download.
    state_dict = checkpoints.read(args.src, mmap=True)
    spec = args.spec
    if spec is None:
        fitting = checkpoints.identify(state_dict, layout=args.layout, prefix=args.prefix)
        if not fitting:
            raise CheckpointError(
                f"{args.src} fits none of the published architectures; --spec NAME says what is "
                "amiss with one of them"
            )
        spec = fitting[0]
    converted, report = checkpoints.convert_with_report(
        state_dict,
        spec,
        args.to,
        layout=args.layout,
        prefix=args.prefix,
        add_prefix=args.add_prefix,
    )
    checkpoints.write(converted, args.dst)
    _print_report(args, converted, report)


def _print_report(args: argparse.Namespace, converted: dict, report: checkpoints.Report) -> None:
    table = Table(title=str(args.dst), title_justify="left", show_header=False)
    table.add_row("architecture", report.spec)
    table.add_row("keys", f"{report.layout} -> {args.to}")
    table.add_row("prefix", f"{report.prefix or 'none'} -> {args.add_prefix or 'none'}")
    table.add_row("tensors", f"{len(converted)} written, {report.tensors} found")
    table.add_row("values", f"{report.parameters:,}")
    left_out = ", ".join(report.ignored[:3]) + (", ..." if len(report.ignored) > 3 else "")
    table.add_row("left out", f"{len(report.ignored)} {f'({left_out})' if left_out else ''}")
    Console().print(table)


def _specs(args: argparse.Namespace) -> None:
    table = Table(title="VoVNet architectures", box=box.SIMPLE_HEAD, padding=0)
    for header in ("name", "dialect", "layers", "blocks", "C_out", "eSE"):
        table.add_column(header, no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for spec in [specs.get(name) for name in args.names] or list(specs.SPECS.values()):
        table.add_row(
            spec.name,
            spec.dialect,
            f"{spec.layers_per_block}{' dw' if spec.depthwise else ''}",
            "-".join(map(str, spec.blocks_per_stage)),
            f"{spec.out_channels[0]}-{spec.out_channels[-1]}",
            spec.ese,
            f"{_count_parameters(spec):,}",
        )
    Console().print(table)


def _count_parameters(spec: specs.VoVNetSpec) -> int:
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in VoVNet(spec).parameters())


def _tuning_choices(text: str) -> tuning.Choices:
    """What is known of the machines whose name contains ``text``."""
    known = tuning.table().choices()
    found = {machine: choices for machine, choices in known.items() if text in machine}
    if text and not found:
        raise ValueError(
            f"no machine's name contains {text!r}; known are: {', '.join(sorted(known)) or 'none'}"
        )
    return found


def _tuning_show(args: argparse.Namespace) -> None:
    found = _tuning_choices(args.machine)
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


def _tuning_regret(args: argparse.Namespace) -> None:
    found = tuning.table().choices() if not args.files else {}
    for file in args.files:
        found = tuning.merge(found, _tuning_file(file))
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


def _tuning_export(args: argparse.Namespace) -> None:
    if args.file.exists() and not args.force:
        raise ValueError(f"{args.file} exists; --force replaces it")
    found = _tuning_choices(args.machine)
    if not found:
        raise ValueError("there is nothing to export: run a model on a GPU first")
    tuning.export(found, args.file)
    print(f"{_count(found)} written to {args.file}")


def _tuning_file(file: Path) -> tuning.Choices:
    try:
        return tuning.load(file)
    except ValueError as error:
        raise ValueError(
            f"{file} is no table of choices: {error}; make one with vovnet-fast tuning "
            "export, on the machine where they were measured"
        ) from error


def _tuning_import(args: argparse.Namespace) -> None:
    found = _tuning_file(args.file)
    tuning.cache_file()  # To keep them in memory alone would be of no use here.
    table = tuning.table()
    table.add(found, replace=args.replace)
    fate = "replaced" if args.replace else "kept"
    print(f"{_count(found)} added to {table.path}; what it knew already was {fate}")


def _doctor(args: argparse.Namespace) -> int:
    report = doctor.examine(self_test=args.self_test, config=args.config)
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print_doctor(report)
    return 0 if report.healthy else 1


def _print_doctor(report: doctor.Report) -> None:
    table = Table(title="vovnet_fast", title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = [(fact.section, fact.name, fact.value, "") for fact in report.facts]
    for check in report.checks:
        section = f"self-test of {check.backend} on {check.device}"
        rows.append((section, check.function, str(check), "" if check.passed else "red"))
    for section, found in itertools.groupby(rows, lambda row: row[0]):
        table.add_row(f"[bold]{escape(section)}[/]")
        for _, name, value, style in found:
            table.add_row(f"  {escape(name)}", escape(value), style=style)
        table.add_section()
    console = Console(highlight=False)
    console.print(table)
    if report.checks:
        failed = sum(not check.passed for check in report.checks)
        console.print(
            f"[bold red]{failed} of {len(report.checks)} functions compute wrong numbers.[/]"
            if failed
            else f"All {len(report.checks)} functions of the usable backends are right."
        )
    for problem in report.problems:
        console.print(f"[bold red]This does not go together:[/] {escape(problem)}")


def _count(choices: tuning.Choices) -> str:
    return f"{sum(map(len, choices.values()))} choices of {len(choices)} machine(s)"


if __name__ == "__main__":
    sys.exit(main())
