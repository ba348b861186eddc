"""Convolution in int8 and fp8 by pointer loads (cp.async): every GPU that has the products.

An implicit GEMM, tiled and stepped as :mod:`.conv_pointer` does it, whose loads and products
these are. What differs is the accumulator, which is int32 for int8, and what happens to it at the
end: see :mod:`._eight_bits`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import fp8
from ._any_size import launched, next_chunk, strides, within
from ._common import PARTS, Launch, cdiv, needs_int64
from ._device_functions import batch_offset, pixel_offsets, program_tile
from ._eight_bits import biased, common_vector, multiply_add, rounded, signed
from .conv_config import ConvConfig
from .conv_eight_bits_config import EightBits
from .conv_pointer import FEW_CHANNELS, _input_across_taps, _input_chunk


@triton.jit
def _multiply_add(
    acc, x, w_ptr, begin, k, limit, first, k_total, c_out,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """As :func:`.conv_pointer._multiply_add`."""
    k += tl.arange(0, BLOCK_K)
    oc = first + tl.arange(0, BLOCK)
    pointers = w_ptr + (oc * k_total)[None, :] + (begin + k)[:, None]  # [BLOCK_K, BLOCK]
    if TAIL or OUT_TAIL:
        mask = within(k, limit, TAIL)[:, None] & within(oc, c_out, OUT_TAIL)[None, :]
        w = tl.load(pointers, mask=mask, other=0.0)
    else:
        w = tl.load(pointers)
    return multiply_add(acc, x, w, FP8, BLOCK_K)


@triton.jit
def _finish(
    acc, bias_ptr, sums_ptr, multiplier_ptr, unit_ptr, pool_ptr, out_ptr, out_offsets,
    feature_ptr, feature_offsets, inside, first, c_out, levels,
    BLOCK: tl.constexpr, OUT_TAIL: tl.constexpr, OUT: tl.constexpr, FEATURE: tl.constexpr,
    POOL: tl.constexpr, OFFSET: tl.constexpr, INT8: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Store the tile as activations, as a feature, or as both, and sums of the activations."""
    oc = first + tl.arange(0, BLOCK)
    exist = within(oc, c_out, OUT_TAIL)
    mask = inside[:, None] & exist[None, :]
    bias = tl.load(bias_ptr + oc, mask=exist, other=0.0)
    if OFFSET:
        bias += 128 * tl.load(sums_ptr + oc, mask=exist, other=0.0)
    acc = biased(acc, bias[None, :], INT8)
    if FEATURE:
        unit = tl.load(unit_ptr + oc, mask=exist, other=0.0)
        y = tl.maximum(acc * unit[None, :], 0.0)
        tl.store(feature_ptr + feature_offsets[:, None] + oc[None, :], y, mask=mask)
    if OUT:
        multiplier = tl.load(multiplier_ptr + oc, mask=exist, other=0.0)
        y = acc * multiplier[None, :]
        y = rounded(y, 0.0, levels, out_ptr.dtype.element_ty, INT8, SOFT)
        tl.store(out_ptr + out_offsets[:, None] + oc[None, :], y, mask=mask)
        if POOL:
            kept = tl.where(inside[:, None], y.to(pool_ptr.dtype.element_ty), 0)
            tl.store(pool_ptr + oc, tl.sum(kept, axis=0), mask=exist)


