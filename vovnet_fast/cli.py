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
from rich.markup import escape
from rich.table import Table

from . import __version__, checkpoints, specs, tuning
from .backends import BackendError
from .checkpoints import LAYOUTS, CheckpointError
from .model import VoVNet
from .plan import DTYPES, H200_TBS, H200_TFLOPS, Plan, Rates, Row, plan_forward
from .training_memory import TrainingMemory, training_memory

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
    _add_tuning(commands)
    return parser


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="what a forward pass, or training, costs",
        description="Say what a network costs on images of a size. The mode says what of it.",
        epilog=(
            "examples: vovnet-fast bench --plan V-99-eSE 6x640x1600; "
            "vovnet-fast bench --memory V-99-eSE 6x640x1600 --no-norm-eval"
        ),
    )
    mode = bench.add_mutually_exclusive_group(required=True)
    network = dict(nargs=2, metavar=("SPEC", "NxHxW"))
    mode.add_argument(
        "--plan",
        **network,
        help="count launches, FLOP and bytes of a forward pass, fused and eager, and a floor; "
        "nothing is run or measured, and no GPU is needed",
    )
    mode.add_argument(
        "--memory",
        **network,
        help="count the bytes that autograd keeps for the backward pass, eager and fused, each "
        "without and with recomputing the OSA blocks; no GPU is needed",
    )
    bench.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of activations (default: %(default)s)"
    )
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan = bench.add_argument_group("with --plan")
    plan.add_argument(
        "--peak-tflops",
        type=float,
        metavar="RATE",
        help=f"matrix rate for the floor, 1e12 FLOP/s (default: {H200_TFLOPS:g}, bf16 on an H200)",
    )
    plan.add_argument(
        "--bandwidth-tbs",
        type=float,
        metavar="RATE",
        help=f"memory bandwidth for the floor, 1e12 bytes/s (default: {H200_TBS:g}, an H200)",
    )
    memory = bench.add_argument_group("with --memory")
    memory.add_argument(
        "--norm-eval",
        action=argparse.BooleanOptionalAction,
        help="batch norms keep their statistics, as mmdet's norm_eval has it (default), or take "
        "the batch's",
    )
    memory.add_argument(
        "--measure",
        action="store_true",
        default=None,
        help="run training steps on this machine's GPU as well, and print their peaks",
    )
    bench.set_defaults(run=_bench)


_BENCH_OPTIONS = {
    "plan": {"--peak-tflops": "peak_tflops", "--bandwidth-tbs": "bandwidth_tbs"},
    "memory": {"--norm-eval": "norm_eval", "--measure": "measure"},
}
"""The options that only one mode of ``bench`` has."""


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
    show = actions.add_parser("show", help="list problems and engines by machine")
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
    take = actions.add_parser("import", help="take over the choices of an exported file")
    take.add_argument("file", metavar="FILE", type=Path)
    take.add_argument("--replace", action="store_true", help="also where a choice is known already")
    take.set_defaults(run=_tuning_import)


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
    mode = "plan" if args.memory is None else "memory"
    for other, options in _BENCH_OPTIONS.items():
        for option, name in options.items():
            if other != mode and getattr(args, name) is not None:
                raise ValueError(f"{option} belongs to --{other}, and has no part in --{mode}")
    found = _bench_plan(args) if mode == "plan" else _bench_memory(args)
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    elif isinstance(found, Plan):
        _print_plan(found)
    else:
        _print_memory(found)


def _bench_plan(args: argparse.Namespace) -> Plan:
    spec, shape = args.plan
    rates = Rates(
        H200_TFLOPS if args.peak_tflops is None else args.peak_tflops,
        H200_TBS if args.bandwidth_tbs is None else args.bandwidth_tbs,
    )
    return plan_forward(spec, _parse_shape(shape), dtype=args.dtype, rates=rates)


def _bench_memory(args: argparse.Namespace) -> TrainingMemory:
    spec, shape = args.memory
    return training_memory(
        spec,
        _parse_shape(shape),
        dtype=args.dtype,
        norm_eval=args.norm_eval is not False,
        measure=bool(args.measure),
    )


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


def _print_memory(memory: TrainingMemory) -> None:
    shape = "x".join(map(str, memory.shape))
    norms = "fixed norms" if memory.norm_eval else "norms of the batch"
    table = Table(
        title=f"Kept for the backward pass of {memory.spec}, {shape}, {memory.dtype}, {norms}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("GB", no_wrap=True)
    for row in memory.rows:
        table.add_column(row.mode, justify="right", no_wrap=True)
    for stage in memory.rows[0].stages:
        table.add_row(stage, *(f"{row.stages[stage] / 1e9:.3f}" for row in memory.rows))
    table.add_section()
    kept = [f"{row.kept / 1e9:.3f}" for row in memory.rows]
    table.add_row("total", *kept, style="bold")
    table.add_row("of eager", *(f"{memory.ratio(row):.2f}" for row in memory.rows))
    if memory.device is not None:
        table.add_section()
        peaks = (None if row.peak is None else f"{row.peak / 1e9:.3f}" for row in memory.rows)
        table.add_row("peak", *(peak or "does not fit" for peak in peaks))
    console = Console(highlight=False)
    console.print(table)
    console.print(_memory_caption(memory), style="dim")


def _memory_caption(memory: TrainingMemory) -> str:
    """What the numbers of a table of memory are, and are not."""
    peaks = (
        "nothing has run."
        if memory.device is None
        else f"the peak alone was measured, of a training step on {escape(memory.device)}, "
        "gradients of the parameters included."
    )
    return (
        f"Counted, not measured: {peaks} Images, parameters and buffers are left out, and the "
        "casts of weights that autocast makes; what two stages need counts for the later one. "
        "Images and weights are channels_last. Checkpoint and recompute are with_cp=True: of an "
        "OSA block only the input is kept."
    )


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
        print(json.dumps(found, indent=2, sort_keys=True))
        return
    console = Console(highlight=False)
    if not found:
        console.print("Nothing has been measured yet: run a model on a GPU.")
    for machine, choices in sorted(found.items()):
        table = Table(title=escape(machine), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("problem", overflow="fold")
        table.add_column("engine", no_wrap=True)
        for problem, engine in sorted(choices.items()):
            table.add_row(escape(problem), escape(engine))
        console.print(table)


def _tuning_export(args: argparse.Namespace) -> None:
    if args.file.exists() and not args.force:
        raise ValueError(f"{args.file} exists; --force replaces it")
    found = _tuning_choices(args.machine)
    if not found:
        raise ValueError("there is nothing to export: run a model on a GPU first")
    tuning.export(found, args.file)
    print(f"{_count(found)} written to {args.file}")


def _tuning_import(args: argparse.Namespace) -> None:
    try:
        found = tuning.load(args.file)
    except ValueError as error:
        raise ValueError(
            f"{args.file} is no table of choices: {error}; make one with vovnet-fast tuning "
            "export, on the machine where they were measured"
        ) from error
    table = tuning.table()
    table.add(found, replace=args.replace)
    fate = "replaced" if args.replace else "kept"
    print(f"{_count(found)} added to {table.path}; what it knew already was {fate}")


def _count(choices: tuning.Choices) -> str:
    return f"{sum(map(len, choices.values()))} choices of {len(choices)} machine(s)"


if __name__ == "__main__":
    sys.exit(main())
