"""``vovnet-fast convert``: a checkpoint's backbone under another layout's keys."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import checkpoints, specs
from ..checkpoints import LAYOUTS
from .sources import recognised

_ENDINGS = (".pth", ".pt", ".bin", ".safetensors")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of ``vovnet-fast``."""
    command = commands.add_parser(
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
    command.add_argument("src", metavar="SRC", help="a file or an http(s) address")
    command.add_argument(
        "dst", metavar="DST", type=Path, help=f"file to write ({', '.join(_ENDINGS)})"
    )
    command.add_argument("--spec", help="architecture (see: vovnet-fast specs)")
    command.add_argument("--from", dest="layout", choices=LAYOUTS, help="layout of SRC")
    command.add_argument(
        "--to", choices=LAYOUTS, default="native", help="layout of DST (default: %(default)s)"
    )
    command.add_argument("--prefix", help="what stands before the backbone's keys in SRC")
    command.add_argument(
        "--add-prefix", default="", metavar="PREFIX", help="what to put before them in DST"
    )
    command.add_argument("--force", action="store_true", help="replace DST if it exists")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.dst.suffix not in _ENDINGS:
        raise ValueError(f"DST must end in {', '.join(_ENDINGS)}, got {args.dst}")
    if args.dst.exists() and not args.force:
        raise ValueError(f"{args.dst} exists; --force replaces it")
    if args.spec is not None:
        specs.get(args.spec)  # Before a long download.
    state_dict = checkpoints.read(args.src, mmap=True)
    spec = args.spec
    if spec is None:
        spec = recognised(args.src, state_dict, layout=args.layout, prefix=args.prefix)
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
