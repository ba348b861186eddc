"""``vovnet-fast classify``: what a classifier with timm's weights says of images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import _optional

_NAMED = 1000  # Classes of ImageNet-1k, for which timm has words.


class Guess(NamedTuple):
    """One of the likeliest classes of an image.

    Attributes:
        image: the file.
        number: of the class.
        words: of ImageNet-1k's class, empty where the classifier has another number of them.
        probability: softmax of its logit.
    """

    image: str
    number: int
    words: str
    probability: float


def classify(
    name: str, images: Sequence[Path], *, weights: Path | None = None, top: int = 5
) -> list[Guess]:
    """Run a classifier on images, prepared as its weights' configuration in timm says.

    Args:
        name: timm's, with a tag of weights or without, with ``_fast`` or without.
        images: files that Pillow reads.
        weights: a file of timm's layout or ours; those of the tag, from their hub, by default.
        top: how many classes of each image.

    Returns:
        the likeliest first, image by image.

    Raises:
        ValueError: timm cannot be used, has no such VoVNet, or no weights of it; a file is no
            image; ``top`` is less than one.
        CheckpointError: the weights do not fit.
    """
    reason = _optional.why_not("timm")
    if reason is not None:
        raise ValueError(reason)
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    model = _model(name, weights)
    import timm.data

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    found = []
    for image in images:
        with torch.inference_mode():
            probabilities = model(transform(_read(image))[None])[0].softmax(0)
        names = timm.data.ImageNetInfo() if len(probabilities) == _NAMED else None
        for number in probabilities.argsort(descending=True)[:top].tolist():
            words = "" if names is None else names.index_to_description(number)
            found.append(Guess(str(image), number, words, probabilities[number].item()))
    return found


def _model(name: str, weights: Path | None) -> Any:
    from timm.models import create_model, is_model_pretrained

    from ..integrations.timm import NAMES

    architecture, dot, tag = name.partition(".")
    architecture = f"{architecture.removesuffix('_fast')}_fast"
    if architecture not in NAMES:
        known = ", ".join(known.removesuffix("_fast") for known in NAMES)
        raise ValueError(f"timm has no VoVNet {name!r}; known are {known}")
    if weights is None and not is_model_pretrained(architecture + dot + tag):
        raise ValueError(f"timm has no weights of {name}: give a file with --weights")
    overlay = {} if weights is None else dict(pretrained_cfg_overlay=dict(file=str(weights)))
    return create_model(architecture + dot + tag, pretrained=True, **overlay).eval()


def _read(image: Path) -> Any:
    import PIL.Image

    try:
        with PIL.Image.open(image) as file:
            return file.convert("RGB")
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{image} is no image that Pillow reads") from error


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of ``vovnet-fast``."""
    command = commands.add_parser(
        "classify",
        help="what a classifier with timm's weights says of images",
        description=(
            "Run one of timm's VoVNets, as a network of this package, on images, and print the "
            "likeliest classes. Needs timm."
        ),
        epilog="example: vovnet-fast classify ese_vovnet39b.ra_in1k cat.jpg dog.png",
    )
    command.add_argument("name", metavar="NAME", help="timm's, with a tag of weights or without")
    command.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="files to look at")
    command.add_argument(
        "--weights", metavar="FILE", type=Path, help="of timm's layout; by default from timm's hub"
    )
    command.add_argument("--top", type=int, default=5, help="classes an image (%(default)s)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    found = classify(args.name, args.images, weights=args.weights, top=args.top)
    if args.json:
        print(json.dumps([guess._asdict() for guess in found], indent=2))
        return
    table = Table(title=escape(args.name), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("image", overflow="fold")
    for header in ("class", "probability"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("words", overflow="fold")
    for guess in found:
        cells = (guess.image, str(guess.number), f"{guess.probability:.3f}", guess.words)
        table.add_row(*map(escape, cells))
    Console(highlight=False).print(table)
