"""Tile configurations of the convolutions in int8 and fp8, and what they do with their sums."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ._eight_bits import soft
from .conv_config import (
    POINTER_LIMIT,
    TMA_SHAPES,
    ConvConfig,
    pointer_blocks,
    tile_shape,
    tma_blocks,
)

Format = Literal["int8", "fp8"]

MIN_CAPABILITY: dict[Format, tuple[int, int]] = {"int8": (8, 0), "fp8": (8, 9)}
"""Compute capabilities whose tensor cores multiply a format."""


def offset(dtype: torch.dtype, levels: int) -> bool:
    """Whether an input of a dtype may hold bytes beyond those of int8.

    Kernels take 128 off each, padding included. What is missing then is 128 times the sum of an
    output channel's weights, the same for every pixel.
    """
    return dtype == torch.uint8 and levels > torch.iinfo(torch.int8).max


@dataclass(frozen=True)
class EightBits:
    """What happens to the sums of products of a tile. Vectors are ``[C]``, without gaps.

    Attributes:
        bias: int32, fp32 in fp8, added to the sums.
        multiplier: fp32, of activations.
        unit: fp32, of a feature.
        levels: the largest activation.
        out: ``[N, H, W, C]`` view of activations, or None.
        feature: ``[N, H, W, C]`` fp32 view for max(y * unit, 0), or None. Not both are.
        pool_partials: ``[N, T, C]``, dtype of ``bias``, receives sums of ``out``.
        weight_sums: ``[C]`` int32, those of an output channel's weights, where the input is bytes
            of 255 levels; see :func:`offset`.
    """

    bias: Tensor
    multiplier: Tensor
    unit: Tensor
    levels: int
    out: Tensor | None
    feature: Tensor | None = None
    pool_partials: Tensor | None = None
    weight_sums: Tensor | None = None

    @property
    def form(self) -> Format:
        """Of the activations."""
        return "int8" if self.bias.dtype == torch.int32 else "fp8"

    @property
    def target(self) -> Tensor:
        """One of the views that are written."""
        return self.views()[0]

    def views(self) -> list[Tensor]:
        """Those that are written."""
        return [view for view in (self.out, self.feature) if view is not None]

    def with_views(self, views: Iterable[Tensor]) -> EightBits:
        """The same with other :meth:`views`."""
        rest = iter(views)
        out, feature = (None if v is None else next(rest) for v in (self.out, self.feature))
        return replace(self, out=out, feature=feature)

    def args(self) -> dict[str, Any]:
        """Kernel arguments, but for the views."""
        return dict(
            bias_ptr=self.bias,
            multiplier_ptr=None if self.out is None else self.multiplier,
            unit_ptr=None if self.feature is None else self.unit,
            sums_ptr=self.weight_sums,
            pool_ptr=self.pool_partials,
            levels=self.levels,
        )

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments: what is there."""
        return dict(
            OUT=self.out is not None,
            FEATURE=self.feature is not None,
            POOL=self.pool_partials is not None,
            OFFSET=self.weight_sums is not None,
            INT8=self.form == "int8",
            SOFT=soft(self.form),
        )


_POINTER_SHAPES = ((128, 128, 8, 3), (128, 64, 8, 4), (64, 128, 4, 3), (64, 64, 4, 4))
"""Pixels, channels a step, warps, stages: the bytes of the half precisions' tiles."""

_FEW_CHANNELS = ((128, 32, 8, 2), (64, 32, 4, 2))
"""Those of images: 27 products of three channels are one step."""


def _pointer_limit(form: Format, both: bool) -> int:
    """Output channels of a program: with more of them some layer spills registers."""
    if both:
        return 128
    return POINTER_LIMIT if form == "int8" else 160  # Products of a step have sums of their own.


def _pointer_candidates(c_in: int, c_out: int, form: Format, both: bool) -> list[ConvConfig]:
    blocks = pointer_blocks(c_out, _pointer_limit(form, both))
    return [
        ConvConfig("pointer", 1, pixels, blocks, block_k, warps, stages)
        for pixels, block_k, warps, stages in (_FEW_CHANNELS if c_in < 32 else _POINTER_SHAPES)
        if warps > 4 or block_k * sum(blocks) <= 128 * 160  # Of four warps, more would spill.
    ]


def _tma_candidates(
    c_in: int, c_out: int, form: Format, kernel: int, both: bool
) -> list[ConvConfig]:
    # 128 bytes of channels a step; half of that where it leaves less of the last step empty.
    block_k, depth = (64, 2) if -c_in % 64 < -c_in % 128 else (128, 1)
    largest = 128 * 128 if both else 128 * 192 if form == "fp8" else 256 * 192
    found = []
    for blocks in tma_blocks(c_out):
        for pixels, warps, stages, persistent in TMA_SHAPES[blocks]:
            accumulated = pixels * sum(blocks)
            if accumulated > largest or (persistent and accumulated > 128 * 128):
                continue
            tile = tile_shape(pixels, kernel)
            number = stages * depth - (2 if persistent and depth == 2 else 0)
            found.append(ConvConfig("tma", *tile, blocks, block_k, warps, number, persistent))
    return found


@functools.cache  # Asked for at every launch.
def candidates(
    capability: tuple[int, int],
    c_in: int,
    c_out: int,
    form: Format,
    *,
    kernel: int = 3,
    tma: bool = True,
    both: bool = False,
) -> tuple[ConvConfig, ...]:
    """The shipped configurations for a layer, largest tiles first within a form.

    Args:
        capability: compute capability of the GPU.
        c_in: input channels.
        c_out: output channels.
        form: of the activations.
        kernel: 3 or 1.
        tma: whether bulk copies can take the tensors.
        both: activations and a feature are written.
    """
    if capability < MIN_CAPABILITY[form]:
        return ()
    found = _pointer_candidates(c_in, c_out, form, both)
    if capability >= (9, 0):
        found = [c for c in found if c.block_k == max(f.block_k for f in found)]
    # Of Blackwell's own products Triton 3.7 has none in int8.
    if tma and (9, 0) <= capability < (10, 0):
        found = _tma_candidates(c_in, c_out, form, kernel, both) + found
    return tuple(found)
