"""Which convolutions of the ``cpu`` backend are Winograd's (``csrc/cpu/conv_winograd.h``).

A 3x3 layer with a stride of 1 takes 2.25 times fewer products in tiles of 2x2 outputs, and 4 times
fewer in tiles of 4x4, than by its definition. They are in fp32, whatever activations are stored in.
The transformed weight is in fp32 as well, and 1.8 or 4 times as large as one of fp32, so that maps
need to have pixels enough to pay for reading it, and weights to last: of those that change at every
step it would have to be made anew. Frozen networks say that theirs do (:func:`lasting`), and others
of copies that they keep. Which is faster depends on the layer, its pixels, what else there is for
the dtype, and the processor: it is measured at the first such layer, and remembered
(:mod:`vovnet_fast.tuning.processor`).

Errors are rounding's. Against fp64, in fp32 those of 2x2 tiles are as large as those of the
extension's other engines, and smaller than plain PyTorch's on a CPU; those of 4x4 tiles were 0.7 to
1.8 times as large as PyTorch's, the more the fewer channels are summed. In 16 bits the output's
rounding hides both. ``VOVNET_FAST_WINOGRAD`` is the largest side that is used: ``0``, ``2`` or
``4``, the default. An infinity or NaN spreads over its tiles, where otherwise it reaches its
neighbours only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import _environment
from ...tuning import processor
from .. import _extension

SIDES = {"winograd2": 2, "winograd4": 4}
"""Of the tiles of outputs, by the engine's name."""

LEAST_PIXELS, MOST_PIXELS = 64, 8192
"""Of all maps. With fewer nobody asks: tiles reach over the edges, and the weight is read for them.
With more, the weight no longer matters, and layers are as those of so many are."""

STATIC_PIXELS = {"winograd2": 192, "winograd4": 1024}
"""From which these are taken where nothing is measured."""

_CHANNELS = {"winograd2": 32, "winograd4": 32}
"""Fewer of them, on either side, do not pay for transforming inputs and outputs."""

_CHANNELS_FP32 = {"winograd2": 32, "winograd4": 80}
"""In tiles of 4x4 the sums of fewer of them would have more than twice the error of PyTorch's: 2.2
times of 64."""

DTYPES_TAKEN = (torch.float16, torch.bfloat16, torch.float32)

_lasting = WeakTensorKeyDictionary()


def lasting(weights: Iterable[Tensor]) -> None:
    """Say of weights that they are used many times before they change."""
    for weight in weights:
        if not weight.is_inference():  # What is written to it is not counted.
            _lasting[weight] = True


def largest_side() -> int:
    """The largest side of a tile that the environment allows, 0 for none."""
    return _environment.number("WINOGRAD", "4")


class Layer(NamedTuple):
    """What the time of a layer depends on, beside the processor.

    Attributes:
        pixels: N * H * W, rounded to a power of 2: images of many sizes are measured a few times.
        c_in, c_out: channels.
        dtype: of activations.
        otherwise: the engine where Winograd's does not pay.
        isa: the instruction set that is in use.
        threads: of torch.
        levels: of activations in eight bits.
    """

    pixels: int
    c_in: int
    c_out: int
    dtype: torch.dtype
    otherwise: str
    isa: str
    threads: int
    levels: int | None = None

    @property
    def problem(self) -> str:
        """As measurements are remembered by."""
        levels = "" if self.levels is None else f" of {self.levels} levels"
        return (
            f"Winograd's convolution of {self.c_in}>{self.c_out}, about {self.pixels} pixels in "
            f"{self.dtype}{levels}, or {self.otherwise}, {self.isa}"
        )


Trial = Callable[[Layer], Callable[[str], None]]
"""Makes what runs a layer by an engine's name."""


def choose(x: Tensor, weight: Tensor, stride: int, trial: Trial, otherwise: str) -> str:
    """The engine of one convolution, which does not say what is in the image.

    Args:
        x: ``[N, H, W, C_in]``.
        weight: ``[C_out, K, K, C_in]``.
        stride: 1 or 2.
        trial: of some such layer.
        otherwise: the engine where Winograd's does not pay.

    Returns:
        ``winograd2``, ``winograd4`` or ``otherwise``.
    """
    pixels = x.shape[0] * x.shape[1] * x.shape[2]
    if pixels < LEAST_PIXELS or weight not in _lasting:
        return otherwise
    names = engines(weight, stride, x.dtype, otherwise)
    if not names:
        return otherwise
    static = next((name for name in names if STATIC_PIXELS[name] <= pixels), otherwise)
    if torch.are_deterministic_algorithms_enabled():
        return static
    return fastest(layer_of(pixels, weight, x.dtype, otherwise), (*names, otherwise), static, trial)


def layer_of(pixels: int, weight: Tensor, dtype: torch.dtype, otherwise: str) -> Layer:
    """What stands for a layer of so many pixels with a weight ``[C_out, K, K, C_in]``."""
    about = min(1 << (pixels * pixels).bit_length() // 2, MOST_PIXELS)
    c_out, _, _, c_in = weight.shape
    isa, threads = _extension.load("cpu").isa(), torch.get_num_threads()
    return Layer(about, c_in, c_out, dtype, otherwise, isa, threads)


def engines(weight: Tensor, stride: int, dtype: torch.dtype, otherwise: str) -> tuple[str, ...]:
    """Those that may pay for a weight that lasts, the larger tiles first.

    Args:
        weight: ``[C_out, K, K, C_in]``.
        stride: 1 or 2.
        dtype: of activations.
        otherwise: the engine where they do not.
    """
    c_out, kernel, _, c_in = weight.shape
    if kernel != 3 or stride != 1 or dtype not in DTYPES_TAKEN or otherwise == "amx":
        return ()  # The matrix unit makes more than 4 times as many products.
    if not _extension.load("cpu").conv_winograd_runs():
        return ()
    fewest = _CHANNELS_FP32 if dtype == torch.float32 else _CHANNELS
    side, channels = largest_side(), min(c_in, c_out)
    return tuple(
        name for name in reversed(SIDES) if SIDES[name] <= side and fewest[name] <= channels
    )


@functools.cache
def fastest(layer: Layer, names: tuple[str, ...], static: str, trial: Trial) -> str:
    """Which of these is, ``static`` where nothing is measured: once in a process at most."""
    # What was found among fewer says nothing of all.
    problem = f"{layer.problem}: {', '.join(names[:-1])}"
    return processor.choose(problem, names, static, functools.partial(trial, layer))
