"""Depthwise 3x3 convolution in int8 and fp8, and images as their first layer takes them.

The 1x1 convolution that follows a depthwise one is :func:`.conv_eight_bits.conv`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..arithmetic.int8 import LARGEST, WIDE
from ..arithmetic.layers import QuantizedDepthwise
from ._any_size import launched, strides
from ._common import Launch, assert_nhwc, assert_packed, cdiv, channel_block, needs_int64
from ._device_functions import batch_offset, inside_image, pixel_offsets, program_tile
from ._eight_bits import common_vector, rounded, soft
from .conv import output_size
from .ese_eight_bits import float32

_ELEMENTS = 4096
_WARPS = 8  # A vector of bytes a thread: the nine loads are all in flight at once.
_IMAGE_PIXELS = 1024


@launched
def depthwise_eight_bits_kernel(
    x_ptr, w_ptr, multiplier_ptr, zero_ptr, out_ptr, height, width, out_height, out_width, tiles,
    vectors, levels,
    x_stride_n, x_stride_h, x_stride_w, out_stride_n, out_stride_h, out_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    INT8: tl.constexpr, ACC: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P output pixels of an image by BLOCK_C channels."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    oh = pixel // out_width
    ow = pixel % out_width
    exist = c < channels
    mask = (pixel < out_height * out_width)[:, None] & exist[None, :]
    x_ptr += batch_offset(n, x_stride_n, VECTOR)

    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    for tap in tl.static_range(9):
        h = oh * STRIDE - 1 + tap // 3
        w = ow * STRIDE - 1 + tap % 3
        here = mask & inside_image(h, w, height, width)[:, None]
        offsets = pixel_offsets(h, w, x_stride_h, x_stride_w, VECTOR, WIDE)
        x = tl.load(x_ptr + offsets[:, None] + c[None, :], mask=here, other=0.0).to(ACC)
        weight = tl.load(w_ptr + tap * channels + c, mask=exist, other=0.0).to(ACC)
        acc += x * weight[None, :]

    multiplier = tl.load(multiplier_ptr + c, mask=exist, other=0.0)
    y = acc.to(tl.float32) * multiplier[None, :]
    high = levels.to(tl.float32)
    out_ptr += batch_offset(n, out_stride_n, VECTOR)
    offsets = pixel_offsets(oh, ow, out_stride_h, out_stride_w, VECTOR, WIDE)
    if INT8:
        zero = tl.load(zero_ptr + c, mask=exist, other=0.0).to(tl.int32)
        low = 0.0 - zero.to(tl.float32)
        q = rounded(y, low[None, :], (high + low)[None, :], tl.int32, INT8, SOFT) + zero[None, :]
        q = q.to(out_ptr.dtype.element_ty)
    else:
        q = rounded(y, 0.0 - high, high, out_ptr.dtype.element_ty, INT8, SOFT)
    tl.store(out_ptr + offsets[:, None] + c[None, :], q, mask=mask)


@launched
def image_eight_bits_kernel(
    x_ptr, out_ptr, height, width, tiles, factor, limit,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c, out_stride_n, out_stride_h, out_stride_w,
    BLOCK_P: tl.constexpr, COPY: tl.constexpr, INT8: tl.constexpr, SOFT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of a channel of an image, as most images lie in memory."""
    c = tl.program_id(1)
    n = tl.program_id(0) // tiles
    pixel = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    h = pixel // width
    w = pixel % width
    mask = pixel < height * width
    x_ptr += batch_offset(n, x_stride_n)
    out_ptr += batch_offset(n, out_stride_n)
    x_offsets = pixel_offsets(h, w, x_stride_h, x_stride_w, 1, WIDE)
    out_offsets = pixel_offsets(h, w, out_stride_h, out_stride_w, 1, WIDE)
    limit = limit.to(tl.float32)
    y = tl.load(x_ptr + batch_offset(c, x_stride_c) + x_offsets, mask=mask, other=0.0)
    if not COPY:
        y = rounded(y * factor, 0.0 - limit, limit, out_ptr.dtype.element_ty, INT8, SOFT)
    tl.store(out_ptr + c + out_offsets, y, mask=mask)


