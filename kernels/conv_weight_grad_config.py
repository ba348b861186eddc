"""Tile configurations of the weight-gradient kernels, and how many parts the pixels make."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ._common import cdiv
from .conv_config import Form, pointer_blocks

MIN_PIXELS = 256
"""A split covers at least as many, so that what it leaves is less than what it reads."""

MAX_PARTIAL_BYTES = 32 << 20
"""Of the partial sums that one weight gradient leaves for its finish."""

_SUMS_PER_PROCESSOR = 2 * 128 * 128  # Elements of accumulators that fit its registers,
_PROGRAMS_PER_PROCESSOR = 4  # in at most so many programs.


@dataclass(frozen=True)
class WeightGradConfig:
    """How one program of a weight-gradient kernel tiles its work.

    A column is a (tap, input channel) pair.

    Attributes:
        form: ``tma``, bulk copies and warpgroup MMA on sm_90 and newer, or ``pointer``.
        columns: columns of an accumulator.
        groups: accumulators along the columns, which share the gradient tile; the
            pointer form has one.
        block_out: output channels of a program, as the sizes of its accumulators,
            which share the input tile.
        pixels: of one step. Those of the ``tma`` form lie in one row.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
    """

    form: Form
    columns: int
    groups: int
    block_out: tuple[int, ...]
    pixels: int
    num_warps: int
    num_stages: int

    @functools.cached_property
    def name(self) -> str:
        """Short and unique, for tables: ``pointer-1x128-128+64-w8-p32-s4``."""
        blocks = "+".join(map(str, self.block_out))
        return (
            f"{self.form}-{self.groups}x{self.columns}-{blocks}"
            f"-w{self.num_warps}-p{self.pixels}-s{self.num_stages}"
        )


def column_groups(config: WeightGradConfig, c_in: int, kernel: int) -> int:
    """Programs along the columns. An accumulator of the ``tma`` form keeps to one tap."""
    if config.form == "pointer":
        return cdiv(kernel * kernel * c_in, config.columns)
    return cdiv(kernel * kernel * cdiv(c_in, config.columns), config.groups)


def split(
    config: WeightGradConfig,
    c_in: int,
    c_out: int,
    kernel: int,
    *,
    steps: int,
    processors: int,
    itemsize: int,
) -> tuple[int, int]:
    """(splits of the pixels, steps of each): they fill the device once.

    Depends on sizes and the device only, so that a gradient is always summed in one order.

    Args:
        config: of the tiles.
        c_in: input channels.
        c_out: output channels.
        kernel: 1 or 3.
        steps: that cover the pixels of all images.
        processors: streaming multiprocessors of the GPU.
        itemsize: bytes of a partial sum.
    """
    # One more along the columns: it sums the gradient.
    tiles = (column_groups(config, c_in, kernel) + 1) * cdiv(c_out, sum(config.block_out))
    resident = _SUMS_PER_PROCESSOR // (config.columns * config.groups * sum(config.block_out))
    resident = min(max(resident, 1), _PROGRAMS_PER_PROCESSOR)
    limits = (
        resident * processors // tiles,
        MAX_PARTIAL_BYTES // (kernel * kernel * c_in * c_out * itemsize),
        steps * config.pixels // MIN_PIXELS,
    )
    each = cdiv(steps, max(min(limits), 1))
    return cdiv(steps, each), each


_TMA_SHAPES: dict[tuple[int, int], tuple[tuple[tuple[int, ...], int], ...]] = {
    # (accumulators, columns of each): (their output channels, warps), largest tile first.
    (1, 128): (((256,), 8), ((128, 64), 8), ((128,), 8)),
    (3, 64): (((128, 64), 8), ((128, 32), 8), ((128,), 8), ((64,), 4)),
    (2, 64): (((128,), 4),),
}
_TMA_STAGES = {64: 3, 32: 6}


_TMA_CANDIDATES = 4  # More would cost more time to measure than they are likely to win.
_SPARE = 1.1  # Work in vain that is allowed beyond that of the best tile.


def _padded(config: WeightGradConfig, c_in: int, c_out: int, kernel: int) -> int:
    """Sums that are computed, needed or not."""
    columns = column_groups(config, c_in, kernel) * config.groups * config.columns
    block = sum(config.block_out)
    return columns * cdiv(c_out, block) * block


def row_tile(kernel: int) -> int:
    """Pixels of a step in one row, the same for all images: each is a kernel to compile.

    A detector's maps are 21 to 400 pixels wide, of which runs of 64 leave up to two thirds
    of the last step empty. A 1x1 convolution sees the image as one row of thousands.
    """
    return 64 if kernel == 1 else 32


def _tma_candidates(
    capability: tuple[int, int], c_in: int, c_out: int, kernel: int
) -> list[WeightGradConfig]:
    pixels = row_tile(kernel)
    found = [
        WeightGradConfig("tma", columns, groups, blocks, pixels, warps, _TMA_STAGES[pixels])
        for (groups, columns), shapes in _TMA_SHAPES.items()
        for blocks, warps in shapes
        # It spills a register on sm_100.
        if capability < (10, 0) or (groups, blocks) != (3, (128,))
    ]
    work = {config: _padded(config, c_in, c_out, kernel) for config in found}
    good = [config for config in found if work[config] <= _SPARE * min(work.values())]
    return good[:_TMA_CANDIDATES]


_POINTER_SHAPES: dict[str, tuple[tuple[int, int, int, int, int], ...]] = {
    # (columns, most output channels, pixels a step, warps, stages), largest tile first.
    "half": ((128, 192, 32, 8, 4), (128, 128, 32, 8, 4), (64, 128, 32, 4, 4)),
    "half on sm_90": ((128, 192, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 32, 4, 4)),
    "tf32": ((128, 128, 32, 8, 3), (64, 64, 32, 4, 3)),
    "exact": ((128, 128, 16, 8, 3), (64, 64, 16, 4, 2)),  # FMA: operands live in registers.
}
_FEW_COLUMNS = {2: (32, 64, 64, 4, 2), 4: (32, 64, 32, 4, 2), 8: (32, 64, 32, 4, 2)}
"""By itemsize, for those of an image: 3 x 3 x 3 = 27."""


def candidates(
    capability: tuple[int, int],
    c_in: int,
    c_out: int,
    *,
    kernel: int = 3,
    dtype: torch.dtype = torch.float16,
    tf32: bool = False,
    tma: bool = True,
) -> list[WeightGradConfig]:
    """The shipped configurations for a layer: the preferred form first, and its largest tiles.

    Args:
        capability: compute capability of the GPU.
        c_in: input channels.
        c_out: output channels.
        kernel: 3 or 1.
        dtype: of the activations.
        tf32: fp32 products may be rounded to TF32.
        tma: whether the tensors allow it; false for stride 2.
    """
    return list(_candidates(capability, c_in, c_out, kernel, dtype, tf32, tma))


@functools.cache  # Asked for at every launch.
def _candidates(
    capability: tuple[int, int],
    c_in: int,
    c_out: int,
    kernel: int,
    dtype: torch.dtype,
    tf32: bool,
    tma: bool,
) -> tuple[WeightGradConfig, ...]:
    kind = "half" if dtype.itemsize == 2 else "tf32" if tf32 else "exact"
    shapes = _POINTER_SHAPES["half on sm_90" if kind == "half" and capability >= (9, 0) else kind]
    total = kernel * kernel * c_in
    # Of more columns than that half a block would be in vain.
    shapes = tuple(shape for shape in shapes if shape[0] < 2 * total)
    if total <= 32:
        shapes = (_FEW_COLUMNS[dtype.itemsize],)
    found = [
        WeightGradConfig("pointer", columns, 1, pointer_blocks(c_out, limit), pixels, warps, stages)
        for columns, limit, pixels, warps, stages in shapes
    ]
    found = list(dict.fromkeys(found))
    if tma and kind == "half" and capability >= (9, 0):
        found = _tma_candidates(capability, c_in, c_out, kernel) + found
    return tuple(found)
