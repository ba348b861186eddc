"""Images of a folder, normalised as a network was trained on them."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _optional
from ..network.model import VoVNet
from ..ops.features import check_size
from .sources import Found

ENDINGS = (".jpg", ".jpeg", ".png")
"""Of the files of a folder that are images."""

CHANNELS = 3

_ORIENTATION = 0x0112
"""EXIF's tag of how the camera was held."""


class Normalisation(NamedTuple):
    """What a detector's preprocessor does to pixels from 0 to 255.

    Attributes:
        mean, std: by channel, in the order in which the network has them.
        to_rgb: the network has red first; otherwise blue, as OpenCV and detectron2 do.
        whose: who says so.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    to_rgb: bool
    whose: str

    def __str__(self) -> str:
        order = "RGB" if self.to_rgb else "BGR"
        return f"{order}, mean {_list(self.mean)}, std {_list(self.std)} ({self.whose})"

    def apply(self, pixels: Tensor) -> Tensor:
        """``[3, H, W]`` RGB from 0 to 255 as the network takes it."""
        x = pixels.float() if self.to_rgb else pixels.float().flip(0)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std


_IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

PRESETS = {
    "detectron2": Normalisation((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), False, "detectron2's"),
    "timm": Normalisation(*_IMAGENET, True, "timm's"),
    "torchhub": Normalisation(*_IMAGENET, True, "torch.hub's"),
}
"""By dialect, what its published backbones were trained with."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what says where images are, and how the network takes them."""
    command.add_argument(
        "--images",
        required=True,
        type=Path,
        metavar="FOLDER",
        help=f"images ({', '.join(ENDINGS)}) in it and in the folders below, some dozens of those "
        "that the network is for",
    )
    command.add_argument(
        "--count",
        type=int,
        default=64,
        help="take so many of them, spread over all by name (default: %(default)s)",
    )
    command.add_argument(
        "--size",
        metavar="HxW",
        help="scale each until it fits into this, as it is otherwise, and fill what remains with "
        "zeros at the right and the bottom, as detectors do (default: images as they are)",
    )
    command.add_argument(
        "--batch",
        type=int,
        default=4,
        help="images of one size that are looked at together (default: %(default)s)",
    )
    command.add_argument(
        "--mean",
        metavar="A,B,C",
        help="of the training's normalisation, of pixels from 0 to 255, in the order of the "
        "network's channels, as in mmdet's configs (default: that of the published backbones of "
        "its dialect, where the checkpoint is a backbone's own; a detector may have another)",
    )
    command.add_argument("--std", metavar="A,B,C", help="of the same")
    command.add_argument(
        "--to-rgb",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the network has red first; or blue, as PETR and detectron2 do",
    )


# --------------------------------------------------------------------------------------
# What is asked for
# --------------------------------------------------------------------------------------


