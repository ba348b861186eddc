"""``vovnet-fast bench``: its options, and the tables that it prints."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ... import backends
from ..memory import TrainingMemory, training_memory
from ..plan import DTYPES, H200_TBS, H200_TFLOPS, Plan, Rates, Row, plan_forward
from . import heap, quick, report
from .rows import EAGER, device_name
from .stopwatch import Interval


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of ``vovnet-fast``."""
    bench = commands.add_parser(
        "bench",
        help="what a network costs: measured here, or counted",
        description=(
            "Measure a network on this machine, in inference and in training, against plain "
            "PyTorch, in about a minute; the first time on a GPU, kernels are compiled and "
            "checked before. With --plan or --memory, count what it costs on any machine."
        ),
        epilog=(
            "examples: vovnet-fast bench; vovnet-fast bench --spec V-99-eSE --shape 6x320x800; "
            "vovnet-fast bench --plan V-99-eSE 6x640x1600; "
            "vovnet-fast bench --memory V-99-eSE 6x640x1600 --no-norm-eval; "
            "vovnet-fast bench report rows.json -o report"
        ),
    )
    _add_report(bench)
    mode = bench.add_mutually_exclusive_group()
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
        "--dtype", choices=DTYPES, help="of activations (default: bf16; measured on a CPU: fp32)"
    )
    bench.add_argument(
        "--json",
        nargs="?",
        const=_PRINT,
        metavar="FILE",
        help="write what was measured to FILE, as pytest-benchmark does; with --plan or --memory "
        "and without FILE, print JSON instead of a table",
    )
    measured = bench.add_argument_group("without a mode")
    measured.add_argument("--spec", help=f"architecture (default: {quick.SPEC})")
    measured.add_argument(
        "--shape",
        metavar="NxHxW",
        help="images by height by width (default: 1x800x1344 on a GPU, 1x224x224 on a CPU)",
    )
    measured.add_argument(
        "--backend",
        choices=("auto", *(name for name in backends.NAMES if name != "reference")),
        help="of this library (default: auto, what a user gets)",
    )
    measured.add_argument(
        "--train",
        action=argparse.BooleanOptionalAction,
        help="measure a training step too (default)",
    )
    measured.add_argument("--threads", type=int, metavar="N", help="of the CPU")
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


def _add_report(bench: argparse.ArgumentParser) -> None:
    actions = bench.add_subparsers(dest="action", metavar="ACTION")
    command = actions.add_parser(
        "report",
        help="make tables and pictures of measured rows",
        description=(
            "Write report.md and PNG pictures of what pytest benchmarks/ --benchmark-json=FILE, "
            "or vovnet-fast bench --json FILE, measured. Rows of different machines, versions or "
            "commits get a section each."
        ),
    )
    command.add_argument("files", nargs="+", metavar="FILE", type=Path)
    command.add_argument(
        "-o", "--out", type=Path, metavar="FOLDER", default=Path("report"),
        help="where it goes (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--title", default="Benchmarks", help="(default: %(default)s)")
    command.set_defaults(run=_report)


_PRINT = "-"
"""``--json`` without a file."""

_OPTIONS = {
    "plan": {"--peak-tflops": "peak_tflops", "--bandwidth-tbs": "bandwidth_tbs"},
    "memory": {"--norm-eval": "norm_eval", "--measure": "measure"},
    "measuring": {
        "--spec": "spec",
        "--shape": "shape",
        "--backend": "backend",
        "--train": "train",
        "--threads": "threads",
    },
}
"""The options that only one mode has."""


def _bench(args: argparse.Namespace) -> None:
    mode = next((name for name in ("plan", "memory") if getattr(args, name)), "measuring")
    for other, options in _OPTIONS.items():
        for option, name in options.items():
            if other != mode and getattr(args, name) is not None:
                raise ValueError(f"{option} belongs to {_named(other)}, not to {_named(mode)}")
    if mode == "measuring":
        _bench_here(args)
        return
    found = _bench_plan(args) if mode == "plan" else _bench_memory(args)
    if args.json:
        text = json.dumps(found.as_dict(), indent=2)
        if args.json == _PRINT:
            print(text)
        else:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    elif isinstance(found, Plan):
        _print_plan(found)
    else:
        _print_memory(found)


