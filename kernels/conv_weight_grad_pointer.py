"""Weight gradient by pointer loads (cp.async): every GPU, any stride, any alignment.

A matrix product along the pixels. A program computes a block of columns, (tap, input
channel) pairs, by up to three blocks of output channels, which share the gathered input,
over one split of the pixels of all images:

    products[split, columns, block] = sum over pixels of x[pixel + tap, channel] * g[pixel, block]

The columns are those of all taps in a row, so that 80 input channels waste nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._any_size import carry, launched, strides, vector, within
from ._common import PARTS, Launch, cdiv, needs_int64, soft_bf16, triton_accumulator
from ._device_functions import batch_offset, inside_image, pixel_offsets
from .conv_weight_grad_config import WeightGradConfig, column_groups
from .conv_weight_grad_finish import sum_channels


@triton.jit
def _multiply_add(
    acc, x, g_ptr, offsets, inside, first, c_out,
    BLOCK: tl.constexpr, OUT_TAIL: tl.constexpr, PRECISION: tl.constexpr, SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """acc + x @ gradient of BLOCK output channels from ``first``: ``[COLUMNS, BLOCK]``."""
    oc = first + tl.arange(0, BLOCK)
    mask = inside[:, None] & within(oc, c_out, OUT_TAIL)[None, :]
    g = tl.load(g_ptr + offsets[:, None] + oc[None, :], mask=mask, other=0.0)
    if SOFT_BF16:
        x = x.to(tl.float32)
        g = g.to(tl.float32)
    return tl.dot(x, g, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _store(
    acc, products_ptr, column, first, k_total, c_out,
    BLOCK: tl.constexpr, IN_TAIL: tl.constexpr, OUT_TAIL: tl.constexpr,
):  # fmt: skip
    oc = first + tl.arange(0, BLOCK)
    mask = within(column, k_total, IN_TAIL)[:, None] & within(oc, c_out, OUT_TAIL)[None, :]
    tl.store(products_ptr + (column * c_out)[:, None] + oc[None, :], acc, mask=mask)


@launched
def conv_weight_grad_pointer_kernel(
    x_ptr, g_ptr, products_ptr, sums_ptr, batch, height, width, out_height, out_width, each,
    in_vectors, out_vectors, x_stride_n, x_stride_h, x_stride_w, g_stride_n, g_stride_h, g_stride_w,
    IN_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
    BLOCK_P: tl.constexpr, IN_TAIL: tl.constexpr, OUT_TAIL: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns by BLOCK_0 + BLOCK_1 + BLOCK_2 channels of a split.

    The programs past the last column sum the gradient instead, for the shift.
    """
    c_in = in_vectors * IN_VECTOR
    c_out = out_vectors * OUT_VECTOR
    k_total = KERNEL * KERNEL * c_in
    first = tl.program_id(1) * (BLOCK_0 + BLOCK_1 + BLOCK_2)
    split = tl.program_id(2)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        sum_channels(
            g_ptr, sums_ptr, split, tl.num_programs(2), first, batch, out_height, out_width,
            g_stride_n, g_stride_h, g_stride_w, c_out, OUT_VECTOR, BLOCK_0, OUT_TAIL, ACC, WIDE,
        )  # fmt: skip
        if BLOCK_1 > 0:
            sum_channels(
                g_ptr, sums_ptr, split, tl.num_programs(2), first + BLOCK_0,
                batch, out_height, out_width,
                g_stride_n, g_stride_h, g_stride_w, c_out, OUT_VECTOR, BLOCK_1, OUT_TAIL, ACC, WIDE,
            )  # fmt: skip
        if BLOCK_2 > 0:
            sum_channels(
                g_ptr, sums_ptr, split, tl.num_programs(2), first + BLOCK_0 + BLOCK_1,
                batch, out_height, out_width,
                g_stride_n, g_stride_h, g_stride_w, c_out, OUT_VECTOR, BLOCK_2, OUT_TAIL, ACC, WIDE,
            )  # fmt: skip
    else:
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        tap = column // c_in
        channel = column % c_in
        tap_h = tap // KERNEL - KERNEL // 2
        tap_w = tap % KERNEL - KERNEL // 2
        # Of columns past the last one all pixels are outside the image.
        tap_h = tl.where(within(column, k_total, IN_TAIL), tap_h, -height - KERNEL)
        tiles = tl.cdiv(out_height * out_width, BLOCK_P)
        acc_0 = tl.zeros((COLUMNS, BLOCK_0), dtype=ACC)
        if BLOCK_1 > 0:
            acc_1 = tl.zeros((COLUMNS, BLOCK_1), dtype=ACC)
        if BLOCK_2 > 0:
            acc_2 = tl.zeros((COLUMNS, BLOCK_2), dtype=ACC)
        last = tl.minimum((split + 1) * each, batch * tiles)
        n = split * each // tiles
        tile = split * each % tiles
        for _ in tl.range(split * each, last):
            pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            inside = pixel < out_height * out_width
            oh = pixel // out_width
            ow = pixel % out_width
            h = (oh * STRIDE)[None, :] + tap_h[:, None]
            w = (ow * STRIDE)[None, :] + tap_w[:, None]
            mask = inside[None, :] & inside_image(h, w, height, width)
            # [COLUMNS, BLOCK_P], as the product takes it: transposed it would not be pipelined.
            offsets = pixel_offsets(h, w, x_stride_h, x_stride_w, IN_VECTOR, WIDE)
            x_image = x_ptr + batch_offset(n, x_stride_n, IN_VECTOR)
            x = tl.load(x_image + offsets + channel[:, None], mask=mask, other=0.0)
            g_image = g_ptr + batch_offset(n, g_stride_n, OUT_VECTOR)
            g_offsets = pixel_offsets(oh, ow, g_stride_h, g_stride_w, OUT_VECTOR, WIDE)
            acc_0 = _multiply_add(
                acc_0, x, g_image, g_offsets, inside, first, c_out,
                BLOCK_0, OUT_TAIL, PRECISION, SOFT_BF16,
            )  # fmt: skip
            if BLOCK_1 > 0:
                acc_1 = _multiply_add(
                    acc_1, x, g_image, g_offsets, inside, first + BLOCK_0, c_out,
                    BLOCK_1, OUT_TAIL, PRECISION, SOFT_BF16,
                )  # fmt: skip
            if BLOCK_2 > 0:
                acc_2 = _multiply_add(
                    acc_2, x, g_image, g_offsets, inside, first + BLOCK_0 + BLOCK_1, c_out,
                    BLOCK_2, OUT_TAIL, PRECISION, SOFT_BF16,
                )  # fmt: skip
            n, tile = carry(n, tile + 1, tiles)
        products_ptr += batch_offset(split, k_total * c_out)
        _store(acc_0, products_ptr, column, first, k_total, c_out, BLOCK_0, IN_TAIL, OUT_TAIL)
        if BLOCK_1 > 0:
            first += BLOCK_0
            _store(acc_1, products_ptr, column, first, k_total, c_out, BLOCK_1, IN_TAIL, OUT_TAIL)
        if BLOCK_2 > 0:
            first += BLOCK_1
            _store(acc_2, products_ptr, column, first, k_total, c_out, BLOCK_2, IN_TAIL, OUT_TAIL)