def require(args: argparse.Namespace) -> None:
    """Refuse options that make no sense, before anything is read.

    Raises:
        ValueError: an option is none; there is no Pillow.
    """
    for name in ("count", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    _size(args.size)
    reason = _optional.why_not("PIL")
    if reason is not None:
        raise ValueError(f"images are read with Pillow: {reason}")
    _own(args)


def normalisation(args: argparse.Namespace, found: Found) -> Normalisation:
    """What was asked for, or what is known of the published backbones of a dialect.

    Raises:
        ValueError: neither.
    """
    own = _own(args)
    if own is not None:
        return own
    dialect = found.model.spec.dialect
    if found.prefix or dialect not in PRESETS:
        why = (
            f"the backbone in {args.source} is a part of something ({found.prefix}), which may "
            "have been trained with any"
            if found.prefix
            else f"of the dialect {dialect} none is known"
        )
        raise ValueError(
            f"which normalisation? {why}: write --mean, --std and --to-rgb or --no-to-rgb as its "
            "config has them (in mmdet img_norm_cfg or data_preprocessor, in detectron2 "
            "MODEL.PIXEL_MEAN and PIXEL_STD). Common are "
            + "; ".join(_as_options(preset) for preset in dict.fromkeys(PRESETS.values()))
        )
    return PRESETS[dialect]


def _own(args: argparse.Namespace) -> Normalisation | None:
    given = [args.mean, args.std, args.to_rgb]
    if given == [None, None, None]:
        return None
    if None in given:
        raise ValueError("--mean, --std and --to-rgb or --no-to-rgb belong together: give all")
    mean, std = (_numbers(name, getattr(args, name)) for name in ("mean", "std"))
    if min(std) <= 0:
        raise ValueError(f"--std must be above zero, got {args.std}")
    if max(std) < 1:
        raise ValueError(
            f"--mean and --std are of pixels from 0 to 255, and {args.std} is of pixels from 0 to "
            "1: multiply both by 255"
        )
    return Normalisation(mean, std, args.to_rgb, "asked for")


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        found = ()
    if len(found) != CHANNELS or not all(map(math.isfinite, found)):
        raise ValueError(f"--{name} must be three numbers, as in 123.675,116.28,103.53; got {text}")
    return found


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise ValueError(f"--size is written HxW, as in 800x1344; got {text!r}")
    return int(match[1]), int(match[2])


def _list(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _as_options(of: Normalisation) -> str:
    order = "--to-rgb" if of.to_rgb else "--no-to-rgb"
    return f"--mean {_list(of.mean)} --std {_list(of.std)} {order} ({of.whose})"


# --------------------------------------------------------------------------------------
# The images
# --------------------------------------------------------------------------------------


class Images:
    """Batches of a folder's images, read as they are asked for.

    Args:
        args: with the options of :func:`add_options`.
        model: which they are for.
        how: their normalisation.

    Attributes:
        files: which are read.
        there: how many there are in the folder.

    Raises:
        ValueError: there are none; the network takes other ones than those of three channels.
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """

    def __init__(self, args: argparse.Namespace, model: VoVNet, how: Normalisation) -> None:
        folder: Path = args.images
        if model.input_ch != CHANNELS:
            raise ValueError(
                f"the network takes images of {model.input_ch} channels, and those of a folder "
                "have 3: call vovnet_fast.quantize with tensors"
            )
        if not folder.exists():
            raise FileNotFoundError(f"there is no folder {folder} of images")
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder: --images takes one of images")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
        if not files:
            raise ValueError(
                f"there are no images in {folder}, nor below it: files that end in "
                f"{', '.join(ENDINGS)} were expected"
            )
        count = min(args.count, len(files))
        self.files = [files[i * len(files) // count] for i in range(count)]
        self.there = len(files)
        self._size, self._model, self._how = _size(args.size), model, how
        self._batches = self._grouped(args.batch)

    def __len__(self) -> int:
        """Batches there are."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        """``[N, 3, H, W]``, of images that have one size and follow one another."""
        for files in self._batches:
            yield torch.stack([self._image(file) for file in files])

    def _grouped(self, batch: int) -> list[list[Path]]:
        """Files by batches. All are opened, so that what cannot be is found out at once."""
        found: list[list[Path]] = []
        last: tuple[int, int] | None = None
        for file in self.files:
            with _opened(file) as image:
                size = self._size or (image.height, image.width)
            try:
                check_size(self._model.spec, self._model.out_features, *size)
            except ValueError as error:
                raise ValueError(f"{file}: {error}; --size takes another") from error
            if size != last or len(found[-1]) == batch:
                found.append([])
            found[-1].append(file)
            last = size
        return found

    def _image(self, file: Path) -> Tensor:
        pixels = read(file)
        if self._size is None:
            return self._how.apply(pixels)
        height, width = self._size
        x = self._how.apply(_fitted(pixels, height, width))
        return F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]))


def read(file: Path) -> Tensor:
    """An image as ``[3, H, W]`` uint8 in RGB, turned as its camera says.

    Raises:
        ValueError: it cannot be read.
    """
    with _opened(file) as image:
        raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return raw.view(image.height, image.width, CHANNELS).permute(2, 0, 1)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An image of Pillow's, turned as its camera says, whose pixels may not yet have been read."""
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(file) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are of mode {opened.mode}, not of eight bits")
            turned = opened.getexif().get(_ORIENTATION, 1) != 1
            yield PIL.ImageOps.exif_transpose(opened) if turned else opened
    except Exception as error:  # Damaged ones raise almost anything.
        raise ValueError(
            f"{file} cannot be read as an image: {error}. Mend it, or take it out of the folder"
        ) from error


def _fitted(pixels: Tensor, height: int, width: int) -> Tensor:
    """``[3, h, w]`` scaled until it touches the edge, its sides in the same proportion."""
    h, w = pixels.shape[1:]
    scale = min(height / h, width / w)
    size = min(max(round(h * scale), 1), height), min(max(round(w * scale), 1), width)
    if size == (h, w):
        return pixels
    x = F.interpolate(
        pixels[None].float(), size, mode="bilinear", align_corners=False, antialias=True
    )
    return x[0].clamp(0, 255)
