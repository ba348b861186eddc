"""Which network a command is about: a checkpoint's, or an architecture with random weights."""

from __future__ import annotations

import argparse
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import checkpoints, specs
from ..checkpoints import LAYOUTS, CheckpointError
from ..deploy import file, header
from ..network.model import STAGE_NAMES, VoVNet
from ..quantization import file as quantized_file

CHECKPOINT = "a file or an http(s) address of any layout"
SPEC = (
    "an architecture's name (see: vovnet-fast specs), for one with random weights, to measure the "
    "speed of"
)

_CALIBRATION = (2, 128, 128)
"""N, H, W of the noise that an untrained network's norms are set by."""


class Found(NamedTuple):
    """What there is in SPEC|CHECKPOINT.

    Attributes:
        model: the network.
        what: what is said of it.
        prefix: what stands before the backbone's keys in the checkpoint.
    """

    model: VoVNet
    what: str
    prefix: str = ""


def add_options(command: argparse.ArgumentParser, of_files: str = "") -> None:
    """Add what says more about SPEC|CHECKPOINT, ``args.source``.

    Args:
        command: the command's.
        of_files: which features there are of a network that was made already.
    """
    command.add_argument(
        "--features",
        metavar="NAMES",
        help="features to return, with commas, as in stage4,stage5 (default: stage2 to stage5"
        f"{of_files and f', {of_files}'}); stages after the last are left out",
    )
    command.add_argument(
        "--input-ch", type=int, help="channels of the image, of a SPEC (default: 3)"
    )
    command.add_argument("--spec", help="architecture of CHECKPOINT (default: recognised)")
    command.add_argument("--from", dest="layout", choices=LAYOUTS, help="layout of CHECKPOINT")
    command.add_argument("--prefix", help="what stands before the backbone's keys in CHECKPOINT")


def require_target(
    args: argparse.Namespace, ending: str, path: Path | None = None, name: str = "OUT"
) -> None:
    """Refuse a file that is called something else, or is there; before any work is done.

    Args:
        args: with ``force``.
        ending: of the file's name.
        path: the file, ``args.dst`` by default.
        name: of the argument.
    """
    path = args.dst if path is None else path
    if path.suffix != ending:
        raise ValueError(f"{name} must end in {ending}, got {path}")
    if path.exists() and not args.force:
        raise ValueError(f"{path} exists; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.absolute().parent} to write {name} in")


def device(name: str) -> torch.device:
    """A device that can be used.

    Raises:
        ValueError: it cannot.
    """
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return found


def words(text: str) -> tuple[str, ...]:
    """Those of a list with commas."""
    return tuple(word for word in re.split(r"[,\s]+", text) if word)


def kind(source: str) -> header.Kind | None:
    """Which kind of network, made already, a file holds; None for all else."""
    if _is_address(source):
        return None
    kinds = (file.KIND, quantized_file.KIND)
    return next((each for each in kinds if header.holds(source, each)), None)


def refuse_options(args: argparse.Namespace, what: str, remedy: str) -> None:
    """Refuse what could be said of a checkpoint, and not of a network that was made already."""
    if args.input_ch is not None:
        raise ValueError(_OF_A_SPEC)
    given = [f"--{n}" for n in ("spec", "from", "prefix", "features") if _given(args, n)]
    if given:
        raise ValueError(
            f"{given[0]} is about a checkpoint, and {args.source} holds {what}, which has been "
            f"decided on: {remedy}"
        )


def model(args: argparse.Namespace) -> Found:
    """The network of SPEC|CHECKPOINT.

    Raises:
        ValueError: there is neither such a file nor such an architecture; an option is about the
            other.
        CheckpointError: the file fits no architecture, or not that one.
        OSError: it cannot be read.
    """
    if not _is_address(args.source) and not Path(args.source).exists():
        of_checkpoint = [f"--{n}" for n in ("spec", "from", "prefix") if _given(args, n)]
        if of_checkpoint:
            raise ValueError(
                f"{of_checkpoint[0]} is about a CHECKPOINT, and there is no file {args.source}"
            )
        return _untrained(args)
    if args.input_ch is not None:
        raise ValueError(_OF_A_SPEC)
    return _filled(args)


_OF_A_SPEC = "--input-ch is for a SPEC: a CHECKPOINT has the channels of its images"


def recognised(source: str, state_dict: Mapping[str, Any], **options: Any) -> str:
    """The architecture that a checkpoint fits.

    Raises:
        CheckpointError: there is none.
    """
    fitting = checkpoints.identify(state_dict, **options)
    if not fitting:
        raise CheckpointError(
            f"{source} fits none of the published architectures; --spec NAME says what is amiss "
            "with one of them"
        )
    return fitting[0]


def _is_address(source: str) -> bool:
    return urllib.parse.urlparse(source).scheme in ("http", "https")


def _given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, {"from": "layout"}.get(name, name)) is not None


def _features(args: argparse.Namespace) -> tuple[str, ...]:
    return STAGE_NAMES if args.features is None else words(args.features)


def _filled(args: argparse.Namespace) -> Found:
    state_dict = checkpoints.read(args.source, mmap=True)
    options = dict(layout=args.layout, prefix=args.prefix)
    spec = args.spec
    if spec is None:
        spec = recognised(args.source, state_dict, **options)
    native, report = checkpoints.convert_with_report(state_dict, spec, "native", **options)
    first = native["stem.stem_1/conv.weight"]
    model = VoVNet(spec, input_ch=first.shape[1], out_features=_features(args))
    checkpoints.load(model, native, layout="native", prefix="")
    what = f"{report.spec}, {report.layout} keys, prefix {report.prefix or 'none'}"
    return Found(model, what, report.prefix)


def _untrained(args: argparse.Namespace) -> Found:
    try:
        spec = specs.get(args.source)
    except specs.UnknownSpecError as error:
        raise ValueError(f"there is no file {args.source}, and {error}") from error
    torch.manual_seed(0)
    channels = 3 if args.input_ch is None else args.input_ch
    model = VoVNet(spec, input_ch=channels, out_features=_features(args), norm_eval=False)
    _calibrate(model, channels)
    return Found(model, f"{spec.name}, with RANDOM weights")


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