def plan(
    x: Tensor, layer: QuantizedDepthwise, out: Tensor, *, levels: int, stride: int = 1
) -> Launch:
    """Decide the launch of :func:`depthwise` without running it. Nothing may be empty."""
    n, height, width, c = x.shape
    assert stride in (1, 2), f"no stride of {stride}"
    assert_nhwc("x", x)
    assert_nhwc("out", out, n, *output_size(height, width, 3, stride), c)
    integers = x.dtype == torch.uint8
    kind = torch.int8 if integers else x.dtype
    assert out.dtype == x.dtype, f"out must be {x.dtype}, got {out.dtype}"
    assert_packed("weight", layer.weight, (3, 3, c), kind)
    assert_packed("multiplier", layer.multiplier, (c,), torch.float32)
    assert_packed("zero", layer.zero, (c,), torch.uint8)
    size, block_c = common_vector(x, out), channel_block(c)
    block_p = _ELEMENTS // block_c
    tiles = cdiv(out.shape[1] * out.shape[2], block_p)
    return Launch(
        depthwise_eight_bits_kernel,
        grid=(n * tiles * cdiv(c, block_c),),
        args=dict(
            x_ptr=x,
            w_ptr=layer.weight,
            multiplier_ptr=layer.multiplier,
            zero_ptr=layer.zero if integers else None,
            out_ptr=out,
            height=height,
            width=width,
            out_height=out.shape[1],
            out_width=out.shape[2],
            tiles=tiles,
            vectors=c // size,
            levels=levels,
            **strides("x", x, size),
            **strides("out", out, size),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            STRIDE=stride,
            INT8=integers,
            ACC=tl.int32 if integers else tl.float32,
            SOFT=soft("int8" if integers else "fp8"),
            WIDE=needs_int64(x, out),
        ),
        num_warps=_WARPS,
    )


def depthwise(
    x: Tensor, layer: QuantizedDepthwise, out: Tensor, *, levels: int, stride: int = 1
) -> None:
    """What :func:`vovnet_fast.arithmetic.int8.depthwise` computes, and :func:`.fp8.depthwise`.

    Args:
        x: ``[N, H, W, C]`` view of uint8, or e4m3.
        layer: weights.
        out: ``[N, H', W', C]`` view of the same dtype. Nothing outside it is written.
        levels: the largest activation.
        stride: 1 or 2.
    """
    if out.numel() == 0:
        return
    plan(x, layer, out, levels=levels, stride=stride).run(x.device)


def plan_image(x: Tensor, scale: float, out: Tensor) -> Launch:
    """Decide the launch of :func:`quantize_image` without running it. Nothing may be empty."""
    n, height, width, c = x.shape
    assert x.dtype == torch.float32, f"x must be fp32, got {x.dtype}"
    assert_nhwc("out", out, *x.shape)
    integers = not out.is_floating_point()
    limits = {torch.int8: LARGEST, torch.int16: WIDE}
    tiles = cdiv(height * width, _IMAGE_PIXELS)
    return Launch(
        image_eight_bits_kernel,
        grid=(n * tiles, c),
        args=dict(
            x_ptr=x,
            out_ptr=out,
            height=height,
            width=width,
            tiles=tiles,
            factor=float32(1 / scale),
            limit=limits.get(out.dtype, 448),
            **strides("x", x, 1),
            x_stride_c=x.stride(3),
            **strides("out", out, 1),
        ),
        constants=dict(
            BLOCK_P=_IMAGE_PIXELS,
            COPY=out.dtype == torch.float32,
            INT8=integers,
            SOFT=soft("int8" if integers else "fp8"),
            WIDE=needs_int64(x, out),
        ),
    )


def quantize_image(x: Tensor, scale: float, out: Tensor) -> None:
    """What :func:`vovnet_fast.arithmetic.int8.quantize_image` computes, and that of fp8.

    Args:
        x: ``[N, H, W, C]`` fp32 with any strides.
        scale: the value of one step.
        out: ``[N, H, W, C]`` with channel stride 1: int8, of a wide stem int16; e4m3, of a wide
            stem fp32, which is a copy.
    """
    if out.numel() == 0:
        return
    plan_image(x, scale, out).run(x.device)
