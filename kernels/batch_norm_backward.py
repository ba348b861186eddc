"""Backward of :mod:`.batch_norm`.

With xhat = (z - mean) * rstd and g the gradient of the norm's output::

    dbeta, dgamma = sum of g, sum of g * xhat                      backward_sums
    dz = gamma * rstd * (g - dbeta / count - xhat * dgamma / count)  input_grad
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ._any_size import launched, strides, vector
from ._common import (
    REDUCTION_PROGRAMS,
    Launch,
    accumulator,
    assert_nhwc,
    assert_packed,
    assert_same,
    collapse_rows,
    needs_int64,
    soft_bf16,
    sweep,
    triton_accumulator,
)
from ._device_functions import batch_offset, narrow, pixel_offsets, program_tile
from ._sum_rows import plan_sum_rows
from .batch_norm import NORM_ROWS, assert_vector

_REDUCE_ELEMENTS = 2048
_GRAD_ELEMENTS = 2048
_GRAD_PROGRAMS = 64


@launched
def norm_sums_kernel(
    g_ptr, z_ptr, norm_ptr, partials_ptr, height, width, tiles, vectors, steps,
    g_stride_n, g_stride_h, g_stride_w, z_stride_n, z_stride_h, z_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: both sums of BLOCK_C channels over ``steps`` times BLOCK_P pixels."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    g_ptr += batch_offset(n, g_stride_n, VECTOR)
    z_ptr += batch_offset(n, z_stride_n, VECTOR)
    mean = tl.load(norm_ptr + c, mask=c < channels, other=0.0)
    rstd = tl.load(norm_ptr + channels + c, mask=c < channels, other=0.0)
    sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    products = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    for step in tl.range(0, steps):
        pixel = (tile * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        h = pixel // width
        w = pixel % width
        mask = (pixel < height * width)[:, None] & (c < channels)[None, :]
        g_offsets = pixel_offsets(h, w, g_stride_h, g_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        z_offsets = pixel_offsets(h, w, z_stride_h, z_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        g = tl.load(g_ptr + g_offsets, mask=mask, other=0.0).to(ACC)
        z = tl.load(z_ptr + z_offsets, mask=mask, other=0.0).to(ACC)
        sums += g
        products += g * ((z - mean[None, :]) * rstd[None, :])
    partials_ptr += batch_offset(n * tiles + tile, 2 * channels) + c
    tl.store(partials_ptr, tl.sum(sums, axis=0), mask=c < channels)
    tl.store(partials_ptr + channels, tl.sum(products, axis=0), mask=c < channels)


@launched
def norm_input_grad_kernel(
    g_ptr, z_ptr, norm_ptr, sums_ptr, gamma_ptr, out_ptr, height, width, tiles, vectors, steps,
    g_stride_n, g_stride_h, g_stride_w, z_stride_n, z_stride_h, z_stride_w,
    out_stride_n, out_stride_h, out_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GAMMA: tl.constexpr,
    ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: ``steps`` times BLOCK_P pixels of an image by BLOCK_C channels."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    g_ptr += batch_offset(n, g_stride_n, VECTOR)
    z_ptr += batch_offset(n, z_stride_n, VECTOR)
    out_ptr += batch_offset(n, out_stride_n, VECTOR)
    mean = tl.load(norm_ptr + c, mask=c < channels, other=0.0)[None, :]
    rstd = tl.load(norm_ptr + channels + c, mask=c < channels, other=0.0)[None, :]
    count = tl.load(norm_ptr + 5 * channels + c, mask=c < channels, other=1.0)[None, :]
    g_mean = tl.load(sums_ptr + c, mask=c < channels, other=0.0)[None, :] / count
    slope = tl.load(sums_ptr + channels + c, mask=c < channels, other=0.0)[None, :] / count
    scale = rstd
    if GAMMA:
        scale *= tl.load(gamma_ptr + c, mask=c < channels, other=0.0).to(ACC)[None, :]
    for step in tl.range(0, steps):
        pixel = (tile * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        h = pixel // width
        w = pixel % width
        mask = (pixel < height * width)[:, None] & (c < channels)[None, :]
        g_offsets = pixel_offsets(h, w, g_stride_h, g_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        z_offsets = pixel_offsets(h, w, z_stride_h, z_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        out_offsets = (
            pixel_offsets(h, w, out_stride_h, out_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        )
        g = tl.load(g_ptr + g_offsets, mask=mask, other=0.0).to(ACC)
        z = tl.load(z_ptr + z_offsets, mask=mask, other=0.0).to(ACC)
        dz = scale * (g - g_mean - (z - mean) * rstd * slope)
        tl.store(out_ptr + out_offsets, narrow(dz, out_ptr.dtype.element_ty, SOFT_BF16), mask=mask)


def plan_backward_sums(g: Tensor, z: Tensor, norm: Tensor, out: Tensor) -> tuple[Launch, Launch]:
    """Decide the two launches of :func:`backward_sums`. Nothing may be empty."""
    n, _, _, c = z.shape
    high = accumulator(z.dtype)
    assert_nhwc("z", z)
    assert_nhwc("g", g, *z.shape)
    assert_same("g", g, z)
    assert_packed("norm", norm, (NORM_ROWS, c), high)
    assert_packed("out", out, (2, c), high)
    g, z = collapse_rows(g, z)
    block_c, block_p, steps, tiles, programs = sweep(z, _REDUCE_ELEMENTS, REDUCTION_PROGRAMS)
    size = vector(g, z)
    partials = out.new_empty(n * tiles, 2, c)
    sums = Launch(
        norm_sums_kernel,
        grid=(programs,),
        args=dict(
            g_ptr=g,
            z_ptr=z,
            norm_ptr=norm,
            partials_ptr=partials,
            height=z.shape[1],
            width=z.shape[2],
            tiles=tiles,
            vectors=c // size,
            steps=steps,
            **strides("g", g, size),
            **strides("z", z, size),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            ACC=triton_accumulator(z.dtype),
            WIDE=needs_int64(g, z),
        ),
    )
    return sums, plan_sum_rows(partials, out)


def backward_sums(g: Tensor, z: Tensor, norm: Tensor, out: Tensor) -> None:
    """Sums over all images and pixels of g and of g * xhat: gradients of beta and gamma.

    Args:
        g: ``[N, H, W, C]`` view, gradient of the norm's output: where a ReLU follows,
            masked by it.
        z: as ``g``, what was normalised.
        norm: ``[6, C]`` from :func:`.batch_norm.finish`.
        out: ``[2, C]``, dtype of ``norm``, contiguous. Zeros where there are no pixels.
    """
    if z.numel() == 0:
        out.zero_()
        return
    for launch in plan_backward_sums(g, z, norm, out):
        launch.run(out.device)


def plan_input_grad(
    g: Tensor, z: Tensor, norm: Tensor, sums: Tensor, gamma: Tensor | None, out: Tensor
) -> Launch:
    """Decide the launch of :func:`input_grad` without running it. Nothing may be empty."""
    c = z.shape[3]
    for name, view in dict(g=g, z=z, out=out).items():
        assert_nhwc(name, view, *z.shape)
        assert_same(name, view, z)
    assert_packed("norm", norm, (NORM_ROWS, c), accumulator(z.dtype))
    assert_packed("sums", sums, (2, c), norm.dtype)
    assert_vector("gamma", gamma, c)
    g, z, out = collapse_rows(g, z, out)
    block_c, block_p, steps, tiles, programs = sweep(z, _GRAD_ELEMENTS, _GRAD_PROGRAMS)
    size = vector(g, z, out)
    return Launch(
        norm_input_grad_kernel,
        grid=(programs,),
        args=dict(
            g_ptr=g,
            z_ptr=z,
            norm_ptr=norm,
            sums_ptr=sums,
            gamma_ptr=gamma,
            out_ptr=out,
            height=z.shape[1],
            width=z.shape[2],
            tiles=tiles,
            vectors=c // size,
            steps=steps,
            **strides("g", g, size),
            **strides("z", z, size),
            **strides("out", out, size),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            GAMMA=gamma is not None,
            ACC=triton_accumulator(z.dtype),
            SOFT_BF16=soft_bf16(z.dtype),
            WIDE=needs_int64(g, z, out),
        ),
    )


def input_grad(
    g: Tensor, z: Tensor, norm: Tensor, sums: Tensor, gamma: Tensor | None, out: Tensor
) -> None:
    """out = gamma * rstd * (g - sums[0] / count - xhat * sums[1] / count).

    Computed in fp32 (fp64 for fp64), rounded once. The count is that of ``norm``: with
    several processes theirs together, and ``sums`` must be as well.

    Args:
        g: ``[N, H, W, C]`` view, as in :func:`backward_sums`.
        z: as ``g``, what was normalised.
        norm: ``[6, C]`` from :func:`.batch_norm.finish`.
        sums: ``[2, C]`` from :func:`backward_sums`.
        gamma: ``[C]``, any floating dtype, contiguous, or None for 1.
        out: as ``g``; may be ``g`` or ``z``.
    """
    if out.numel() == 0:
        return
    plan_input_grad(g, z, norm, sums, gamma, out).run(out.device)