@launched
def conv_eight_bits_pointer_kernel(
    x_ptr, w_ptr, bias_ptr, sums_ptr, multiplier_ptr, unit_ptr, pool_ptr, out_ptr, feature_ptr,
    height, width, out_height, out_width, tiles, in_vectors, out_vectors, levels,
    x_stride_n, x_stride_h, x_stride_w, out_stride_n, out_stride_h, out_stride_w,
    feature_stride_n, feature_stride_h, feature_stride_w,
    IN_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
    BLOCK_K: tl.constexpr, ACROSS: tl.constexpr, TAIL: tl.constexpr, OUT_TAIL: tl.constexpr,
    OUT: tl.constexpr, FEATURE: tl.constexpr, POOL: tl.constexpr, OFFSET: tl.constexpr,
    HALVES: tl.constexpr, INT8: tl.constexpr, FP8: tl.constexpr, ACC: tl.constexpr,
    SOFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of an image by BLOCK_0 + BLOCK_1 + BLOCK_2 channels.

    OFFSET: bytes are those of 255 levels. HALVES: the input is int16, and fp16 in products.
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
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < out_height * out_width
    oh = pixel // out_width
    ow = pixel % out_width
    # Of pixels past the last one all taps are outside the image.
    ih = tl.where(inside, oh * STRIDE - KERNEL // 2, -KERNEL)
    iw = ow * STRIDE - KERNEL // 2
    x_ptr += batch_offset(n, x_stride_n, IN_VECTOR)

    acc_0 = tl.zeros((BLOCK_P, BLOCK_0), dtype=ACC)
    if BLOCK_1 > 0:
        acc_1 = tl.zeros((BLOCK_P, BLOCK_1), dtype=ACC)
    if BLOCK_2 > 0:
        acc_2 = tl.zeros((BLOCK_P, BLOCK_2), dtype=ACC)
    tap = 0
    c = 0
    for _ in tl.range(0, STEP_KERNEL * STEP_KERNEL * tl.cdiv(c_in, BLOCK_K)):
        if ACROSS > 0:
            x = _input_across_taps(
                x_ptr, c, ih, iw, height, width, x_stride_h, x_stride_w,
                ACROSS, IN_VECTOR, KERNEL, BLOCK_K, WIDE,
            )  # fmt: skip
        else:
            x = _input_chunk(
                x_ptr, c, ih + tap // KERNEL, iw + tap % KERNEL, height, width,
                x_stride_h, x_stride_w, c_in, IN_VECTOR, BLOCK_K, TAIL, WIDE,
            )  # fmt: skip
        if OFFSET:
            x = x ^ -128
        if HALVES:
            x = x.to(tl.float16)
        begin = tap * c_in
        acc_0 = _multiply_add(
            acc_0, x, w_ptr, begin, c, c_in, first,
            k_total, c_out, BLOCK_0, BLOCK_K, TAIL, OUT_TAIL, FP8,
        )  # fmt: skip
        if BLOCK_1 > 0:
            acc_1 = _multiply_add(
                acc_1, x, w_ptr, begin, c, c_in, first + BLOCK_0,
                k_total, c_out, BLOCK_1, BLOCK_K, TAIL, OUT_TAIL, FP8,
            )  # fmt: skip
        if BLOCK_2 > 0:
            acc_2 = _multiply_add(
                acc_2, x, w_ptr, begin, c, c_in, first + BLOCK_0 + BLOCK_1,
                k_total, c_out, BLOCK_2, BLOCK_K, TAIL, OUT_TAIL, FP8,
            )  # fmt: skip
        tap, c = next_chunk(tap, c, c_in, STEP_KERNEL, BLOCK_K)

    # Found out anew: kept over the loop, it would cost registers there.
    inside = oh < out_height
    levels = levels.to(tl.float32)
    out_offsets = pixel_offsets(oh, ow, out_stride_h, out_stride_w, OUT_VECTOR, WIDE)
    feature_offsets = pixel_offsets(oh, ow, feature_stride_h, feature_stride_w, OUT_VECTOR, WIDE)
    if OUT:
        out_ptr += batch_offset(n, out_stride_n, OUT_VECTOR)
    if FEATURE:
        feature_ptr += batch_offset(n, feature_stride_n, OUT_VECTOR)
    if POOL:
        pool_ptr += batch_offset(n * tiles + tile, c_out)
    _finish(
        acc_0, bias_ptr, sums_ptr, multiplier_ptr, unit_ptr, pool_ptr, out_ptr, out_offsets,
        feature_ptr, feature_offsets, inside, first, c_out, levels,
        BLOCK_0, OUT_TAIL, OUT, FEATURE, POOL, OFFSET, INT8, SOFT,
    )  # fmt: skip
    if BLOCK_1 > 0:
        _finish(
            acc_1, bias_ptr, sums_ptr, multiplier_ptr, unit_ptr, pool_ptr, out_ptr, out_offsets,
            feature_ptr, feature_offsets, inside, first + BLOCK_0, c_out, levels,
            BLOCK_1, OUT_TAIL, OUT, FEATURE, POOL, OFFSET, INT8, SOFT,
        )  # fmt: skip
    if BLOCK_2 > 0:
        _finish(
            acc_2, bias_ptr, sums_ptr, multiplier_ptr, unit_ptr, pool_ptr, out_ptr, out_offsets,
            feature_ptr, feature_offsets, inside, first + BLOCK_0 + BLOCK_1, c_out, levels,
            BLOCK_2, OUT_TAIL, OUT, FEATURE, POOL, OFFSET, INT8, SOFT,
        )  # fmt: skip


def tiles(config: ConvConfig, out: Tensor) -> int:
    """Programs along the pixels of one image of ``out``, ``[N, H, W, C]``."""
    return cdiv(out.shape[1] * out.shape[2], config.pixels)


def plan(
    x: Tensor, weight: Tensor, epilogue: EightBits, *, stride: int, config: ConvConfig
) -> Launch:
    """Decide the launch. Arguments as in :func:`.conv_eight_bits.plan`."""
    target = epilogue.target
    c_out, kernel, _, c_in = weight.shape
    num_tiles = tiles(config, target)
    blocks = config.block_out + (0,) * (PARTS - len(config.block_out))
    in_vector = min(common_vector(x), common_vector(weight))
    out_vector = common_vector(*epilogue.views())
    across = c_in if c_in < FEW_CHANNELS else 0
    absent = target if epilogue.out is None else epilogue.out
    features = target if epilogue.feature is None else epilogue.feature
    return Launch(
        conv_eight_bits_pointer_kernel,
        grid=(target.shape[0] * num_tiles * cdiv(c_out, sum(blocks)),),
        args=dict(
            x_ptr=signed(x),
            w_ptr=weight,
            **epilogue.args(),
            out_ptr=epilogue.out,
            feature_ptr=epilogue.feature,
            height=x.shape[1],
            width=x.shape[2],
            out_height=target.shape[1],
            out_width=target.shape[2],
            tiles=num_tiles,
            in_vectors=c_in // in_vector,
            out_vectors=c_out // out_vector,
            **strides("x", x, in_vector),
            **strides("out", absent, out_vector),
            **strides("feature", features, out_vector),
        ),
        constants=dict(
            IN_VECTOR=in_vector,
            OUT_VECTOR=out_vector,
            KERNEL=kernel,
            STRIDE=stride,
            BLOCK_P=config.pixels,
            BLOCK_0=blocks[0],
            BLOCK_1=blocks[1],
            BLOCK_2=blocks[2],
            BLOCK_K=config.block_k,
            ACROSS=across,
            TAIL=(across * kernel * kernel or c_in) % config.block_k != 0,
            OUT_TAIL=c_out % sum(blocks) != 0,
            **epilogue.constants(),
            HALVES=x.dtype == torch.int16,
            FP8=weight.dtype == fp8.ACTIVATION,
            ACC=tl.int32 if weight.dtype == torch.int8 else tl.float32,
            WIDE=needs_int64(x, *epilogue.views()),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
