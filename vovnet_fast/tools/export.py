"""``vovnet-fast export``: a network as an ONNX file, compared with PyTorch before it is there."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..deploy import export, file
from ..deploy.file import load_frozen
from ..deploy.freeze import FrozenVoVNet
from ..deploy.onnx_graph import AXES
from ..network.model import VoVNet
from ..quantization import export as quantized_export
from ..quantization import file as quantized_file
from ..quantization.file import load_quantized
from . import sources
from .bench.command import parse_shape

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of ``vovnet-fast``."""
    command = commands.add_parser(
        "export",
        help="write a backbone to an ONNX file",
        description=(
            "Write a VoVNet backbone to an ONNX file that TensorRT and onnxruntime read: batch "
            "norms folded into the convolutions, one node for each thing the network does, no "
            "others. The input is called image, [N, C, H, W]; the outputs are called stage2 to "
            "stage5, or as --features says. onnxruntime runs it before it is put in place, and its "
            "features are compared with PyTorch's: a file that differs is not left behind. Of a "
            "network in int8 or fp8 (vovnet-fast quantize) it has QuantizeLinear and "
            "DequantizeLinear nodes, and is compared with that network."
        ),
        epilog=(
            "examples: vovnet-fast export v99.pth v99.onnx --size 6x640x1600 --features "
            "stage4,stage5; vovnet-fast export V-39-eSE v39.onnx --size 1x640x640 --dynamic "
            "batch,height,width; trtexec --onnx=v39.onnx --fp16 --minShapes=image:1x3x320x320 "
            "--optShapes=image:1x3x640x640 --maxShapes=image:8x3x1280x1280"
        ),
    )
    command.add_argument(
        "source",
        metavar="SPEC|CHECKPOINT",
        help=f"{sources.CHECKPOINT}, or what FrozenVoVNet.save or vovnet-fast "
        f"quantize wrote; or {sources.SPEC}",
    )
    command.add_argument("dst", metavar="OUT", type=Path, help="file to write (.onnx)")
    command.add_argument(
        "--size",
        required=True,
        metavar="NxHxW",
        help="images by height by width, as in 6x640x1600; what is not dynamic is this for ever",
    )
    command.add_argument(
        "--dynamic",
        default="",
        metavar="AXES",
        help=f"what is free in the file: {','.join(AXES)}, or some of them (default: nothing)",
    )
    command.add_argument(
        "--opset",
        type=int,
        help=f"of ONNX (default: {export.OPSET}, which TensorRT 8.6 and 10 read; of a network in "
        "fp8 19)",
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="of weights and activations (default: %(default)s, of which trtexec --fp16 makes what "
        "is fastest)",
    )
    command.add_argument(
        "--io", choices=DTYPES, help="dtype of images and features (default: that of --dtype)"
    )
    sources.add_options(command, "of a frozen or quantised network those that it has")
    command.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare with onnxruntime"
    )
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    sources.require_target(args, ".onnx")
    if sources.kind(args.source) == quantized_file.KIND:
        _export_quantized(args)
        return
    size, dynamic = parse_shape(args.size), sources.words(args.dynamic)
    opset = export.OPSET if args.opset is None else args.opset
    io = None if args.io is None else DTYPES[args.io]
    export.require(size, dynamic, opset, DTYPES[args.dtype], io, check=args.check)
    with Console(stderr=True).status("reading the weights") as status:
        model, what = _source(args)
        report = export.onnx(
            model,
            args.dst,
            size,
            dynamic=dynamic,
            opset=opset,
            dtype=DTYPES[args.dtype],
            io_dtype=io,
            check=args.check,
            told=lambda text: status.update(escape(text)),
        )
    _print_report(args, report, what)


def _export_quantized(args: argparse.Namespace) -> None:
    sources.refuse_options(args, "a quantised network", "quantise the model again")
    if args.dtype != "fp32" or args.io is not None:
        raise ValueError(
            f"--dtype and --io are of networks in floating point, and {args.source} holds one in "
            "eight bits, whose images and features are fp32"
        )
    network = load_quantized(args.source)
    with Console(stderr=True).status("reading the weights") as status:
        report = quantized_export.onnx(
            network,
            args.dst,
            parse_shape(args.size),
            dynamic=sources.words(args.dynamic),
            opset=args.opset,
            check=args.check,
            told=lambda text: status.update(escape(text)),
        )
    console = Console(highlight=False)
    console.print(
        _table(
            args, report, f"{network.spec.name}, {network.dtype}", f"{network.dtype}, fp32 outside"
        )
    )
    numbers = {"int8": "the integers"}.get(network.dtype, "numbers of e4m3")
    if not report.checks:
        console.print(f"[bold]Not compared with {numbers}[/] (--no-check).")
        return
    table = _checks(f"onnxruntime against {numbers}", "dB", "steps", "optimised, dB")
    for check in report.checks:
        table.add_row(
            "x".join(map(str, check.size)), check.feature,
            f"{check.sqnr:.1f}", f"{check.steps:.2f}",
            f"{check.optimised:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"Given the same inputs no activation differs by more than {report.steps:.3g} steps. What "
        "is above is carried on from layer to layer; optimised is onnxruntime's default."
    )


def _source(args: argparse.Namespace) -> tuple[VoVNet | FrozenVoVNet, str]:
    """The network, and what is said of it."""
    if sources.kind(args.source) != file.KIND:
        found = sources.model(args)
        return found.model, found.what
    sources.refuse_options(args, "a frozen network", "freeze the model again")
    frozen = load_frozen(args.source, graph=False)
    return frozen, f"{frozen.spec.name}, frozen in {frozen.dtype}"


# --------------------------------------------------------------------------------------
# What is printed
# --------------------------------------------------------------------------------------


def _print_report(args: argparse.Namespace, report: export.Report, what: str) -> None:
    console = Console(highlight=False)
    dtype = args.dtype if args.io in (None, args.dtype) else f"{args.dtype}, {args.io} outside"
    console.print(_table(args, report, what, dtype))
    if not report.checks:
        console.print("[bold]Not compared with PyTorch[/] (--no-check).")
        return
    table = _checks(
        "onnxruntime against PyTorch", "largest error", "of the largest value", "allowed"
    )
    for check in report.checks:
        table.add_row(
            "x".join(map(str, check.size)),
            check.feature,
            f"{check.absolute:.2e}",
            f"{check.relative:.2e}",
            f"{check.allowed:.1e}",
        )
    console.print(table)
    if report.largest is not None:
        console.print(f"The largest value on the way was {report.largest:.4g}; fp16 ends at 65504.")


def _table(
    args: argparse.Namespace,
    report: export.Report | quantized_export.Report,
    what: str,
    dtype: str,
) -> Table:
    table = Table(title=str(args.dst), title_justify="left", show_header=False)
    table.add_row("network", escape(what))
    table.add_row("nodes", ", ".join(f"{n} {kind}" for kind, n in report.nodes.items()))
    table.add_row("opset", str(report.opset))
    table.add_row("dtype", dtype)
    table.add_row("dynamic", args.dynamic or "nothing")
    table.add_row("size", f"{report.nbytes / 1e6:.1f} MB")
    return table


def _checks(title: str, *numbers: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("images", "feature"):
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