def steps(config: WeightGradConfig, g: Tensor) -> int:
    """Steps that cover the pixels of all images of ``g``, ``[N, H, W, C]``."""
    return g.shape[0] * cdiv(g.shape[1] * g.shape[2], config.pixels)


def plan(
    x: Tensor,
    g: Tensor,
    products: Tensor,
    sums: Tensor,
    *,
    kernel: int,
    stride: int,
    each: int,
    tf32: bool,
    config: WeightGradConfig,
) -> Launch:
    """Decide the launch. Arguments as in :func:`.conv_weight_grad.plan`."""
    c_in, c_out = x.shape[3], g.shape[3]
    in_vector, out_vector = vector(x), vector(g)
    blocks = config.block_out + (0,) * (PARTS - len(config.block_out))
    return Launch(
        conv_weight_grad_pointer_kernel,
        grid=(
            column_groups(config, c_in, kernel) + 1,
            cdiv(c_out, sum(blocks)),
            products.shape[0],
        ),
        args=dict(
            x_ptr=x,
            g_ptr=g,
            products_ptr=products,
            sums_ptr=sums,
            batch=g.shape[0],
            height=x.shape[1],
            width=x.shape[2],
            out_height=g.shape[1],
            out_width=g.shape[2],
            each=each,
            in_vectors=c_in // in_vector,
            out_vectors=c_out // out_vector,
            **strides("x", x, in_vector),
            **strides("g", g, out_vector),
        ),
        constants=dict(
            IN_VECTOR=in_vector,
            OUT_VECTOR=out_vector,
            KERNEL=kernel,
            STRIDE=stride,
            COLUMNS=config.columns,
            BLOCK_0=blocks[0],
            BLOCK_1=blocks[1],
            BLOCK_2=blocks[2],
            BLOCK_P=config.pixels,
            IN_TAIL=kernel * kernel * c_in % config.columns != 0,
            OUT_TAIL=c_out % sum(blocks) != 0,
            PRECISION="tf32" if tf32 else "ieee",
            ACC=triton_accumulator(x.dtype),
            SOFT_BF16=soft_bf16(x.dtype),
            WIDE=needs_int64(x, g),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
