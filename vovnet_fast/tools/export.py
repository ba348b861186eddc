"""``vovnet-fast export``: a network as an ONNX file, compared with PyTorch before it is there."""

from __future__ import annotations

import argparse
import re
import urllib.parse
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import checkpoints, specs
from ..checkpoints import LAYOUTS, CheckpointError
from ..deploy import export, file, header
from ..deploy.file import load_frozen
from ..deploy.freeze import FrozenVoVNet
from ..deploy.onnx_graph import AXES
from ..network.model import STAGE_NAMES, VoVNet
from .bench.command import parse_shape

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

_CALIBRATION = (2, 128, 128)
"""N, H, W of the noise that an untrained network's norms are set by."""


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
            "features are compared with PyTorch's: a file that differs is not left behind."
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
        help="a file or an http(s) address of any layout, or what FrozenVoVNet.save wrote; or an "
        "architecture's name (see: vovnet-fast specs), for one with random weights, to measure "
        "the speed of",
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
        default=export.OPSET,
        help="of ONNX (default: %(default)s, which TensorRT 8.6 and 10 read)",
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
    command.add_argument(
        "--features",
        metavar="NAMES",
        help="features to return, with commas, as in stage4,stage5 (default: stage2 to stage5, of "
        "a frozen network those that it has); stages after the last are left out",
    )
    command.add_argument(
        "--input-ch", type=int, help="channels of the image, of a SPEC (default: 3)"
    )
    command.add_argument("--spec", help="architecture of CHECKPOINT (default: recognised)")
    command.add_argument("--from", dest="layout", choices=LAYOUTS, help="layout of CHECKPOINT")
    command.add_argument("--prefix", help="what stands before the backbone's keys in CHECKPOINT")
    command.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare with onnxruntime"
    )
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    if args.dst.suffix != ".onnx":
        raise ValueError(f"OUT must end in .onnx, got {args.dst}")
    if args.dst.exists() and not args.force:
        raise ValueError(f"{args.dst} exists; --force replaces it")
    size, dynamic = parse_shape(args.size), _words(args.dynamic)
    io = None if args.io is None else DTYPES[args.io]
    export.require(size, dynamic, args.opset, DTYPES[args.dtype], io, check=args.check)
    with Console(stderr=True).status("reading the weights") as status:
        model, what = _source(args)
        report = export.onnx(
            model,
            args.dst,
            size,
            dynamic=dynamic,
            opset=args.opset,
            dtype=DTYPES[args.dtype],
            io_dtype=io,
            check=args.check,
            told=lambda text: status.update(escape(text)),
        )
    _print_report(args, report, what)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[,\s]+", text) if word)


# --------------------------------------------------------------------------------------
# What is exported
# --------------------------------------------------------------------------------------


def _source(args: argparse.Namespace) -> tuple[VoVNet | FrozenVoVNet, str]:
    """The network, and what is said of it."""
    is_address = urllib.parse.urlparse(args.source).scheme in ("http", "https")
    is_file = is_address or Path(args.source).exists()
    of_checkpoint = [f"--{n}" for n in ("spec", "from", "prefix") if _given(args, n)]
    if not is_file:
        if of_checkpoint:
            raise ValueError(
                f"{of_checkpoint[0]} is about a CHECKPOINT, and there is no file {args.source}"
            )
        return _untrained(args)
    if args.input_ch is not None:
        raise ValueError("--input-ch is for a SPEC: a CHECKPOINT has the channels of its images")
    if not is_address and header.holds(args.source, file.KIND):
        if args.features is not None or of_checkpoint:
            raise ValueError(
                f"{of_checkpoint[0] if of_checkpoint else '--features'} is about a checkpoint, and "
                f"{args.source} holds a frozen network, which has been decided on: freeze the "
                "model again"
            )
        frozen = load_frozen(args.source, graph=False)
        return frozen, f"{frozen.spec.name}, frozen in {frozen.dtype}"
    return _filled(args)


def _given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, {"from": "layout"}.get(name, name)) is not None


def _features(args: argparse.Namespace) -> tuple[str, ...]:
    return STAGE_NAMES if args.features is None else _words(args.features)


def _filled(args: argparse.Namespace) -> tuple[VoVNet, str]:
    state_dict = checkpoints.read(args.source, mmap=True)
    options = dict(layout=args.layout, prefix=args.prefix)
    spec = args.spec
    if spec is None:
        fitting = checkpoints.identify(state_dict, **options)
        if not fitting:
            raise CheckpointError(
                f"{args.source} fits none of the published architectures; --spec NAME says what "
                "is amiss with one of them"
            )
        spec = fitting[0]
    native, report = checkpoints.convert_with_report(state_dict, spec, "native", **options)
    first = native["stem.stem_1/conv.weight"]
    model = VoVNet(spec, input_ch=first.shape[1], out_features=_features(args))
    checkpoints.load(model, native, layout="native", prefix="")
    return model, f"{report.spec}, {report.layout} keys, prefix {report.prefix or 'none'}"


def _untrained(args: argparse.Namespace) -> tuple[VoVNet, str]:
    try:
        spec = specs.get(args.source)
    except specs.UnknownSpecError as error:
        raise ValueError(f"there is no file {args.source}, and {error}") from error
    torch.manual_seed(0)
    channels = 3 if args.input_ch is None else args.input_ch
    model = VoVNet(spec, input_ch=channels, out_features=_features(args), norm_eval=False)
    _calibrate(model, channels)
    return model, f"{spec.name}, with RANDOM weights"


def _calibrate(model: VoVNet, channels: int) -> None:
    """Let norms normalise, and leave most of what they give positive.

    Of a network that was never trained, values grow from block to block beyond fp16; and with
    norms alone a rounding does, as ReLUs cut half of everything.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # An average over all batches, of which there will be one.
            torch.nn.init.ones_(module.bias)
    n, h, w = _CALIBRATION
    with torch.no_grad():
        model.train()(torch.randn(n, channels, h, w))
    model.eval()


# --------------------------------------------------------------------------------------
# What is printed
# --------------------------------------------------------------------------------------


def _print_report(args: argparse.Namespace, report: export.Report, what: str) -> None:
    console = Console(highlight=False)
    table = Table(title=str(args.dst), title_justify="left", show_header=False)
    table.add_row("network", escape(what))
    table.add_row("nodes", ", ".join(f"{n} {kind}" for kind, n in report.nodes.items()))
    table.add_row("opset", str(report.opset))
    dtype = args.dtype if args.io in (None, args.dtype) else f"{args.dtype}, {args.io} outside"
    table.add_row("dtype", dtype)
    table.add_row("dynamic", args.dynamic or "nothing")
    table.add_row("size", f"{report.nbytes / 1e6:.1f} MB")
    console.print(table)
    if not report.checks:
        console.print("[bold]Not compared with PyTorch[/] (--no-check).")
        return
    table = Table(title="onnxruntime against PyTorch", box=box.SIMPLE_HEAD)
    for heading in ("images", "feature"):
        table.add_column(heading, no_wrap=True)
    for heading in ("largest error", "of the largest value", "allowed"):
        table.add_column(heading, justify="right", no_wrap=True)
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
