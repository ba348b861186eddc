"""Scale, shift and ReLU, or the statistics, of another library's convolution output."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ._any_size import launched
from ._common import (
    Launch,
    accumulator,
    assert_nhwc,
    assert_packed,
    assert_same,
    cdiv,
    pixelwise,
    same_place,
)
from ._device_functions import (
    batch_offset,
    narrow,
    pixel_offsets,
    program_tile,
    scale_shift_relu,
    store_statistics,
    tile_statistics,
)
from .batch_norm import merge_two

TILE_PIXELS = 256
"""Pixels of a pool partial, and of a part of the statistics."""

_STEP_ELEMENTS = 4096  # What a program holds in registers at a time.


@launched
def epilogue_kernel(
    z_ptr, scale_ptr, shift_ptr, out_ptr, pool_ptr, statistics_ptr, height, width, tiles, vectors,
    z_stride_n, z_stride_h, z_stride_w, out_stride_n, out_stride_h, out_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, STATISTICS: tl.constexpr,
    STORE: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: TILE pixels of an image by BLOCK_C channels, BLOCK_P pixels at a time."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    z_ptr += batch_offset(n, z_stride_n, VECTOR)
    out_ptr += batch_offset(n, out_stride_n, VECTOR)
    if SCALE:
        scale = tl.load(scale_ptr + c, mask=c < channels, other=0.0)[None, :]
        shift = tl.load(shift_ptr + c, mask=c < channels, other=0.0)[None, :]
    count = tl.zeros((BLOCK_C,), dtype=ACC)
    sums = tl.zeros((BLOCK_C,), dtype=ACC)
    squares = tl.zeros((BLOCK_C,), dtype=ACC)
    for step in tl.range(0, TILE // BLOCK_P):
        start = tile * TILE + step * BLOCK_P
        pixel = start + tl.arange(0, BLOCK_P)
        h = pixel // width
        w = pixel % width
        inside = pixel < height * width
        mask = inside[:, None] & (c < channels)[None, :]
        z_offsets = pixel_offsets(h, w, z_stride_h, z_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        y = tl.load(z_ptr + z_offsets, mask=mask, other=0.0).to(ACC)
        if SCALE:
            y = scale_shift_relu(y, scale, shift, RELU)
        if POOL:
            sums += tl.sum(tl.where(mask, y, 0.0), axis=0)
        if STATISTICS:
            more = tl.minimum(tl.maximum(height * width - start, 0), BLOCK_P)
            more, more_sums, more_squares = tile_statistics(y, inside, more, 0)
            count, sums, squares = merge_two(count, sums, squares, more, more_sums, more_squares)
        if STORE:
            offsets = pixel_offsets(h, w, out_stride_h, out_stride_w, VECTOR, WIDE)
            y = narrow(y, out_ptr.dtype.element_ty, SOFT_BF16)
            tl.store(out_ptr + offsets[:, None] + c[None, :], y, mask=mask)
    if POOL:
        tl.store(pool_ptr + batch_offset(n * tiles + tile, channels) + c, sums, mask=c < channels)
    if STATISTICS:
        statistics_ptr += batch_offset(n * tiles + tile, 3 * channels)
        store_statistics(statistics_ptr, count, sums, squares, c, channels)


def pool_tiles(out: Tensor) -> int:
    """Number of partials an image for an ``out`` of ``[N, H, W, C]``."""
    return cdiv(out.shape[1] * out.shape[2], TILE_PIXELS)


def plan(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    relu: bool = True,
    pool_partials: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Launch:
    """Decide the launch of :func:`epilogue` without running it. Nothing may be empty."""
    n, _, _, c = z.shape
    assert_nhwc("z", z)
    assert_nhwc("out", out, *z.shape)
    assert_same("out", out, z)
    if scale is None or shift is None:
        assert (scale, shift, relu) == (None, None, False), "scale, shift, ReLU come together"
    else:
        assert_packed("scale", scale, (c,), accumulator(z.dtype))
        assert_packed("shift", shift, (c,), accumulator(z.dtype))
    tiles = pool_tiles(out)
    if pool_partials is not None:
        assert_packed("pool_partials", pool_partials, (n, tiles, c), accumulator(z.dtype))
    if statistics is not None:
        assert scale is None, "statistics are those of z: a batch norm's scale follows from them"
        assert_packed("statistics", statistics, (n, tiles, 3, c), accumulator(z.dtype))
    return pixelwise(
        epilogue_kernel,
        dict(z=z, out=out),
        elements=_STEP_ELEMENTS,
        tile=TILE_PIXELS,
        args=dict(
            scale_ptr=scale,
            shift_ptr=shift,
            pool_ptr=pool_partials,
            statistics_ptr=statistics,
        ),
        constants=dict(
            TILE=TILE_PIXELS,
            SCALE=scale is not None,
            RELU=relu,
            POOL=pool_partials is not None,
            STATISTICS=statistics is not None,
            STORE=scale is not None or not same_place(out, z),
        ),
    )


def epilogue(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    relu: bool = True,
    pool_partials: Tensor | None = None,
    statistics: Tensor | None = None,
) -> None:
    """out = relu(z * scale + shift), computed in fp32 (fp64 for fp64).

    Args:
        z: ``[N, H, W, C]`` view, a convolution's raw output.
        scale: ``[C]``, fp32 (fp64 for fp64).
        shift: as ``scale``. Both may be None, for a copy without ReLU.
        out: as ``z``, same dtype; may be ``z`` itself, which is then not copied.
        relu: apply it; NaN stays NaN.
        pool_partials: ``[N, T, C]``, dtype of sums, contiguous, with T from
            :func:`pool_tiles`: sums over pixels as in :func:`.conv.conv`.
        statistics: ``[N, T, 3, C]``, likewise, of a ``z`` without scale and shift.
    """
    if out.numel() == 0:
        return
    plan(z, scale, shift, out, relu=relu, pool_partials=pool_partials, statistics=statistics).run(
        z.device
    )