def _named(mode: str) -> str:
    return "measuring, which needs no mode" if mode == "measuring" else f"--{mode}"


def _report(args: argparse.Namespace) -> None:
    for path in report.write(args.files, args.out, args.title):
        print(path)


def _bench_here(args: argparse.Namespace) -> None:
    """Measure, with a progress bar on the terminal, and print a table."""
    if args.json == _PRINT:
        raise ValueError("--json needs a FILE where something is measured")
    if args.json and not Path(args.json).absolute().parent.is_dir():  # Before a minute's work.
        raise ValueError(f"--json: {args.json} cannot be written, its folder does not exist")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    options = quick.Options.here(
        args.spec,
        None if args.shape is None else parse_shape(args.shape),
        args.dtype,
        backend=args.backend or "auto",
        train=args.train is not False,
    )
    kept = heap.keep() if options.device.type == "cpu" else None
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        found = quick.measure(
            options,
            lambda what, done: bar.update(task, description=escape(what), completed=done),
        )
    if kept is not None:
        found.provenance["heap"] = kept
    if args.json:
        found.write(Path(args.json))
    _print_found(found)


def _print_found(found: quick.Found) -> None:
    options = found.options
    table = Table(
        title=f"{options.spec}, {options.images}, {options.dtype}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    peaks = any("peak_mib" in row for row in found.rows)
    for header in ("ms", "10 to 90 %", "against eager", *(["peak MiB"] if peaks else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for kind in dict.fromkeys(row["kind"] for row in found.rows):
        table.add_section()
        table.add_row("training step" if kind == "training" else kind, style="bold")
        for row in found.rows:
            if row["kind"] == kind:
                table.add_row(*_found_cells(row, peaks))
    console = Console(highlight=False)
    console.print(escape(device_name(found.provenance)))
    console.print(table)
    console.print(escape(_found_caption(found)), style="dim")


def _found_cells(row: dict[str, Any], peaks: bool) -> list[str]:
    cells = [
        f"  {row['provider']}",
        f"{row['device_ms']:.4g}",
        f"{row['device_ms_p10']:.4g} to {row['device_ms_p90']:.4g}",
        "1" if row["provider"] == EAGER else Interval.of(row).text(),
    ]
    return [*cells, f"{row['peak_mib']:,.0f}"] if peaks else cells


def _found_caption(found: quick.Found) -> str:
    """What the numbers are, and are not."""
    ours = any(row["backend"] for row in found.rows)
    kernels = (
        ""
        if ours
        else (
            "No kernels of this library run here, so that it is plain PyTorch, which freeze folds: "
            "vovnet-fast doctor says why. "
        )
    )
    known = found.provenance
    load = known["clocks"].get("load", {}).get("most", 0.0)
    busy = (
        f"Others were at work too: up to {load:.1f} processes for {known['cores']} cores. "
        if load > known["cores"] + 0.5 else ""
    )  # fmt: skip
    return (
        f"{kernels}{busy}Medians, everybody in turn; eager is channels_last. Against eager: its "
        "time over this one's, above 1 is faster, in an interval of at least 95 %. Peers that take "
        "minutes to build are in benchmarks/, torch.compile above all. "
        f"torch {known['torch']}, commit {known['commit']}"
        f"{', with local changes' if known['dirty'] else ''}."
    )


def _bench_plan(args: argparse.Namespace) -> Plan:
    spec, shape = args.plan
    rates = Rates(
        H200_TFLOPS if args.peak_tflops is None else args.peak_tflops,
        H200_TBS if args.bandwidth_tbs is None else args.bandwidth_tbs,
    )
    return plan_forward(spec, parse_shape(shape), dtype=args.dtype or "bf16", rates=rates)


def _bench_memory(args: argparse.Namespace) -> TrainingMemory:
    spec, shape = args.memory
    return training_memory(
        spec,
        parse_shape(shape),
        dtype=args.dtype or "bf16",
        norm_eval=args.norm_eval is not False,
        measure=bool(args.measure),
    )


def parse_shape(text: str) -> tuple[int, int, int]:
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
