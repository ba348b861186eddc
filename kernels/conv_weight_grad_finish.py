"""What every weight gradient needs besides its products: sums of the gradient, and the finish.

With z = conv(x, weight) * scale + shift and g the gradient of z, a main pass leaves
``products``, partial sums over splits of the pixels, whose total P is the gradient of
weight * scale. Then

    dweight = scale * P    dscale = sum over (tap, input channel) of weight * P    dshift = sum of g
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._any_size import launched, strides, vector, within
from ._common import (
    Launch,
    accumulator,
    assert_nhwc,
    assert_packed,
    cdiv,
    channel_block,
    needs_int64,
    processors,
    triton_accumulator,
)
from ._device_functions import batch_offset, pixel_offsets
from ._sum_rows import plan_sum_rows, sum_rows

_SUM_ELEMENTS = tl.constexpr(4096)  # Loaded at a time; as many are in flight as is pipelined.
_SUM_STAGES = tl.constexpr(4)
_SUM_PROGRAMS_PER_PROCESSOR = 4
_COLUMNS = 16  # Of a program that finishes, with so many output channels and
_CHANNELS = 32
_SPLITS = 8  # splits at a time.
_ROWS = 64


@triton.jit
def sum_channels(
    g_ptr, sums_ptr, split, splits, first, batch, height, width, stride_n, stride_h, stride_w,
    channels, VECTOR: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sum BLOCK channels of g over one of ``splits`` shares of the pixels, into a row of sums."""
    BLOCK_P: tl.constexpr = _SUM_ELEMENTS // BLOCK
    c = first + tl.arange(0, BLOCK)
    exist = within(c, channels, TAIL)
    tiles = tl.cdiv(height * width, BLOCK_P)
    each = tl.cdiv(batch * tiles, splits)
    sums = tl.zeros((BLOCK_P, BLOCK), dtype=ACC)
    last = tl.minimum((split + 1) * each, batch * tiles)
    for step in tl.range(split * each, last, num_stages=_SUM_STAGES):
        pixel = (step % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        offsets = pixel_offsets(pixel // width, pixel % width, stride_h, stride_w, VECTOR, WIDE)
        mask = (pixel < height * width)[:, None] & exist[None, :]
        image = g_ptr + batch_offset(step // tiles, stride_n, VECTOR)
        sums += tl.load(image + offsets[:, None] + c[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(sums_ptr + batch_offset(split, channels) + c, tl.sum(sums, axis=0), mask=exist)


@launched
def channel_sums_kernel(
    g_ptr, sums_ptr, batch, height, width, vectors, g_stride_n, g_stride_h, g_stride_w,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK channels of a share of the pixels."""
    channels = vectors * VECTOR
    sum_channels(
        g_ptr, sums_ptr, tl.program_id(1), tl.num_programs(1), tl.program_id(0) * BLOCK,
        batch, height, width, g_stride_n, g_stride_h, g_stride_w, channels,
        VECTOR, BLOCK, TAIL, ACC, WIDE,
    )  # fmt: skip


@launched
def finish_weight_grad_kernel(
    products_ptr, sums_ptr, weight_ptr, scale_ptr, dweight_ptr, dscale_ptr, dshift_ptr,
    splits, rows, columns, vectors,
    VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K columns by BLOCK_C output channels, always summed in one order.

    There are ``columns`` and ``vectors`` vectors of them. The products are packed, either way.
    """
    channels = vectors * VECTOR
    k_total = columns * VECTOR
    ACC: tl.constexpr = dweight_ptr.dtype.element_ty
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (k < k_total)[:, None] & (c < channels)[None, :]
    packed = c[None, :] * k_total + k[:, None]
    offsets = packed
    if CHANNELS_LAST:
        offsets = k[:, None] * channels + c[None, :]
    sums = tl.zeros((BLOCK_S, BLOCK_K, BLOCK_C), dtype=ACC)
    for first in tl.range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        pointers = products_ptr + batch_offset(s, k_total * channels)[:, None, None]
        pointers += offsets[None, :, :]
        mask = (s < splits)[:, None, None] & inside[None, :, :]
        sums += tl.load(pointers, mask=mask, other=0.0).to(ACC)
    total = tl.sum(sums, axis=0)
    if SCALE:
        weight = tl.load(weight_ptr + packed, mask=inside, other=0.0).to(ACC)
        dscale = tl.sum(weight * total, axis=0)
        tl.store(dscale_ptr + tl.program_id(0) * channels + c, dscale, mask=c < channels)
        total *= tl.load(scale_ptr + c, mask=c < channels, other=0.0)[None, :]
    tl.store(dweight_ptr + packed, total, mask=inside)
    if tl.program_id(0) == 0:
        dshift = sum_rows(sums_ptr, rows, c, channels, BLOCK_R, BLOCK_C)
        tl.store(dshift_ptr + c, dshift, mask=c < channels)


def plan_channel_sums(g: Tensor) -> tuple[Launch, Tensor]:
    """Decide the launch of :func:`channel_sums`; returns it and what it will fill."""
    n, height, width, c = g.shape
    assert_nhwc("g", g)
    block = channel_block(c)
    groups = cdiv(c, block)
    steps = n * cdiv(height * width, _SUM_ELEMENTS.value // block)
    shares = min(cdiv(_SUM_PROGRAMS_PER_PROCESSOR * processors(g.device), groups), steps)
    sums = g.new_empty(shares, c, dtype=accumulator(g.dtype))
    size = vector(g)
    launch = Launch(
        channel_sums_kernel,
        grid=(groups, shares),
        args=dict(
            g_ptr=g,
            sums_ptr=sums,
            batch=n,
            height=height,
            width=width,
            vectors=c // size,
            **strides("g", g, size),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK=block,
            TAIL=c % block != 0,
            ACC=triton_accumulator(g.dtype),
            WIDE=needs_int64(g),
        ),
        num_warps=8,
    )
    return launch, sums


def channel_sums(g: Tensor) -> Tensor:
    """Sums of ``[N, H, W, C]`` over shares of the pixels: ``[R, C]``, fp32 (fp64 for fp64).

    Nothing may be empty. Every sum is always taken in the same order.
    """
    launch, sums = plan_channel_sums(g)
    launch.run(g.device)
    return sums


def plan_finish(
    products: Tensor,
    sums: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    dweight: Tensor,
    dscale: Tensor | None,
    dshift: Tensor,
) -> list[Launch]:
    """Decide the launches of :func:`finish`. Arguments as there, and its results."""
    splits, c_out, kernel, _, c_in = products.shape
    high = accumulator(products.dtype)
    k_total = kernel * kernel * c_in
    columns = products.view(splits, c_out, k_total)  # Raises where they are not evenly spaced.
    channels_last = not columns.is_contiguous()
    assert not channels_last or columns.transpose(1, 2).is_contiguous(), (
        f"products must be packed, output channels first or last, got strides {products.stride()}"
    )
    size = vector(dweight.view(c_out, k_total), dshift)
    assert_packed("sums", sums, (sums.shape[0], c_out), high)
    assert_packed("weight", weight, (c_out, kernel, kernel, c_in), weight.dtype)
    assert_packed("dweight", dweight, tuple(weight.shape), high)
    assert_packed("dshift", dshift, (c_out,), high)
    blocks = cdiv(k_total, _COLUMNS)
    dscale_parts = None
    if scale is not None:
        assert_packed("scale", scale, (c_out,), high)
        dscale_parts = dweight.new_empty(blocks, c_out)
    finish = Launch(
        finish_weight_grad_kernel,
        grid=(blocks, cdiv(c_out, _CHANNELS)),
        args=dict(
            products_ptr=columns,
            sums_ptr=sums,
            weight_ptr=weight,
            scale_ptr=scale,
            dweight_ptr=dweight,
            dscale_ptr=dscale_parts,
            dshift_ptr=dshift,
            splits=splits,
            rows=sums.shape[0],
            columns=k_total // size,
            vectors=c_out // size,
        ),
        constants=dict(
            VECTOR=size,
            CHANNELS_LAST=channels_last,
            BLOCK_S=_SPLITS,
            BLOCK_R=_ROWS,
            BLOCK_K=_COLUMNS,
            BLOCK_C=_CHANNELS,
            SCALE=scale is not None,
        ),
        num_warps=8,
    )
    if dscale_parts is None:
        return [finish]
    assert dscale is not None, "a scale has a gradient"
    return [finish, plan_sum_rows(dscale_parts, dscale)]


def finish(
    products: Tensor, sums: Tensor, weight: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of the weight, the scale and the shift of a convolution.

    Args:
        products: ``[S, C_out, K, K, C_in]`` view of any floating dtype with evenly spaced
            columns: partial sums of the gradient of weight * scale.
        sums: ``[R, C_out]``, fp32 (fp64 for fp64), contiguous: partial sums of the
            gradient of the output.
        weight: ``[C_out, K, K, C_in]``, contiguous, any floating dtype.
        scale: ``[C_out]``, dtype of ``sums``, or None for 1.

    Returns:
        ``[C_out, K, K, C_in]``, ``[C_out]`` or None without a scale, and ``[C_out]``, in
        the dtype of ``sums``.
    """
    dweight = torch.empty_like(weight, dtype=sums.dtype)
    dshift = sums.new_empty(sums.shape[1])
    dscale = None if scale is None else torch.empty_like(dshift)
    for launch in plan_finish(products, sums, weight, scale, dweight, dscale, dshift):
        launch.run(products.device)
    return dweight, dscale, dshift
