"""Convolution by pointer loads (cp.async): every GPU, any stride, any alignment.

An implicit GEMM. A program computes a run of pixels of one image, in raster order,
by up to three blocks of output channels, which share the gathered input:

    out[pixels, block] = sum over (tap, channel chunk) of x[pixels + tap, chunk] @ w[chunk, block]

The blocks are powers of two, so that 80 output channels are 64 + 16 and 224 are
128 + 64 + 32, with nothing computed in vain.

The input gradient of a convolution with a stride of 2 gathers as well. An input pixel has
met the taps that put it under an output pixel, which its row's and its column's parity
decide: of a 3x3 one, two or four taps. A program computes pixels of one parity, so that
no product with a tap that they never met is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._any_size import launched, next_chunk, strides, vector, within
from ._common import PARTS, Launch, cdiv, needs_int64, soft_bf16, triton_accumulator
from ._device_functions import (
    batch_offset,
    inside_image,
    narrow,
    pixel_offsets,
    program_tile,
    relu_gradient,
    scale_shift_relu,
    store_statistics,
    tile_statistics,
)
from .conv_config import ConvConfig, Epilogue

FEW_CHANNELS = 16
"""Below this many input channels a GEMM step runs across taps: one tap would not fill it."""


@triton.jit
def _input_chunk(
    x_ptr, c, h, w, height, width, stride_h, stride_w, c_in,
    VECTOR: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_K channels of pixels (h, w) from c on: ``[BLOCK_P, BLOCK_K]``."""
    c += tl.arange(0, BLOCK_K)
    offsets = pixel_offsets(h, w, stride_h, stride_w, VECTOR, WIDE)
    mask = inside_image(h, w, height, width)[:, None]
    if TAIL:
        mask = mask & (c < c_in)[None, :]
    return tl.load(x_ptr + offsets[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def _input_across_taps(
    x_ptr, k, ih, iw, height, width, stride_h, stride_w,
    C_IN: tl.constexpr, VECTOR: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_K (tap, channel) pairs of every pixel, from k on: ``[BLOCK_P, BLOCK_K]``."""
    k += tl.arange(0, BLOCK_K)
    tap = k // C_IN
    h = ih[:, None] + (tap // KERNEL)[None, :]
    w = iw[:, None] + (tap % KERNEL)[None, :]
    offsets = pixel_offsets(h, w, stride_h, stride_w, VECTOR, WIDE) + (k % C_IN)[None, :]
    mask = (k < KERNEL * KERNEL * C_IN)[None, :] & inside_image(h, w, height, width)
    return tl.load(x_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _multiply_add(
    acc, x, w_ptr, begin, k, limit, first, k_total, c_out,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr,
    PRECISION: tl.constexpr, SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """acc + x @ weights of BLOCK output channels from ``first``: ``[BLOCK_P, BLOCK]``.

    A row of the weights has ``k_total``. Of the ``limit`` from ``begin`` on these are BLOCK_K
    from k on.
    """
    k += tl.arange(0, BLOCK_K)
    oc = first + tl.arange(0, BLOCK)
    pointers = w_ptr + (oc * k_total)[None, :] + (begin + k)[:, None]  # [BLOCK_K, BLOCK]
    if TAIL or OUT_TAIL:
        mask = within(k, limit, TAIL)[:, None] & within(oc, c_out, OUT_TAIL)[None, :]
        w = tl.load(pointers, mask=mask, other=0.0)
    else:
        w = tl.load(pointers)
    if SOFT_BF16:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _finish(
    acc, scale_ptr, shift_ptr, pool_ptr, add_ptr, add_offsets, mask_ptr, mask_offsets,
    out_ptr, out_offsets, statistics_ptr, inside, count, first, c_out, added, masked,
    BLOCK: tl.constexpr, OUT_TAIL: tl.constexpr, SCALE: tl.constexpr, RELU: tl.constexpr,
    POOL: tl.constexpr, ADD: tl.constexpr, MASK: tl.constexpr, PARTIAL: tl.constexpr,
    STATISTICS: tl.constexpr, SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """Store the tile after its epilogue; :class:`.conv_config.Epilogue` says what that may be.

    Pixels past the end of the image, which are not ``inside``, hold anything. For
    statistics, ``count`` of them are.
    """
    oc = first + tl.arange(0, BLOCK)
    exist = within(oc, c_out, OUT_TAIL)
    y = acc
    if SCALE:
        scale = tl.load(scale_ptr + oc, mask=exist, other=0.0)
        shift = tl.load(shift_ptr + oc, mask=exist, other=0.0)
        y = scale_shift_relu(y, scale[None, :], shift[None, :], RELU)
    if POOL:
        sums = tl.sum(tl.where(inside[:, None], y, 0.0), axis=0)
        tl.store(pool_ptr + oc, sums, mask=exist)
    if ADD:
        pointers = add_ptr + add_offsets[:, None] + oc[None, :]
        mask = inside[:, None] & (oc < added if PARTIAL else exist)[None, :]
        y += tl.load(pointers, mask=mask, other=0.0).to(y.dtype)
    if MASK:
        channel, there = oc, exist
        if PARTIAL:
            channel = oc - (c_out - masked)
            there = (channel >= 0) & (channel < masked)
        pointers = mask_ptr + mask_offsets[:, None] + channel[None, :]
        mask = inside[:, None] & there[None, :]
        y = relu_gradient(y, tl.load(pointers, mask=mask, other=1.0).to(y.dtype))
    y = narrow(y, out_ptr.dtype.element_ty, SOFT_BF16)
    mask = inside[:, None] & exist[None, :]
    tl.store(out_ptr + out_offsets[:, None] + oc[None, :], y, mask=mask)
    if STATISTICS:
        count, sums, squares = tile_statistics(y.to(acc.dtype), inside, count, 0)
        store_statistics(statistics_ptr, count, sums, squares, oc, c_out)


@launched
def conv_pointer_kernel(
    x_ptr, w_ptr, scale_ptr, shift_ptr, pool_ptr, add_ptr, mask_ptr, out_ptr, statistics_ptr,
    height, width, out_height, out_width, tiles, in_vectors, out_vectors, added, masked,
    x_stride_n, x_stride_h, x_stride_w, add_stride_n, add_stride_h, add_stride_w,
    mask_stride_n, mask_stride_h, mask_stride_w, out_stride_n, out_stride_h, out_stride_w,
    IN_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
    BLOCK_K: tl.constexpr, ACROSS: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr,
    SCALE: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, ADD: tl.constexpr,
    MASK: tl.constexpr, PARTIAL: tl.constexpr, STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of an image by BLOCK_0 + BLOCK_1 + BLOCK_2 channels.

    ACROSS is the number of input channels where steps run across taps, else 0; with PARTIAL
    not all channels are added to or masked.
    """
    BLOCK: tl.constexpr = BLOCK_0 + BLOCK_1 + BLOCK_2
    c_out = out_vectors * OUT_VECTOR
    n, tile, first = program_tile(tiles, c_out, BLOCK)
    # Steps across taps are those of a single one.
    STEP_KERNEL: tl.constexpr = 1 if ACROSS > 0 else KERNEL
    c_in = in_vectors * IN_VECTOR
    if ACROSS > 0:
        c_in = KERNEL * KERNEL * ACROSS
    k_total = STEP_KERNEL * STEP_KERNEL * c_in
    chunks = tl.cdiv(c_in, BLOCK_K)
    if TRANSPOSED:
        # The four parities of one tile are neighbours: they read the same pixels. Output
        # pixel (2i + odd_h, 2j + odd_w) met input pixels (i + row, j + column).
        odd_h = tile // 2 % 2
        odd_w = tile % 2
        columns = tl.maximum((out_width + 1 - odd_w) // 2, 1)
        pixel = tile // 4 * BLOCK_P + tl.arange(0, BLOCK_P)
        ih = pixel // columns
        iw = pixel % columns
        oh = 2 * ih + odd_h
        ow = 2 * iw + odd_w
        inside = inside_image(oh, ow, out_height, out_width)
        if KERNEL == 1:
            steps = (1 - odd_h) * (1 - odd_w) * chunks
        else:
            steps = (1 + odd_h) * (1 + odd_w) * chunks
    else:
        pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = pixel < out_height * out_width
        oh = pixel // out_width
        ow = pixel % out_width
        ih = oh * STRIDE - KERNEL // 2
        iw = ow * STRIDE - KERNEL // 2
        steps = STEP_KERNEL * STEP_KERNEL * chunks
    # Of pixels past the last one all taps are outside the image.
    ih = tl.where(inside, ih, -KERNEL)
    x_ptr += batch_offset(n, x_stride_n, IN_VECTOR)

    acc_0 = tl.zeros((BLOCK_P, BLOCK_0), dtype=ACC)
    if BLOCK_1 > 0:
        acc_1 = tl.zeros((BLOCK_P, BLOCK_1), dtype=ACC)
    if BLOCK_2 > 0:
        acc_2 = tl.zeros((BLOCK_P, BLOCK_2), dtype=ACC)
    # One flat loop over taps and chunks: nested loops would drain the pipeline at every tap.
    tap = 0
    c = 0
    for _ in tl.range(0, steps):
        weights = tap
        if ACROSS > 0:
            x = _input_across_taps(
                x_ptr, c, ih, iw, height, width, x_stride_h, x_stride_w,
                ACROSS, IN_VECTOR, KERNEL, BLOCK_K, WIDE,
            )  # fmt: skip
        else:
            if TRANSPOSED:
                # There are 1 + odd_w columns of taps, and those of the weights are flipped.
                row = tap >> odd_w
                column = tap & odd_w
                if KERNEL == 3:
                    weights = (1 - odd_h + 2 * row) * 3 + 1 - odd_w + 2 * column
            else:
                row = tap // KERNEL
                column = tap % KERNEL
            x = _input_chunk(
                x_ptr, c, ih + row, iw + column, height, width,
                x_stride_h, x_stride_w, c_in, IN_VECTOR, BLOCK_K, TAIL, WIDE,
            )  # fmt: skip
        begin = weights * c_in
        acc_0 = _multiply_add(
            acc_0, x, w_ptr, begin, c, c_in, first,
            k_total, c_out, BLOCK_0, BLOCK_K, TAIL, OUT_TAIL, PRECISION, SOFT_BF16,
        )  # fmt: skip
        if BLOCK_1 > 0:
            acc_1 = _multiply_add(
                acc_1, x, w_ptr, begin, c, c_in, first + BLOCK_0,
                k_total, c_out, BLOCK_1, BLOCK_K, TAIL, OUT_TAIL, PRECISION, SOFT_BF16,
            )  # fmt: skip
        if BLOCK_2 > 0:
            acc_2 = _multiply_add(
                acc_2, x, w_ptr, begin, c, c_in, first + BLOCK_0 + BLOCK_1,
                k_total, c_out, BLOCK_2, BLOCK_K, TAIL, OUT_TAIL, PRECISION, SOFT_BF16,
            )  # fmt: skip
        tap, c = next_chunk(tap, c, c_in, STEP_KERNEL, BLOCK_K)

    # Found out anew: kept over the loop, it would cost registers there.
    inside = oh < out_height
    if TRANSPOSED:
        inside = inside_image(oh, ow, out_height, out_width)
    count = tl.minimum(out_height * out_width - tile * BLOCK_P, BLOCK_P)
    added *= OUT_VECTOR
    masked *= OUT_VECTOR
    out_ptr += batch_offset(n, out_stride_n, OUT_VECTOR)
    out_offsets = pixel_offsets(oh, ow, out_stride_h, out_stride_w, OUT_VECTOR, WIDE)
    add_offsets = pixel_offsets(oh, ow, add_stride_h, add_stride_w, OUT_VECTOR, WIDE)
    mask_offsets = pixel_offsets(oh, ow, mask_stride_h, mask_stride_w, OUT_VECTOR, WIDE)
    if POOL:
        pool_ptr += batch_offset(n * tiles + tile, c_out)
    if ADD:
        add_ptr += batch_offset(n, add_stride_n, OUT_VECTOR)
    if MASK:
        mask_ptr += batch_offset(n, mask_stride_n, OUT_VECTOR)
    if STATISTICS:
        statistics_ptr += batch_offset(n * tiles + tile, 3 * c_out)
    _finish(
        acc_0, scale_ptr, shift_ptr, pool_ptr, add_ptr, add_offsets, mask_ptr, mask_offsets,
        out_ptr, out_offsets, statistics_ptr, inside, count, first, c_out, added, masked,
        BLOCK_0, OUT_TAIL, SCALE, RELU, POOL, ADD, MASK, PARTIAL, STATISTICS, SOFT_BF16,
    )  # fmt: skip
    if BLOCK_1 > 0:
        _finish(
            acc_1, scale_ptr, shift_ptr, pool_ptr, add_ptr, add_offsets, mask_ptr, mask_offsets,
            out_ptr, out_offsets, statistics_ptr, inside, count, first + BLOCK_0,
            c_out, added, masked, BLOCK_1, OUT_TAIL, SCALE, RELU, POOL, ADD, MASK,
            PARTIAL, STATISTICS, SOFT_BF16,
        )  # fmt: skip
    if BLOCK_2 > 0:
        _finish(
            acc_2, scale_ptr, shift_ptr, pool_ptr, add_ptr, add_offsets, mask_ptr, mask_offsets,
            out_ptr, out_offsets, statistics_ptr, inside, count, first + BLOCK_0 + BLOCK_1,
            c_out, added, masked, BLOCK_2, OUT_TAIL, SCALE, RELU, POOL, ADD, MASK,
            PARTIAL, STATISTICS, SOFT_BF16,
        )  # fmt: skip


def tiles(config: ConvConfig, out: Tensor) -> int:
    """Programs along the pixels of one image of ``out``, ``[N, H, W, C]``."""
    return cdiv(out.shape[1] * out.shape[2], config.pixels)


def plan(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    *,
    stride: int,
    tf32: bool,
    config: ConvConfig,
    transposed: bool = False,
) -> Launch:
    """Decide the launch. Arguments as in :func:`.conv.conv`.

    With ``transposed``, those of :func:`.conv.input_grad` with a stride of 2.
    """
    assert stride == 2 or not transposed, "with a stride of 1 it is a convolution"
    c_out, kernel, _, c_in = weight.shape
    num_tiles = tiles(config, out)
    if transposed:
        num_tiles = 4 * tiles(config, out[:, ::2, ::2])
    blocks = config.block_out + (0,) * (PARTS - len(config.block_out))
    in_vector, out_vector = vector(x, weight), vector(out, *epilogue.views())
    across = c_in if c_in < FEW_CHANNELS and not transposed else 0
    return Launch(
        conv_pointer_kernel,
        grid=(out.shape[0] * num_tiles * cdiv(c_out, sum(blocks)),),
        args=dict(
            x_ptr=x,
            w_ptr=weight,
            out_ptr=out,
            add_ptr=epilogue.add,
            mask_ptr=epilogue.mask,
            **epilogue.args(),
            height=x.shape[1],
            width=x.shape[2],
            out_height=out.shape[1],
            out_width=out.shape[2],
            tiles=num_tiles,
            in_vectors=c_in // in_vector,
            out_vectors=c_out // out_vector,
            added=0 if epilogue.add is None else epilogue.add.shape[3] // out_vector,
            masked=0 if epilogue.mask is None else epilogue.mask.shape[3] // out_vector,
            **strides("x", x, in_vector),
            **strides("add", out if epilogue.add is None else epilogue.add, out_vector),
            **strides("mask", out if epilogue.mask is None else epilogue.mask, out_vector),
            **strides("out", out, out_vector),
        ),
        constants=dict(
            IN_VECTOR=in_vector,
            OUT_VECTOR=out_vector,
            KERNEL=kernel,
            STRIDE=stride,
            TRANSPOSED=transposed,
            BLOCK_P=config.pixels,
            BLOCK_0=blocks[0],
            BLOCK_1=blocks[1],
            BLOCK_2=blocks[2],
            BLOCK_K=config.block_k,
            ACROSS=across,
            TAIL=(across * kernel * kernel or c_in) % config.block_k != 0,
            OUT_TAIL=c_out % sum(blocks) != 0,
            **epilogue.constants(),
            PARTIAL=any(view.shape[3] < c_out for view in epilogue.views()),
            PRECISION="tf32" if tf32 else "ieee",
            ACC=triton_accumulator(x.dtype),
            SOFT_BF16=soft_bf16(x.dtype),
            WIDE=needs_int64(x, out, *epilogue.views()),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
