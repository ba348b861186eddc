"""Convolution by pointer loads (cp.async): every GPU, any stride, any alignment.

An implicit GEMM. A program computes a run of pixels of one image, in raster order,
by up to three blocks of output channels, which share the gathered input:

    out[pixels, block] = sum over (tap, channel chunk) of x[pixels + tap, chunk] @ w[chunk, block]

The blocks are powers of two, so that 80 output channels are 64 + 16 and 224 are
128 + 64 + 32, with nothing computed in vain.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    PARTS,
    Launch,
    batch_offset,
    inside_image,
    narrow,
    needs_int64,
    pixel_offsets,
    program_tile,
    scale_shift_relu,
    soft_bf16,
    strides,
    triton_accumulator,
)
from .conv_config import ConvConfig

FEW_CHANNELS = 16
"""Below this many input channels a GEMM step runs across taps: one tap would not fill it."""


@triton.jit
def _input_chunk(
    x_ptr, step, ih, iw, inside, height, width, stride_h, stride_w,
    C_IN: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One chunk of channels of one tap for every pixel: ``[BLOCK_P, BLOCK_K]``."""
    CHUNKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    tap = step // CHUNKS
    h = ih + tap // KERNEL
    w = iw + tap % KERNEL
    c = (step % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets = pixel_offsets(h, w, stride_h, stride_w, WIDE)
    mask = (inside & inside_image(h, w, height, width))[:, None]
    if C_IN % BLOCK_K != 0:
        mask = mask & (c < C_IN)[None, :]
    return tl.load(x_ptr + offsets[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def _input_across_taps(
    x_ptr, step, ih, iw, inside, height, width, stride_h, stride_w,
    C_IN: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_K consecutive (tap, channel) pairs for every pixel: ``[BLOCK_P, BLOCK_K]``."""
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    tap = k // C_IN
    h = ih[:, None] + (tap // KERNEL)[None, :]
    w = iw[:, None] + (tap % KERNEL)[None, :]
    offsets = pixel_offsets(h, w, stride_h, stride_w, WIDE) + (k % C_IN)[None, :]
    mask = inside[:, None] & (k < KERNEL * KERNEL * C_IN)[None, :]
    mask = mask & inside_image(h, w, height, width)
    return tl.load(x_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _multiply_add(
    acc, x, w_ptr, step, first,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr, SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """acc + x @ weights of BLOCK output channels from ``first``: ``[BLOCK_P, BLOCK]``."""
    K_TOTAL: tl.constexpr = KERNEL * KERNEL * C_IN
    # What a step walks along: all taps and channels at once, or the channels of one tap.
    k_limit: tl.constexpr = K_TOTAL if ACROSS else C_IN
    CHUNKS: tl.constexpr = (k_limit + BLOCK_K - 1) // BLOCK_K
    column = (step // CHUNKS) * C_IN
    k = (step % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
    oc = first + tl.arange(0, BLOCK)
    pointers = w_ptr + (oc * K_TOTAL)[None, :] + (column + k)[:, None]  # [BLOCK_K, BLOCK]
    w = tl.load(pointers, mask=(k < k_limit)[:, None] & (oc < C_OUT)[None, :], other=0.0)
    if SOFT_BF16:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _finish(
    acc, scale_ptr, shift_ptr, out_ptr, out_offsets, inside, pool_ptr, first,
    C_OUT: tl.constexpr, BLOCK: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """Scale, shift, ReLU, store ``[BLOCK_P, BLOCK]``, and its sums over the pixels."""
    oc = first + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + oc, mask=oc < C_OUT, other=0.0)
    shift = tl.load(shift_ptr + oc, mask=oc < C_OUT, other=0.0)
    y = scale_shift_relu(acc, scale[None, :], shift[None, :], RELU)
    if POOL:
        # Pixels past the end of the image hold relu(shift), not zero.
        sums = tl.sum(tl.where(inside[:, None], y, 0.0), axis=0)
        tl.store(pool_ptr + oc, sums, mask=oc < C_OUT)
    tl.store(
        out_ptr + out_offsets[:, None] + oc[None, :],
        narrow(y, out_ptr.dtype.element_ty, SOFT_BF16),
        mask=inside[:, None] & (oc < C_OUT)[None, :],
    )


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "tiles"])
def conv_pointer_kernel(
    x_ptr, w_ptr, scale_ptr, shift_ptr, out_ptr, pool_ptr,
    height, width, out_height, out_width, tiles,
    x_stride_n, x_stride_h, x_stride_w, out_stride_n, out_stride_h, out_stride_w,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
    BLOCK_K: tl.constexpr, ACROSS: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of an image by BLOCK_0 + BLOCK_1 + BLOCK_2 channels."""
    BLOCK: tl.constexpr = BLOCK_0 + BLOCK_1 + BLOCK_2
    n, tile, first = program_tile(tiles, C_OUT, BLOCK)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < out_height * out_width
    oh = pixel // out_width
    ow = pixel % out_width
    ih = oh * STRIDE - KERNEL // 2
    iw = ow * STRIDE - KERNEL // 2
    x_ptr += batch_offset(n, x_stride_n)

    acc_0 = tl.zeros((BLOCK_P, BLOCK_0), dtype=ACC)
    if BLOCK_1 > 0:
        acc_1 = tl.zeros((BLOCK_P, BLOCK_1), dtype=ACC)
    if BLOCK_2 > 0:
        acc_2 = tl.zeros((BLOCK_P, BLOCK_2), dtype=ACC)
    RUNS: tl.constexpr = 1 if ACROSS else KERNEL * KERNEL
    RUN: tl.constexpr = KERNEL * KERNEL * C_IN // RUNS
    STEPS: tl.constexpr = RUNS * ((RUN + BLOCK_K - 1) // BLOCK_K)
    # One flat loop over taps and chunks: nested loops would drain the pipeline at every tap.
    for step in tl.range(0, STEPS):
        if ACROSS:
            x = _input_across_taps(
                x_ptr, step, ih, iw, inside, height, width, x_stride_h, x_stride_w,
                C_IN, KERNEL, BLOCK_K, WIDE,
            )  # fmt: skip
        else:
            x = _input_chunk(
                x_ptr, step, ih, iw, inside, height, width, x_stride_h, x_stride_w,
                C_IN, KERNEL, BLOCK_K, WIDE,
            )  # fmt: skip
        acc_0 = _multiply_add(
            acc_0, x, w_ptr, step, first,
            C_IN, C_OUT, KERNEL, BLOCK_0, BLOCK_K, ACROSS, PRECISION, SOFT_BF16,
        )  # fmt: skip
        if BLOCK_1 > 0:
            acc_1 = _multiply_add(
                acc_1, x, w_ptr, step, first + BLOCK_0,
                C_IN, C_OUT, KERNEL, BLOCK_1, BLOCK_K, ACROSS, PRECISION, SOFT_BF16,
            )  # fmt: skip
        if BLOCK_2 > 0:
            acc_2 = _multiply_add(
                acc_2, x, w_ptr, step, first + BLOCK_0 + BLOCK_1,
                C_IN, C_OUT, KERNEL, BLOCK_2, BLOCK_K, ACROSS, PRECISION, SOFT_BF16,
            )  # fmt: skip

    out_ptr += batch_offset(n, out_stride_n)
    out_offsets = pixel_offsets(oh, ow, out_stride_h, out_stride_w, WIDE)
    if POOL:
        pool_ptr += batch_offset(n * tiles + tile, C_OUT)
    _finish(
        acc_0, scale_ptr, shift_ptr, out_ptr, out_offsets, inside, pool_ptr, first,
        C_OUT, BLOCK_0, RELU, POOL, SOFT_BF16,
    )  # fmt: skip
    if BLOCK_1 > 0:
        _finish(
            acc_1, scale_ptr, shift_ptr, out_ptr, out_offsets, inside, pool_ptr,
            first + BLOCK_0, C_OUT, BLOCK_1, RELU, POOL, SOFT_BF16,
        )  # fmt: skip
    if BLOCK_2 > 0:
        _finish(
            acc_2, scale_ptr, shift_ptr, out_ptr, out_offsets, inside, pool_ptr,
            first + BLOCK_0 + BLOCK_1, C_OUT, BLOCK_2, RELU, POOL, SOFT_BF16,
        )  # fmt: skip


def tiles(config: ConvConfig, out: Tensor) -> int:
    """Programs along the pixels of one image of ``out``, ``[N, H, W, C]``."""
    return triton.cdiv(out.shape[1] * out.shape[2], config.pixels)


def plan(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool_partials: Tensor | None,
    tf32: bool,
    config: ConvConfig,
) -> Launch:
    """Decide the launch. Arguments as in :func:`.conv.conv`."""
    c_out, kernel, _, c_in = weight.shape
    num_tiles = tiles(config, out)
    blocks = config.block_out + (0,) * (PARTS - len(config.block_out))
    return Launch(
        conv_pointer_kernel,
        grid=(out.shape[0] * num_tiles * triton.cdiv(c_out, sum(blocks)),),
        args=dict(
            x_ptr=x,
            w_ptr=weight,
            scale_ptr=scale,
            shift_ptr=shift,
            out_ptr=out,
            pool_ptr=pool_partials,
            height=x.shape[1],
            width=x.shape[2],
            out_height=out.shape[1],
            out_width=out.shape[2],
            tiles=num_tiles,
            **strides("x", x),
            **strides("out", out),
        ),
        constants=dict(
            C_IN=c_in,
            C_OUT=c_out,
            KERNEL=kernel,
            STRIDE=stride,
            BLOCK_P=config.pixels,
            BLOCK_0=blocks[0],
            BLOCK_1=blocks[1],
            BLOCK_2=blocks[2],
            BLOCK_K=config.block_k,
            ACROSS=c_in < FEW_CHANNELS,
            RELU=relu,
            POOL=pool_partials is not None,
            PRECISION="tf32" if tf32 else "ieee",
            ACC=triton_accumulator(x.dtype),
            SOFT_BF16=soft_bf16(x.dtype),
            WIDE=needs_int64(x, out),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
