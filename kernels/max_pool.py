"""3x3 max pool with stride 2, from a slot into a slot, and its backward.

Backward, each program makes squares of 2x2 input pixels. With t = h + padding the rows
of a square are t = 2a and 2a + 1: window a reaches both, window a - 1 only the first,
and no other window any of them. So four windows hold all that flows into a square, each
gradient is written once, and nothing is added atomically.
"""

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor, uint8

from ._any_size import launched, strides, vector
from ._common import (
    Launch,
    assert_nhwc,
    assert_packed,
    assert_same,
    cdiv,
    channel_block,
    needs_int64,
    soft_bf16,
    triton_accumulator,
)
from ._device_functions import batch_offset, inside_image, narrow, pixel_offsets, program_tile

Mode = Literal["ceil", "padded"]

_ELEMENTS = 2048
_WARPS = 8  # Two vectors a thread: the nine loads of each are all in flight at once.


@launched
def max_pool_kernel(
    x_ptr, out_ptr, argmax_ptr, height, width, out_height, out_width, tiles, vectors,
    x_stride_n, x_stride_h, x_stride_w, out_stride_n, out_stride_h, out_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PAD: tl.constexpr,
    ARGMAX: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P output pixels of an image by BLOCK_C channels."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    oh = pixel // out_width
    ow = pixel % out_width
    mask = (pixel < out_height * out_width)[:, None] & (c < channels)[None, :]
    x_ptr += batch_offset(n, x_stride_n, VECTOR)

    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), dtype=ACC)
    # Where nothing exceeds -inf, the first tap inside the image wins, as in torch.
    first_tap = tl.where(oh * 2 < PAD, 3, 0) + tl.where(ow * 2 < PAD, 1, 0)
    winner = tl.broadcast_to(first_tap[:, None], (BLOCK_P, BLOCK_C))
    for tap in tl.static_range(9):
        h = oh * 2 - PAD + tap // 3
        w = ow * 2 - PAD + tap % 3
        here = mask & inside_image(h, w, height, width)[:, None]
        offsets = pixel_offsets(h, w, x_stride_h, x_stride_w, VECTOR, WIDE)
        x = tl.load(x_ptr + offsets[:, None] + c[None, :], mask=here, other=0.0).to(ACC)
        better = here & ((x > best) | (x != x))  # A NaN wins, and nothing exceeds it.
        best = tl.where(better, x, best)
        winner = tl.where(better, tap, winner)

    out_ptr += batch_offset(n, out_stride_n, VECTOR)
    out_offsets = pixel_offsets(oh, ow, out_stride_h, out_stride_w, VECTOR, WIDE)
    tl.store(
        out_ptr + out_offsets[:, None] + c[None, :], best.to(out_ptr.dtype.element_ty), mask=mask
    )
    if ARGMAX:
        argmax_ptr += batch_offset(n, out_height * out_width) * channels
        offsets = pixel.to(tl.int64)[:, None] * channels + c[None, :]
        tl.store(argmax_ptr + offsets, winner.to(tl.uint8), mask=mask)


