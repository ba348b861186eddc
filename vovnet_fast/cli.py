"""The ``vovnet-fast`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from . import __version__, checkpoints, specs
from .checkpoints import LAYOUTS, CheckpointError
from .model import VoVNet

_SAFE_ENDINGS = (".pth", ".pt", ".bin", ".safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after the command's name; the process's own by default.

    Returns:
        the exit status: 0, or 1 after an error that was reported.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (CheckpointError, specs.UnknownSpecError, OSError, ValueError) as error:
        Console(stderr=True).print(f"[bold red]vovnet-fast {args.command}:[/] ", end="")
        print(error, file=sys.stderr)
        return 1
    return 0


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
    return parser


def _convert(args: argparse.Namespace) -> None:
    if args.dst.suffix not in _SAFE_ENDINGS:
        raise ValueError(f"DST must end in {', '.join(_SAFE_ENDINGS)}, got {args.dst}")
    if args.dst.exists() and not args.force:
        raise ValueError(f"{args.dst} exists; --force replaces it")
    if args.spec is not None:
        specs.get(args.spec)  # Before a long download.
    state_dict = checkpoints.read(args.src)
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


if __name__ == "__main__":
    sys.exit(main())
