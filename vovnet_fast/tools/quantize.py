"""``vovnet-fast quantize``: a network in eight bits, calibrated on a folder of images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import _optional
from ..arithmetic import DTYPES, LEVELS, fp8
from ..quantization import formats
from ..quantization.network import QuantizedVoVNet
from ..quantization.quantize import AUTO, STEMS, quantize
from ..quantization.ranges import CALIBRATORS
from . import images, sources

FEW = 8
"""Images; with fewer than these it is said that they are few."""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of ``vovnet-fast``."""
    command = commands.add_parser(
        "quantize",
        help="write a backbone in int8 or fp8, calibrated on images",
        description=(
            "Make a network in eight bits of a VoVNet backbone: batch norms are folded, the ranges "
            "of activations are measured on images of a folder, weights are rounded. OUT is what "
            "vovnet_fast.load_quantized reads, VoVNetFastQuantized in mmdet, and "
            "vovnet-fast export, which makes an ONNX file of it. What it costs is measured on the "
            "first images: the signal-to-noise ratio (SQNR) of the features against fp32."
        ),
        epilog=(
            "examples: vovnet-fast quantize vovnet39_ese_detectron2.pth v39.safetensors --images "
            "val2017 --size 800x1344; vovnet-fast quantize petr_v99.pth v99.safetensors --images "
            "samples/CAM_FRONT --size 640x1600 --features stage4,stage5 --mean "
            "103.53,116.28,123.675 --std 57.375,57.12,58.395 --no-to-rgb --report v99.png"
        ),
    )
    command.add_argument(
        "source",
        metavar="SPEC|CHECKPOINT",
        help=f"{sources.CHECKPOINT}; or {sources.SPEC}",
    )
    command.add_argument("dst", metavar="OUT", type=Path, help="file to write (.safetensors)")
    images.add_options(command)
    command.add_argument(
        "--dtype", choices=DTYPES, default="int8", help="fp8 is e4m3 (default: %(default)s)"
    )
    command.add_argument(
        "--calibrator",
        choices=(AUTO, *CALIBRATORS),
        default=AUTO,
        help="how ranges of activations are chosen; auto compares mse and minmax (default: "
        "%(default)s)",
    )
    command.add_argument(
        "--percentile",
        type=float,
        default=99.99,
        help="of that calibrator: how many values of a hundred are not cut (default: %(default)s)",
    )
    command.add_argument(
        "--levels",
        type=int,
        choices=LEVELS,
        help="the largest activation of int8 (default: 127, which every processor multiplies "
        "exactly, and TensorRT wants; 255 halves the error)",
    )
    command.add_argument(
        "--stem",
        choices=STEMS,
        default="auto",
        help="of images and the first layer's weights: eight bits, or more where that is better "
        "(default: %(default)s; more is fp32 in an ONNX file)",
    )
    command.add_argument(
        "--equalize", action="store_true", help="give the channels of activations like ranges first"
    )
    command.add_argument(
        "--no-bias-correction",
        dest="bias_correction",
        action="store_false",
        help="leave biases as they are, by which rounding moves means",
    )
    command.add_argument(
        "--report",
        metavar="PNG",
        type=Path,
        help="print the SQNR of every activation, and draw it into this file",
    )
    command.add_argument(
        "--device", default="cpu", help="where to calibrate (default: %(default)s)"
    )
    sources.add_options(command)
    command.add_argument("--force", action="store_true", help="replace OUT and PNG if they exist")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    _require(args)
    device = sources.device(args.device)
    console = Console(highlight=False)
    with Console(stderr=True).status("reading the weights"):
        found = sources.model(args)
    how = images.normalisation(args, found)
    folder = images.Images(args, found.model, how)
    if len(folder.files) < FEW:
        print(
            f"Images to calibrate on: {len(folder.files)}. What they do not show is cut: some "
            "dozens are better.",
            file=sys.stderr,
        )
    status = Console(stderr=True).status("")

    def told(text: str) -> None:
        status.update(text)
        status.start()  # Not before the bar of the images has ended: there is one at a time.

    try:
        quantized = quantize(
            found.model.to(device).eval(),
            folder,
            args.dtype,
            args.calibrator,
            levels=args.levels,
            percentile=args.percentile,
            stem=args.stem,
            equalize=args.equalize,
            bias_correction=args.bias_correction,
            told=told,
        )
    finally:
        status.stop()
    quantized.save(args.dst)
    report = quantized.report()
    if args.report is not None:
        print(report)
        report.plot(args.report)
    console.print(_table(args, found.what, folder, how, quantized))
    worst = min(report.features, key=lambda row: row.sqnr)
    megabytes = args.dst.stat().st_size / 1e6
    print(f"least SQNR {worst.sqnr:.1f} dB ({worst.name}), {megabytes:.1f} MB in {args.dst}")


def _require(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read."""
    sources.require_target(args, ".safetensors")
    if args.dtype == "fp8":
        reason = fp8.why_not()
        if reason is not None:
            raise ValueError(f"--dtype fp8 is not to be had: {reason}")
    formats.require(args.dtype, args.levels)
    images.require(args)
    if args.report is not None:
        sources.require_target(args, ".png", args.report, "PNG")
        reason = _optional.why_not("matplotlib")
        if reason is not None:
            raise ValueError(f"--report draws with matplotlib: {reason}")
    made = sources.kind(args.source)
    if made is not None:
        raise ValueError(
            f"{args.source} holds a {made.network}, whose weights are no longer a model's: "
            "quantise the checkpoint that it was made of"
        )


def _table(
    args: argparse.Namespace,
    what: str,
    folder: images.Images,
    how: images.Normalisation,
    quantized: QuantizedVoVNet,
) -> Table:
    table = Table(title=str(args.dst), title_justify="left", show_header=False)
    table.add_row("network", escape(what))
    size = args.size or "their own size"
    table.add_row("images", escape(f"{len(folder.files)} of {folder.there}, {size}"))
    table.add_row("normalisation", str(how))
    levels = f", {quantized.levels} levels" if quantized.dtype == "int8" else ""
    stem = "a wide stem" if quantized.wide_stem else "the stem as well"
    table.add_row("dtype", f"{quantized.dtype}{levels}, {stem}")
    table.add_row("ranges", args.calibrator)
    for row in quantized.report().features:
        table.add_row(f"SQNR of {row.name}", f"{row.sqnr:.1f} dB")
    return table
