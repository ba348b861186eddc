"""The ``vovnet-fast`` command."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from . import __version__, checkpoints, specs
from .backends import BackendError
from .checkpoints import LAYOUTS, CheckpointError
from .model import VoVNet
from .plan import DTYPES, H200_TBS, H200_TFLOPS, Plan, Rates, Row, plan_forward

_REPORTED = (BackendError, CheckpointError, specs.UnknownSpecError, OSError, ValueError)
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
    except _REPORTED as error:
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

    _add_bench(commands)
    return parser


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="what a forward pass costs",
        description="Say what a forward pass costs. The mode says how.",
        epilog="example: vovnet-fast bench --plan V-99-eSE 6x640x1600",
    )
    mode = bench.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--plan",
        nargs=2,
        metavar=("SPEC", "NxHxW"),
        help="count launches, FLOP and bytes, fused and eager, and a floor; nothing is run or "
        "measured, and no GPU is needed",
    )
    bench.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of activations (default: %(default)s)"
    )
    bench.add_argument(
        "--peak-tflops",
        type=float,
        default=H200_TFLOPS,
        metavar="RATE",
        help="matrix rate for the floor, 1e12 FLOP/s (default: %(default)g, bf16 on an H200)",
    )
    bench.add_argument(
        "--bandwidth-tbs",
        type=float,
        default=H200_TBS,
        metavar="RATE",
        help="memory bandwidth for the floor, 1e12 bytes/s (default: %(default)g, an H200)",
    )
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(run=_bench)


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


def _bench(args: argparse.Namespace) -> None:
    spec, shape = args.plan
    rates = Rates(args.peak_tflops, args.bandwidth_tbs)
    plan = plan_forward(spec, _parse_shape(shape), dtype=args.dtype, rates=rates)
    if args.json:
        print(json.dumps(plan.as_dict(), indent=2))
    else:
        _print_plan(plan)


def _parse_shape(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise ValueError(
            f"an input is written NxHxW, images by height by width, as in 6x640x1600; got {text!r}"
        )
    batch, height, width = map(int, match.groups())
    return batch, height, width


def _print_plan(plan: Plan) -> None:
    shape = "x".join(map(str, plan.shape))
    table = Table(
        title=f"Forward pass of {plan.spec}, {shape}, {plan.dtype}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("kind of launch", no_wrap=True)
    for header in ("launches", "GFLOP", "GB read", "written", "total", "floor ms"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, tally in (("fused", plan.fused), ("eager", plan.eager)):
        for row in tally.rows:
            table.add_row(*_cells(row.kind, row))
        table.add_row(*_cells(f"{name}, total", tally.total), style="bold", end_section=True)
    console = Console(highlight=False)
    console.print(table)
    fused, eager = plan.fused.total, plan.eager.total
    ratios = (
        ("launches", fused.launches / eager.launches),
        ("bytes", fused.bytes_moved / eager.bytes_moved),
        ("floor", fused.floor_seconds / eager.floor_seconds),
    )
    console.print("fused : eager  " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios))
    console.print(_caption(plan), style="dim")


def _cells(name: str, row: Row) -> list[str]:
    numbers = [row.flop / 1e9]
    numbers += [count / 1e9 for count in (row.bytes_read, row.bytes_written, row.bytes_moved)]
    numbers.append(row.floor_seconds * 1e3)
    # Large inputs must fit into a terminal too.
    return [name, str(row.launches), *(f"{x:.3f}" if x < 1000 else f"{x:,.0f}" for x in numbers)]


def _caption(plan: Plan) -> str:
    """What the numbers of a plan are, and are not."""
    rates = plan.rates
    source = ", both measured on an H200" if rates == Rates() else ""
    if plan.dtype == "fp32" and rates.tflops == H200_TFLOPS:
        source += f"; {rates.tflops:g} is a bf16 rate, so for fp32 the floor is too low"
    return (
        "Counted, not measured: nothing has run. The floor is a bound: for each launch the longer "
        f"of FLOP at {rates.tflops:g} TFLOP/s and bytes at {rates.tbs:g} TB/s{source}. Each "
        "operand of a launch counts once, as if no cache kept it between launches; halos and "
        "workspaces are left out. In eager, an ATen operation is one launch. Fused, batch norms "
        "have been folded before."
    )


if __name__ == "__main__":
    sys.exit(main())
