"""The ``vovnet-fast`` command."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import specs
from .._version import __version__
from ..backends import BackendError
from ..checkpoints import CheckpointError
from ..deploy.export import ExportError
from ..network.model import VoVNet
from . import classify, convert, doctor, explain, export, quantize, tuning
from .bench import command as bench
from .compile import command as compiling

_REPORTED = (
    *(BackendError, CheckpointError, ExportError),
    *(specs.UnknownSpecError, OSError, ValueError),
)


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

    convert.add(commands)
    listing = commands.add_parser(
        "specs",
        help="list the architectures",
        description="List every published architecture with its widths and size.",
    )
    listing.add_argument("names", nargs="*", metavar="NAME", help="only these")
    listing.set_defaults(run=_specs)

    export.add(commands)
    quantize.add(commands)
    bench.add(commands)
    compiling.add(commands)
    explain.add(commands)
    classify.add(commands)
    tuning.add(commands)
    _add_doctor(commands)
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