@triton.jit
def window_gradient(
    dout_ptr, argmax_ptr, oh, ow, c, mask, out_height, out_width, stride_h, stride_w, vectors,
    VECTOR: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient and winning tap of windows; 0 and any tap for windows outside the output."""
    here = mask & inside_image(oh, ow, out_height, out_width)[:, None]
    offsets = pixel_offsets(oh, ow, stride_h, stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    taps = pixel_offsets(oh, ow, out_width * vectors, vectors, VECTOR, WIDE)[:, None] + c[None, :]
    dout = tl.load(dout_ptr + offsets, mask=here, other=0.0).to(ACC)
    return dout, tl.load(argmax_ptr + taps, mask=here, other=0)


@triton.jit
def store_pixels(
    dx, out_ptr, h, w, c, mask, height, width, stride_h, stride_w,
    VECTOR: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store gradients of the pixels that lie inside the image."""
    here = mask & inside_image(h, w, height, width)[:, None]
    offsets = pixel_offsets(h, w, stride_h, stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    tl.store(out_ptr + offsets, narrow(dx, out_ptr.dtype.element_ty, SOFT_BF16), mask=here)


@launched
def max_pool_backward_kernel(
    dout_ptr, argmax_ptr, out_ptr, height, width, out_height, out_width, tiles, vectors,
    dout_stride_n, dout_stride_h, dout_stride_w, out_stride_n, out_stride_h, out_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, PAD: tl.constexpr,
    ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S squares of 2x2 input pixels of an image by BLOCK_C channels."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    square = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    across = (width + PAD + 1) // 2
    a = square // across
    b = square % across
    mask = (a < (height + PAD + 1) // 2)[:, None] & (c < channels)[None, :]
    dout_ptr += batch_offset(n, dout_stride_n, VECTOR)
    argmax_ptr += batch_offset(n, out_height * out_width) * channels
    out_ptr += batch_offset(n, out_stride_n, VECTOR)

    # The window above and to the left, above, to the left, and the square's own.
    g0, tap0 = window_gradient(
        dout_ptr, argmax_ptr, a - 1, b - 1, c, mask, out_height, out_width,
        dout_stride_h, dout_stride_w, vectors, VECTOR, ACC, WIDE,
    )  # fmt: skip
    g1, tap1 = window_gradient(
        dout_ptr, argmax_ptr, a - 1, b, c, mask, out_height, out_width,
        dout_stride_h, dout_stride_w, vectors, VECTOR, ACC, WIDE,
    )  # fmt: skip
    g2, tap2 = window_gradient(
        dout_ptr, argmax_ptr, a, b - 1, c, mask, out_height, out_width,
        dout_stride_h, dout_stride_w, vectors, VECTOR, ACC, WIDE,
    )  # fmt: skip
    g3, tap3 = window_gradient(
        dout_ptr, argmax_ptr, a, b, c, mask, out_height, out_width,
        dout_stride_h, dout_stride_w, vectors, VECTOR, ACC, WIDE,
    )  # fmt: skip

    h = a * 2 - PAD
    w = b * 2 - PAD
    dx = tl.where(tap0 == 8, g0, 0.0) + tl.where(tap1 == 6, g1, 0.0)
    dx += tl.where(tap2 == 2, g2, 0.0) + tl.where(tap3 == 0, g3, 0.0)
    store_pixels(
        dx, out_ptr, h, w, c, mask, height, width,
        out_stride_h, out_stride_w, VECTOR, SOFT_BF16, WIDE,
    )  # fmt: skip
    dx = tl.where(tap1 == 7, g1, 0.0) + tl.where(tap3 == 1, g3, 0.0)
    store_pixels(
        dx, out_ptr, h, w + 1, c, mask, height, width,
        out_stride_h, out_stride_w, VECTOR, SOFT_BF16, WIDE,
    )  # fmt: skip
    dx = tl.where(tap2 == 5, g2, 0.0) + tl.where(tap3 == 3, g3, 0.0)
    store_pixels(
        dx, out_ptr, h + 1, w, c, mask, height, width,
        out_stride_h, out_stride_w, VECTOR, SOFT_BF16, WIDE,
    )  # fmt: skip
    dx = tl.where(tap3 == 4, g3, 0.0)
    store_pixels(
        dx, out_ptr, h + 1, w + 1, c, mask, height, width,
        out_stride_h, out_stride_w, VECTOR, SOFT_BF16, WIDE,
    )  # fmt: skip


def output_size(height: int, width: int, mode: Mode) -> tuple[int, int]:
    """Height and width of the output.

    ``ceil`` rounds up and pads nothing, but the last window starts inside the image;
    ``padded`` pads every side by one. 0 where torch raises: a size of 1 with ``ceil``.
    """
    if mode == "padded":
        return (height - 1) // 2 + 1, (width - 1) // 2 + 1
    return height // 2, width // 2


def plan(x: Tensor, out: Tensor, mode: Mode, argmax: Tensor | None = None) -> Launch:
    """Decide the launch of :func:`max_pool` without running it. Nothing may be empty."""
    assert mode in ("ceil", "padded"), f"unknown mode {mode!r}"
    n, height, width, c = x.shape
    out_height, out_width = output_size(height, width, mode)
    assert_nhwc("x", x)
    assert_nhwc("out", out, n, out_height, out_width, c)
    assert_same("out", out, x)
    if argmax is not None:
        assert_packed("argmax", argmax, tuple(out.shape), uint8)
    block_c = channel_block(c)
    block_p = _ELEMENTS // block_c
    tiles = cdiv(out_height * out_width, block_p)
    size = vector(x, out)
    return Launch(
        max_pool_kernel,
        grid=(n * tiles * cdiv(c, block_c),),
        args=dict(
            x_ptr=x,
            out_ptr=out,
            argmax_ptr=argmax,
            height=height,
            width=width,
            out_height=out_height,
            out_width=out_width,
            tiles=tiles,
            vectors=c // size,
            **strides("x", x, size),
            **strides("out", out, size),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            PAD=1 if mode == "padded" else 0,
            ARGMAX=argmax is not None,
            ACC=triton_accumulator(x.dtype),
            WIDE=needs_int64(x, out),
        ),
        num_warps=_WARPS,
    )


def max_pool(x: Tensor, out: Tensor, mode: Mode, argmax: Tensor | None = None) -> None:
    """3x3 max pool, stride 2. A NaN in a window makes its output NaN.

    Args:
        x: ``[N, H, W, C]`` view.
        out: ``[N, H', W', C]`` view, dtype of ``x``; see :func:`output_size`.
        mode: ``ceil`` or ``padded``.
        argmax: ``[N, H', W', C]``, uint8, contiguous: receives the position of the
            maximum in its window, 3 * row + column, 0 to 8; of equal values the first,
            of several NaN the last, as torch does.
    """
    if out.numel() == 0:
        return
    plan(x, out, mode, argmax).run(x.device)


def plan_backward(dout: Tensor, argmax: Tensor, out: Tensor, mode: Mode) -> Launch:
    """Decide the launch of :func:`max_pool_backward` without running it. Nothing may be empty."""
    assert mode in ("ceil", "padded"), f"unknown mode {mode!r}"
    n, height, width, c = out.shape
    out_height, out_width = output_size(height, width, mode)
    assert_nhwc("out", out)
    assert_nhwc("dout", dout, n, out_height, out_width, c)
    assert_same("dout", dout, out)
    assert_packed("argmax", argmax, tuple(dout.shape), uint8)
    pad = 1 if mode == "padded" else 0
    squares = cdiv(height + pad, 2) * cdiv(width + pad, 2)
    block_c = channel_block(c)
    block_s = _ELEMENTS // block_c
    tiles = cdiv(squares, block_s)
    size = vector(dout, out)
    return Launch(
        max_pool_backward_kernel,
        grid=(n * tiles * cdiv(c, block_c),),
        args=dict(
            dout_ptr=dout,
            argmax_ptr=argmax,
            out_ptr=out,
            height=height,
            width=width,
            out_height=out_height,
            out_width=out_width,
            tiles=tiles,
            vectors=c // size,
            **strides("dout", dout, size),
            **strides("out", out, size),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_S=block_s,
            PAD=pad,
            ACC=triton_accumulator(out.dtype),
            SOFT_BF16=soft_bf16(out.dtype),
            WIDE=needs_int64(dout, argmax, out),
        ),
        num_warps=_WARPS,
    )


def max_pool_backward(dout: Tensor, argmax: Tensor, out: Tensor, mode: Mode) -> None:
    """Gradient of the input of :func:`max_pool`: each output's goes to its window's maximum.

    Added in fp32 (fp64 for fp64), rounded once.

    Args:
        dout: ``[N, H', W', C]`` view, gradient of the output; see :func:`output_size`.
        argmax: ``[N, H', W', C]``, uint8, contiguous, as :func:`max_pool` left it.
        out: ``[N, H, W, C]`` view, dtype of ``dout``; no part of it may be ``dout``.
        mode: that of the forward pass.
    """
    if out.numel() == 0:
        return
    plan_backward(dout, argmax, out, mode).run(out.device)
