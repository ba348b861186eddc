"""Depthwise 3x3 convolution, from a slot into a slot.

The 1x1 convolution that follows it in a depthwise layer is :func:`.conv.conv`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    Launch,
    assert_nhwc,
    assert_packed,
    assert_same,
    batch_offset,
    channel_block,
    inside_image,
    narrow,
    needs_int64,
    pixel_offsets,
    program_tile,
    soft_bf16,
    strides,
    triton_accumulator,
)
from .conv import output_size

_ELEMENTS = 2048
_WARPS = 8  # Two vectors a thread: the nine loads of each are all in flight at once.


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "tiles"])
def depthwise_kernel(
    x_ptr, w_ptr, out_ptr, height, width, out_height, out_width, tiles,
    x_stride_n, x_stride_h, x_stride_w, out_stride_n, out_stride_h, out_stride_w,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P output pixels of an image by BLOCK_C channels."""
    n, tile, first = program_tile(tiles, C, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    oh = pixel // out_width
    ow = pixel % out_width
    mask = (pixel < out_height * out_width)[:, None] & (c < C)[None, :]
    x_ptr += batch_offset(n, x_stride_n)

    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    for tap in tl.static_range(9):
        h = oh * STRIDE - 1 + tap // 3
        w = ow * STRIDE - 1 + tap % 3
        here = mask & inside_image(h, w, height, width)[:, None]
        offsets = pixel_offsets(h, w, x_stride_h, x_stride_w, WIDE)
        x = tl.load(x_ptr + offsets[:, None] + c[None, :], mask=here, other=0.0).to(ACC)
        weight = tl.load(w_ptr + tap * C + c, mask=c < C, other=0.0).to(ACC)
        acc += x * weight[None, :]

    out_ptr += batch_offset(n, out_stride_n)
    out_offsets = pixel_offsets(oh, ow, out_stride_h, out_stride_w, WIDE)[:, None] + c[None, :]
    tl.store(out_ptr + out_offsets, narrow(acc, out_ptr.dtype.element_ty, SOFT_BF16), mask=mask)


def plan(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> Launch:
    """Decide the launch of :func:`depthwise` without running it. Nothing may be empty."""
    n, height, width, c = x.shape
    assert stride in (1, 2), f"no kernel with stride {stride}"
    out_height, out_width = output_size(height, width, 3, stride)
    assert_nhwc("x", x)
    assert_nhwc("out", out, n, out_height, out_width, c)
    assert_same("out", out, x)
    assert_packed("weight", weight, (3, 3, c), x.dtype)
    block_c = channel_block(c)
    block_p = _ELEMENTS // block_c
    tiles = triton.cdiv(out_height * out_width, block_p)
    return Launch(
        depthwise_kernel,
        grid=(n * tiles * triton.cdiv(c, block_c),),
        args=dict(
            x_ptr=x,
            w_ptr=weight,
            out_ptr=out,
            height=height,
            width=width,
            out_height=out_height,
            out_width=out_width,
            tiles=tiles,
            **strides("x", x),
            **strides("out", out),
        ),
        constants=dict(
            C=c,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            STRIDE=stride,
            ACC=triton_accumulator(x.dtype),
            SOFT_BF16=soft_bf16(x.dtype),
            WIDE=needs_int64(x, out),
        ),
        num_warps=_WARPS,
    )


def depthwise(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> None:
    """out = depthwise 3x3 convolution of x, padded by one, summed in fp32 (fp64 for fp64).

    Args:
        x: ``[N, H, W, C]`` view.
        weight: ``[3, 3, C]``, contiguous, dtype of ``x``: channels last, so that the
            weights of neighbouring channels are neighbours.
        out: ``[N, H', W', C]`` view, dtype of ``x``; see :func:`.conv.output_size`.
        stride: 1 or 2.
    """
    if out.numel() == 0:
        return
    plan(x, weight, out, stride=stride).run(x.device)
