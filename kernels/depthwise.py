"""Depthwise 3x3 convolution and its gradients, from a slot into a slot.

The 1x1 convolution that follows it in a depthwise layer is :func:`.conv.conv`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._any_size import launched, strides, vector
from ._common import (
    Launch,
    accumulator,
    assert_nhwc,
    assert_packed,
    assert_same,
    cdiv,
    channel_block,
    needs_int64,
    processors,
    soft_bf16,
    triton_accumulator,
)
from ._device_functions import (
    batch_offset,
    inside_image,
    narrow,
    pixel_offsets,
    program_tile,
    relu_gradient,
)
from ._sum_rows import plan_sum_rows
from .conv import output_size

_ELEMENTS = 2048
_WARPS = 8  # Two vectors a thread: the nine loads of each are all in flight at once.
_INPUT_GRAD_ELEMENTS = 1024  # One vector: it takes more registers for addresses.
_WEIGHT_GRAD_PROGRAMS_PER_PROCESSOR = 8


@launched
def depthwise_kernel(
    x_ptr, w_ptr, out_ptr, height, width, out_height, out_width, tiles, vectors,
    x_stride_n, x_stride_h, x_stride_w, out_stride_n, out_stride_h, out_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
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

    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    for tap in tl.static_range(9):
        h = oh * STRIDE - 1 + tap // 3
        w = ow * STRIDE - 1 + tap % 3
        here = mask & inside_image(h, w, height, width)[:, None]
        offsets = pixel_offsets(h, w, x_stride_h, x_stride_w, VECTOR, WIDE)
        x = tl.load(x_ptr + offsets[:, None] + c[None, :], mask=here, other=0.0).to(ACC)
        weight = tl.load(w_ptr + tap * channels + c, mask=c < channels, other=0.0).to(ACC)
        acc += x * weight[None, :]

    out_ptr += batch_offset(n, out_stride_n, VECTOR)
    out_offsets = (
        pixel_offsets(oh, ow, out_stride_h, out_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    )
    tl.store(out_ptr + out_offsets, narrow(acc, out_ptr.dtype.element_ty, SOFT_BF16), mask=mask)


@launched
def depthwise_input_grad_kernel(
    g_ptr, w_ptr, add_ptr, mask_ptr, out_ptr, height, width, out_height, out_width, tiles, vectors,
    g_stride_n, g_stride_h, g_stride_w, add_stride_n, add_stride_h, add_stride_w,
    mask_stride_n, mask_stride_h, mask_stride_w, out_stride_n, out_stride_h, out_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    ADD: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P input pixels of an image by BLOCK_C channels.

    ``height`` and ``width`` are those of the convolution's input, the ``out`` of this kernel.
    """
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    h = pixel // width
    w = pixel % width
    mask = (pixel < height * width)[:, None] & (c < channels)[None, :]
    g_ptr += batch_offset(n, g_stride_n, VECTOR)

    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    for tap in tl.static_range(9):
        # The output pixel whose window holds this one at the tap, if there is one.
        oh = h + 1 - tap // 3
        ow = w + 1 - tap % 3
        whole = (oh % STRIDE == 0) & (ow % STRIDE == 0)
        here = (oh >= 0) & (oh < out_height * STRIDE) & (ow >= 0) & (ow < out_width * STRIDE)
        offsets = pixel_offsets(oh // STRIDE, ow // STRIDE, g_stride_h, g_stride_w, VECTOR, WIDE)
        g = tl.load(
            g_ptr + offsets[:, None] + c[None, :], mask=mask & (whole & here)[:, None], other=0.0
        )
        weight = tl.load(w_ptr + tap * channels + c, mask=c < channels, other=0.0).to(ACC)
        acc += g.to(ACC) * weight[None, :]

    if ADD:
        add_ptr += batch_offset(n, add_stride_n, VECTOR)
        offsets = (
            pixel_offsets(h, w, add_stride_h, add_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        )
        acc += tl.load(add_ptr + offsets, mask=mask, other=0.0).to(ACC)
    if MASK:
        mask_ptr += batch_offset(n, mask_stride_n, VECTOR)
        offsets = (
            pixel_offsets(h, w, mask_stride_h, mask_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        )
        acc = relu_gradient(acc, tl.load(mask_ptr + offsets, mask=mask, other=0.0).to(ACC))
    out_ptr += batch_offset(n, out_stride_n, VECTOR)
    offsets = pixel_offsets(h, w, out_stride_h, out_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    tl.store(out_ptr + offsets, narrow(acc, out_ptr.dtype.element_ty, SOFT_BF16), mask=mask)


@triton.jit
def _input_tap(
    x_ptr, h, w, mask, height, width, stride_h, stride_w, c,
    VECTOR: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Input pixels, zero outside the image: ``[BLOCK_P, BLOCK_C]``."""
    mask = mask & inside_image(h, w, height, width)[:, None]
    offsets = pixel_offsets(h, w, stride_h, stride_w, VECTOR, WIDE)
    return tl.load(x_ptr + offsets[:, None] + c[None, :], mask=mask, other=0.0).to(ACC)


@launched
def depthwise_weight_grad_kernel(
    x_ptr, g_ptr, products_ptr, batch, height, width, out_height, out_width, vectors,
    x_stride_n, x_stride_h, x_stride_w, g_stride_n, g_stride_h, g_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the three taps of a row, for BLOCK_C channels of a share of the pixels."""
    channels = vectors * VECTOR
    # The rows of one share are neighbours: the second finds the gradient in L2.
    row = tl.program_id(0) % 3
    c = (tl.program_id(0) // 3) * BLOCK_C + tl.arange(0, BLOCK_C)
    share = tl.program_id(1)
    tiles = tl.cdiv(out_height * out_width, BLOCK_P)
    each = tl.cdiv(batch * tiles, tl.num_programs(1))

    left = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    middle = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    right = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    for step in tl.range(share * each, tl.minimum((share + 1) * each, batch * tiles)):
        n = step // tiles
        pixel = (step % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        oh = pixel // out_width
        ow = pixel % out_width
        mask = (pixel < out_height * out_width)[:, None] & (c < channels)[None, :]
        offsets = pixel_offsets(oh, ow, g_stride_h, g_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        g = tl.load(g_ptr + batch_offset(n, g_stride_n, VECTOR) + offsets, mask=mask, other=0.0).to(
            ACC
        )
        x = x_ptr + batch_offset(n, x_stride_n, VECTOR)
        h = oh * STRIDE - 1 + row
        w = ow * STRIDE
        left += g * _input_tap(
            x, h, w - 1, mask, height, width, x_stride_h, x_stride_w, c, VECTOR, ACC, WIDE
        )
        middle += g * _input_tap(
            x, h, w, mask, height, width, x_stride_h, x_stride_w, c, VECTOR, ACC, WIDE
        )
        right += g * _input_tap(
            x, h, w + 1, mask, height, width, x_stride_h, x_stride_w, c, VECTOR, ACC, WIDE
        )
    products_ptr += batch_offset(share, 9 * channels) + 3 * row * channels + c
    tl.store(products_ptr, tl.sum(left, axis=0), mask=c < channels)
    tl.store(products_ptr + channels, tl.sum(middle, axis=0), mask=c < channels)
    tl.store(products_ptr + 2 * channels, tl.sum(right, axis=0), mask=c < channels)


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
    tiles = cdiv(out_height * out_width, block_p)
    size = vector(x, out)
    return Launch(
        depthwise_kernel,
        grid=(n * tiles * cdiv(c, block_c),),
        args=dict(
            x_ptr=x,
            w_ptr=weight,
            out_ptr=out,
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


def plan_input_grad(
    g: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> Launch:
    """Decide the launch of :func:`input_grad` without running it. Nothing may be empty."""
    n, height, width, c = out.shape
    assert stride in (1, 2), f"no kernel with stride {stride}"
    assert_nhwc("out", out)
    assert_nhwc("g", g, n, *output_size(height, width, 3, stride), c)
    assert_packed("weight", weight, (3, 3, c), out.dtype)
    views = {"g": g, "add": add, "mask": mask}
    others = {name: view for name, view in views.items() if view is not None}
    for name, view in others.items():
        assert_same(name, view, out)
        if name != "g":
            assert_nhwc(name, view, *out.shape)
    block_c = channel_block(c)
    block_p = _INPUT_GRAD_ELEMENTS // block_c
    tiles = cdiv(height * width, block_p)
    size = vector(out, *others.values())
    return Launch(
        depthwise_input_grad_kernel,
        grid=(n * tiles * cdiv(c, block_c),),
        args=dict(
            g_ptr=g,
            w_ptr=weight,
            add_ptr=add,
            mask_ptr=mask,
            out_ptr=out,
            height=height,
            width=width,
            out_height=g.shape[1],
            out_width=g.shape[2],
            tiles=tiles,
            vectors=c // size,
            **strides("g", g, size),
            **strides("add", out if add is None else add, size),
            **strides("mask", out if mask is None else mask, size),
            **strides("out", out, size),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            STRIDE=stride,
            ADD=add is not None,
            MASK=mask is not None,
            ACC=triton_accumulator(out.dtype),
            SOFT_BF16=soft_bf16(out.dtype),
            WIDE=needs_int64(out, *others.values()),
        ),
        num_warps=_WARPS,
    )


def input_grad(
    g: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """out = input gradient of :func:`depthwise` + add, and 0 where mask is not positive.

    Summed in fp32 (fp64 for fp64), rounded once.

    Args:
        g: ``[N, H', W', C]`` view, gradient of the convolution's output.
        weight: ``[3, 3, C]``, contiguous, dtype of ``g``.
        out: ``[N, H, W, C]`` view, dtype of ``g``. Nothing outside it is written.
        stride: of the convolution, 1 or 2.
        add: as ``out``, may be ``out`` itself: gradient that came by other ways.
        mask: as ``out``, the activation after its ReLU; where it is NaN the gradient passes.
    """
    if out.numel() == 0:
        return
    plan_input_grad(g, weight, out, stride=stride, add=add, mask=mask).run(out.device)


def plan_weight_grad(x: Tensor, g: Tensor, out: Tensor, *, stride: int = 1) -> tuple[Launch, ...]:
    """Decide the two launches of :func:`weight_grad`, into ``out``. Nothing may be empty."""
    n, height, width, c = x.shape
    assert stride in (1, 2), f"no kernel with stride {stride}"
    out_height, out_width = output_size(height, width, 3, stride)
    assert_nhwc("x", x)
    assert_nhwc("g", g, n, out_height, out_width, c)
    assert_same("g", g, x)
    assert_packed("out", out, (3, 3, c), accumulator(x.dtype))
    block_c = channel_block(c)
    block_p = _ELEMENTS // block_c
    groups = 3 * cdiv(c, block_c)
    steps = n * cdiv(out_height * out_width, block_p)
    wanted = cdiv(_WEIGHT_GRAD_PROGRAMS_PER_PROCESSOR * processors(x.device), groups)
    products = out.new_empty(min(wanted, steps), 3, 3, c)
    size = vector(x, g)
    main = Launch(
        depthwise_weight_grad_kernel,
        grid=(groups, products.shape[0]),
        args=dict(
            x_ptr=x,
            g_ptr=g,
            products_ptr=products,
            batch=n,
            height=height,
            width=width,
            out_height=out_height,
            out_width=out_width,
            vectors=c // size,
            **strides("x", x, size),
            **strides("g", g, size),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            STRIDE=stride,
            ACC=triton_accumulator(x.dtype),
            WIDE=needs_int64(x, g),
        ),
        num_warps=_WARPS,
    )
    return main, plan_sum_rows(products, out)


def weight_grad(x: Tensor, g: Tensor, *, stride: int = 1) -> Tensor:
    """Weight gradient of :func:`depthwise`: ``[3, 3, C]`` in fp32 (fp64 for fp64).

    Always summed in the same order on one device. Zeros where there are no pixels.

    Args:
        x: ``[N, H, W, C]`` view.
        g: ``[N, H', W', C]`` view, dtype of ``x``, gradient of the output.
        stride: 1 or 2.
    """
    out = torch.empty(3, 3, x.shape[3], dtype=accumulator(x.dtype), device=x.device)
    if g.numel() == 0:
        return out.zero_()
    for launch in plan_weight_grad(x, g, out, stride=stride):
        launch.run(x.device)
    return out
