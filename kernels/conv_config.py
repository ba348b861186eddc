"""Tile configurations of the convolution kernels, and which of them fit which layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from ._common import PARTS, cdiv

Form = Literal["tma", "pointer"]

Kind = Literal["forward", "statistics", "gradient"]
"""What a tile needs registers and shared memory for besides its sums: see :class:`Epilogue`."""

MIN_SPLIT = 16
"""Smallest block of output channels of the pointer form (the smallest ``tl.dot``)."""


@dataclass(frozen=True)
class ConvConfig:
    """How one program of a convolution kernel tiles its work.

    Attributes:
        form: ``tma``, bulk copies and warpgroup MMA on sm_90 and newer, or ``pointer``.
        tile_h: rows of the tile of output pixels.
        tile_w: columns of the tile. The pointer form takes tile_h * tile_w pixels in
            raster order instead; its tile_h is 1.
        block_out: output channels of a program, as the sizes of its accumulators.
        block_k: input channels of one step.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        persistent: as many programs as processors, each looping over tiles (``tma`` only).
    """

    form: Form
    tile_h: int
    tile_w: int
    block_out: tuple[int, ...]
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False

    @property
    def pixels(self) -> int:
        """Output pixels of a tile."""
        return self.tile_h * self.tile_w

    @functools.cached_property
    def name(self) -> str:
        """Short and unique, for tables: ``tma-128x128+64-k64-w8-s3-p``.

        It says the pixels of a tile and not its shape, which follows: see :func:`tile_shape`.
        """
        blocks = "+".join(map(str, self.block_out))
        suffix = "-p" if self.persistent else ""
        return (
            f"{self.form}-{self.pixels}x{blocks}-k{self.block_k}-w{self.num_warps}-s{self.num_stages}"
            f"{suffix}"
        )


@dataclass(frozen=True)
class Epilogue:
    """What happens to the sums of products of a tile, in this order, where it is given.

    Attributes:
        scale, shift: ``[C]``, y * scale + shift.
        relu: max(y, 0).
        pool_partials: ``[N, T, C]``, receives sums of y over the pixels.
        add: ``[N, H, W, A]`` view, added to the first A channels.
        mask: ``[N, H, W, M]`` view of the last M channels; where it is not positive y becomes 0.
        statistics: ``[N, T, 3, C]``, receives the statistics of what is stored.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False
    pool_partials: Tensor | None = None
    add: Tensor | None = None
    mask: Tensor | None = None
    statistics: Tensor | None = None

    @property
    def kind(self) -> Kind:
        """By which configurations are chosen."""
        if self.statistics is not None:
            return "statistics"
        return "forward" if self.add is None and self.mask is None else "gradient"

    def views(self) -> list[Tensor]:
        """The activations among the tensors."""
        return [view for view in (self.add, self.mask) if view is not None]

    def with_views(self, views: Iterable[Tensor]) -> Epilogue:
        """The same with other :meth:`views`."""
        rest = iter(views)
        add, mask = (None if v is None else next(rest) for v in (self.add, self.mask))
        return replace(self, add=add, mask=mask)

    def args(self) -> dict[str, Any]:
        """Kernel arguments, but for those of the activations."""
        return dict(
            scale_ptr=self.scale,
            shift_ptr=self.shift,
            pool_ptr=self.pool_partials,
            statistics_ptr=self.statistics,
        )

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments: what is there."""
        return dict(
            SCALE=self.scale is not None,
            RELU=self.relu,
            POOL=self.pool_partials is not None,
            ADD=self.add is not None,
            MASK=self.mask is not None,
            STATISTICS=self.statistics is not None,
        )


def pointer_blocks(c_out: int, limit: int) -> tuple[int, ...]:
    """Split output channels into accumulators that waste none of them, if possible.

    The channels are divided evenly among as few programs as have at most ``limit``
    each, and each share is a sum of at most three powers of two from 16 up:
    80 is (64, 16), 224 is twice (64, 32, 16), 384 is twice (128, 64). Widths that
    cannot be split so (56) get one power of two with a masked tail.
    """
    for groups in range(cdiv(c_out, limit), c_out // MIN_SPLIT + 1):
        share = c_out // groups
        parts = tuple(1 << bit for bit in reversed(range(share.bit_length())) if share >> bit & 1)
        if c_out % groups == 0 and len(parts) <= PARTS and parts[-1] >= MIN_SPLIT:
            return parts
    return (min(max(triton.next_power_of_2(c_out), MIN_SPLIT), 128),)


POINTER_LIMIT = 192
"""Output channels of a program: 128 pixels by 224 channels spill registers on sm_80."""

TMA_SHAPES: dict[tuple[int, ...], tuple[tuple[int, int, int, bool], ...]] = {
    # Accumulators: (pixels, warps, stages, persistent), largest tile first.
    (256,): ((128, 8, 3, False), (128, 8, 3, True)),
    (128, 64): ((256, 8, 3, False), (128, 8, 3, False), (128, 8, 3, True)),
    (128,): (
        (256, 8, 3, False),
        (128, 8, 3, False),
        (64, 4, 4, False),
        (256, 8, 3, True),
        (128, 8, 4, True),
    ),
    (64,): ((256, 8, 3, False), (128, 4, 4, False), (64, 4, 4, False), (256, 8, 3, True)),
}


def tma_blocks(c_out: int) -> list[tuple[int, ...]]:
    """The two largest splits of output channels into accumulators with the least waste.

    A warpgroup multiplies 64 output channels at a time, so that 192 is (128, 64)
    exactly, and 80 cannot do better than (128,).
    """
    waste = {blocks: -c_out % sum(blocks) for blocks in TMA_SHAPES}
    return [blocks for blocks in waste if waste[blocks] == min(waste.values())][:2]


def tile_shape(pixels: int, kernel: int) -> tuple[int, int]:
    """Height and width of the tile of ``pixels`` pixels: the squarest, whose taps overlap most.

    It is the same for all images, because each shape is a kernel of its own to compile. One
    that fits the image best would need 2 % fewer tiles at a quarter of a detector's image, 3 %
    at an eighth, and 8 % at a sixteenth, where smaller tiles waste less. A 1x1 convolution has
    no overlap, and usually sees the image as a single row.
    """
    if kernel == 1:
        return 1, pixels
    height = 1 << (pixels.bit_length() - 1) // 2
    return height, pixels // height


def _persistent_is_shipped(
    capability: tuple[int, int], kernel: int, accumulated: int, kind: Kind
) -> bool:
    """Whether the persistent variant of a half-precision tile exists."""
    if capability >= (10, 0) and (kernel == 1 or kind == "statistics"):
        return False  # Triton 3.7 fails to compile most of them.
    if kernel == 3:
        # The tiles that a gradient reads need shared memory too.
        return kind != "gradient" or accumulated <= 128 * 192
    # With pool partials, the largest tiles would need more registers than there are.
    return accumulated <= 128 * 128


def _spills(capability: tuple[int, int], accumulated: int, kind: Kind) -> bool:
    """Whether Triton 3.7 runs out of registers in a tile."""
    blackwell = capability >= (10, 0)
    return blackwell and kind == "gradient" and not 64 * 128 <= accumulated <= 128 * 192


def _tma_candidates(
    capability: tuple[int, int],
    c_in: int,
    c_out: int,
    kernel: int,
    itemsize: int,
    kind: Kind,
) -> list[ConvConfig]:
    # 128 bytes of channels a step; half of that where it leaves less of the last step empty.
    block_k, depth = 128 // itemsize, 1
    if itemsize == 2 and -c_in % (block_k // 2) < -c_in % block_k:
        block_k, depth = block_k // 2, 2
    found = []
    for blocks in tma_blocks(c_out)[: 2 if itemsize == 2 else 1]:
        for pixels, warps, stages, persistent in TMA_SHAPES[blocks]:
            accumulated = pixels * sum(blocks)
            if _spills(capability, accumulated, kind):
                continue
            if persistent and (
                itemsize == 4  # The output tile, in shared memory too, takes twice as much.
                or not _persistent_is_shipped(capability, kernel, accumulated, kind)
            ):
                continue
            if persistent and depth == 2:
                stages -= 1
            tile = tile_shape(pixels, kernel)
            found.append(
                ConvConfig("tma", *tile, blocks, block_k, warps, stages * depth, persistent)
            )
    return found


_POINTER_SHAPES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    # (pixels, channels a step, warps, stages), largest tile first.
    "half": ((128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3), (64, 32, 4, 4)),
    "half, few channels": ((128, 32, 8, 2), (64, 32, 4, 2)),  # Little to pipeline.
    "tf32": ((128, 32, 8, 3), (64, 32, 4, 3)),
    "exact": ((128, 16, 8, 2), (64, 16, 4, 2)),  # FMA: the operands live in registers.
}


def _pointer_limit(precision: str, kind: Kind) -> int:
    """Output channels of a program: with more of them some layer spills registers on sm_80."""
    narrow = {"gradient": "tf32", "statistics": "exact"}
    if narrow.get(kind) == precision:
        return 64
    if kind == "gradient":
        return 128
    return POINTER_LIMIT if precision == "half" else 128


def _pointer_candidates(c_in: int, c_out: int, precision: str, kind: Kind) -> list[ConvConfig]:
    blocks = pointer_blocks(c_out, _pointer_limit(precision, kind))
    if precision == "half" and c_in < 32:
        precision = "half, few channels"
    shapes = _POINTER_SHAPES[precision]
    if precision == "exact" and c_in < MIN_SPLIT and kind == "forward":  # An image.
        shapes = shapes[:1]  # The other spills a few bytes on sm_80.
    if kind == "statistics":  # Of the others some spill a few bytes on sm_80.
        shapes = shapes[1:] if precision == "exact" else shapes
        shapes = tuple(shape for shape in shapes if shape[1] == shapes[0][1])
    return [
        ConvConfig("pointer", 1, pixels, blocks, block_k, warps, stages)
        for pixels, block_k, warps, stages in shapes
    ]


def candidates(
    capability: tuple[int, int],
    c_in: int,
    c_out: int,
    *,
    kernel: int = 3,
    dtype: torch.dtype = torch.float16,
    tf32: bool = False,
    tma: bool = True,
    kind: Kind = "forward",
) -> list[ConvConfig]:
    """The shipped configurations for a layer: largest tiles first within a form.

    Args:
        capability: compute capability of the GPU.
        c_in: input channels.
        c_out: output channels.
        kernel: 3 or 1.
        dtype: of the activations.
        tf32: fp32 products may be rounded to TF32.
        tma: whether :func:`.conv_tma.legal` holds for the tensors; false for stride 2.
        kind: of the epilogue.
    """
    return list(_candidates(capability, c_in, c_out, kernel, dtype, tf32, tma, kind))


@functools.cache  # Asked for at every launch.
def _candidates(
    capability: tuple[int, int],
    c_in: int,
    c_out: int,
    kernel: int,
    dtype: torch.dtype,
    tf32: bool,
    tma: bool,
    kind: Kind,
) -> tuple[ConvConfig, ...]:
    precision = "half" if dtype.itemsize == 2 else "tf32" if tf32 else "exact"
    found = _pointer_candidates(c_in, c_out, precision, kind)
    if capability >= (9, 0):
        found = [c for c in found if c.block_k == max(f.block_k for f in found)]
    if tma and precision != "exact" and capability >= (9, 0):
        itemsize = dtype.itemsize
        found = _tma_candidates(capability, c_in, c_out, kernel, itemsize, kind) + found
    return tuple(found)


def programs(config: ConvConfig, c_out: int, batch: int, size: tuple[int, int]) -> int:
    """Number of tiles of a launch."""
    rows, columns = size
    if config.form == "pointer":
        rows, columns = 1, rows * columns
    rectangles = cdiv(rows, config.tile_h) * cdiv(columns, config.tile_w)
    return batch * rectangles * cdiv(c_out, sum(config.block_out))
