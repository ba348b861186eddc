"""Which convolutions in eight bits are Winograd's (``csrc/cpu/int8_conv_winograd.h``).

In integers the transforms are exact, so that the bits are those of the other engines: only time
speaks for one or the other. A 3x3 layer with a stride of 1 takes a quarter of the products, but of
16 bits, and a transformed weight that is 8 times as large. Without VNNI, where bytes are multiplied
in 16 bits as well, that is faster on nearly every map; with it some. It is measured at the first
such layer, and remembered, as for other dtypes (:mod:`.winograd`).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .. import _extension
from . import packing, winograd

NAMES = ("winograd_vnni", "winograd")
"""Engines, the fastest first."""

SIDE = 4
"""Of the tiles of outputs."""

LEAST_PIXELS = 16
"""Of all maps. With fewer nobody asks: a tile has as many."""

STATIC_PIXELS = 64
"""From which it is taken where nothing is measured, unless VNNI is there."""

LARGEST_OUTPUT = 1 << 25
"""Outputs must be less, without their bias: sums are made modulo 2^32, and hold 576 times that."""


def choose(x: Tensor, weight: Tensor, levels: int, trial: winograd.Trial, otherwise: str) -> str:
    """The engine of one 3x3 convolution with a stride of 1.

    Args:
        x: ``[N, H, W, C_in]`` steps.
        weight: ``[C_out, 3, 3, C_in]`` int8.
        levels: of steps.
        trial: of some such layer.
        otherwise: the engine where Winograd's does not pay.

    Returns:
        one of :data:`NAMES`, or ``otherwise``.
    """
    pixels = x.shape[0] * x.shape[1] * x.shape[2]
    if pixels < LEAST_PIXELS or otherwise == "amx" or winograd.largest_side() < SIDE:
        return otherwise  # The matrix unit makes 8 times as many products.
    there = _extension.load("cpu").int8_conv_engines()
    name = next((name for name in NAMES if name in there), None)
    if name is None or not fits(weight, levels):
        return otherwise
    static = name if otherwise != "vnni" and pixels >= STATIC_PIXELS else otherwise
    layer = winograd.layer_of(pixels, weight, x.dtype, otherwise)._replace(levels=levels)
    return winograd.fastest(layer, (name, otherwise), static, trial)


def fits(weight: Tensor, levels: int) -> bool:
    """Whether no output of a weight ``[C_out, 3, 3, C_in]`` is too large, for any steps."""
    if weight[0].numel() * 127 * levels < LARGEST_OUTPUT:
        return True
    return packing.kept_number(weight, _largest_sum) * levels < LARGEST_OUTPUT


def _largest_sum(weight: Tensor) -> int:
    """Of the weights of one sign of an output channel, absolutely."""
    rows = weight.detach().flatten(1).numpy().astype(np.int32)
    return int(max(rows.clip(min=0).sum(1).max(), -rows.clip(max=0).sum(1).min()))
