"""Batch norm with the statistics of the batch.

Convolutions leave partial statistics, ``[R, 3, C]``: for each of R parts of the pixels,
and each channel, their count, their sum, and the sum of their squared deviations from
that part's own mean. They are merged by the formula of Chan, Golub and LeVeque (1979),
which, unlike a sum of squares, loses nothing where means are large, and in fp64: there
are few of them. :func:`finish` makes of them the rows of ``norm``, ``[6, C]``:

0. mean
1. rstd = 1 / sqrt(variance + eps)
2. scale = gamma * rstd
3. shift = beta - mean * scale
4. unbiased variance
5. count

Backward, with xhat = (z - mean) * rstd and g the gradient of the norm's output::

    dbeta, dgamma = sum of g, sum of g * xhat                      backward_sums
    dz = gamma * rstd * (g - dbeta / count - xhat * dgamma / count)  input_grad
"""

from __future__ import annotations

import torch
import triton
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
    batch_offset,
    cdiv,
    collapse_rows,
    narrow,
    needs_int64,
    pixel_offsets,
    plan_sum_rows,
    processors,
    program_tile,
    soft_bf16,
    sweep,
    triton_accumulator,
)

STATISTICS = 3
NORM_ROWS = 6

_MERGE_CHANNELS = 32
_MERGE_PARTS = 32
_MERGE_WARPS = 8  # Registers: a tile holds three numbers in fp64.
_MIN_PARTS = 256  # A program merges so many before others are worth a second launch,
_MAX_PARTS = 2048  # and at most so many, lest the last ones wait for it.
_REDUCE_ELEMENTS = 2048
_GRAD_ELEMENTS = 2048
_GRAD_PROGRAMS = 64


@triton.jit
def merge_two(count_a, sum_a, m2_a, count_b, sum_b, m2_b):
    """Count, sum and squared deviations of two sets together; either may be empty."""
    crossed = sum_b * count_a - sum_a * count_b
    count = count_a + count_b
    weight = count_a * count_b * count
    both = weight > 0.0
    between = tl.where(both, crossed * crossed / tl.where(both, weight, 1.0), 0.0)
    return count, sum_a + sum_b, m2_a + m2_b + between


@triton.jit
def merge_parts(ptr, first, last, c, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(count, sum, squared deviations) of parts [first, last) together, in fp64."""
    count = tl.zeros((BLOCK_C,), dtype=tl.float64)
    total = tl.zeros((BLOCK_C,), dtype=tl.float64)
    m2 = tl.zeros((BLOCK_C,), dtype=tl.float64)
    for start in tl.range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & (c < channels)[None, :]
        part = ptr + r.to(tl.int64)[:, None] * (3 * channels) + c[None, :]
        counts = tl.load(part, mask=mask, other=0.0).to(tl.float64)
        sums = tl.load(part + channels, mask=mask, other=0.0).to(tl.float64)
        m2s = tl.load(part + 2 * channels, mask=mask, other=0.0).to(tl.float64)
        filled = counts > 0.0
        sums = tl.where(filled, sums, 0.0)
        counts_here = tl.sum(counts, axis=0)
        sum_here = tl.sum(sums, axis=0)
        mean = sum_here / tl.where(counts_here > 0.0, counts_here, 1.0)
        away = sums - counts * mean[None, :]
        m2s += away * away / tl.where(filled, counts, 1.0)
        m2_here = tl.sum(tl.where(filled, m2s, 0.0), axis=0)
        count, total, m2 = merge_two(count, total, m2, counts_here, sum_here, m2_here)
    return count, total, m2


@launched
def merge_statistics_kernel(
    partials_ptr, out_ptr, parts, parts_per_program, vectors,
    VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of ``parts_per_program`` parts, merged into one."""
    channels = vectors * VECTOR
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) * parts_per_program
    last = tl.minimum(first + parts_per_program, parts)
    count, total, m2 = merge_parts(partials_ptr, first, last, c, channels, BLOCK_R, BLOCK_C)
    out_ptr += batch_offset(tl.program_id(0), 3 * channels) + c
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr, count.to(dtype), mask=c < channels)
    tl.store(out_ptr + channels, total.to(dtype), mask=c < channels)
    tl.store(out_ptr + 2 * channels, m2.to(dtype), mask=c < channels)


@launched
def finish_norm_kernel(
    partials_ptr, gamma_ptr, beta_ptr, out_ptr, parts, vectors,
    VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EPS: tl.constexpr,
    GAMMA: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of all parts, and what the norm is made of."""
    channels = vectors * VECTOR
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    count, total, m2 = merge_parts(partials_ptr, 0, parts, c, channels, BLOCK_R, BLOCK_C)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    mean = total / count
    rstd = 1.0 / tl.sqrt(m2 / count + EPS)
    scale = rstd
    if GAMMA:
        scale *= tl.load(gamma_ptr + c, mask=mask, other=0.0).to(tl.float64)
    # Of the scale as it is stored: with a large mean its rounding would not cancel.
    scale = scale.to(dtype)
    shift = -mean * scale.to(tl.float64)
    if BETA:
        shift += tl.load(beta_ptr + c, mask=mask, other=0.0).to(tl.float64)
    tl.store(out_ptr + c, mean.to(dtype), mask=mask)
    tl.store(out_ptr + channels + c, rstd.to(dtype), mask=mask)
    tl.store(out_ptr + 2 * channels + c, scale, mask=mask)
    tl.store(out_ptr + 3 * channels + c, shift.to(dtype), mask=mask)
    tl.store(out_ptr + 4 * channels + c, (m2 / (count - 1.0)).to(dtype), mask=mask)
    tl.store(out_ptr + 5 * channels + c, count.to(dtype), mask=mask)


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


def _assert_partials(partials: Tensor) -> None:
    """Assert packed statistics ``[R, 3, C]`` in fp32 or fp64."""
    parts, _, c = partials.shape
    assert_packed("partials", partials, (parts, STATISTICS, c), accumulator(partials.dtype))


def _assert_vector(name: str, vector: Tensor | None, channels: int) -> None:
    """Assert None or a packed ``[C]`` of any dtype."""
    if vector is not None:
        assert_packed(name, vector, (channels,), vector.dtype)


def _groups(partials: Tensor) -> int:
    """In how many groups many partials are merged first, to keep the device busy (1: at once)."""
    parts, _, c = partials.shape
    wanted = cdiv(2 * processors(partials.device), cdiv(c, _MERGE_CHANNELS))
    size = min(max(cdiv(parts, wanted), _MIN_PARTS), _MAX_PARTS)
    return max(cdiv(parts, size), 1)


def plan_merge(partials: Tensor, out: Tensor) -> Launch:
    """Decide a launch that merges ``[R, 3, C]`` into ``out``, ``[G, 3, C]``, evenly."""
    parts, _, c = partials.shape
    _assert_partials(partials)
    groups = out.shape[0]
    assert_packed("out", out, (groups, STATISTICS, c), accumulator(out.dtype))
    size = vector(partials)
    return Launch(
        merge_statistics_kernel,
        grid=(groups, cdiv(c, _MERGE_CHANNELS)),
        args=dict(
            partials_ptr=partials,
            out_ptr=out,
            parts=parts,
            parts_per_program=cdiv(parts, groups),
            vectors=c // size,
        ),
        constants=dict(VECTOR=size, BLOCK_R=_MERGE_PARTS, BLOCK_C=_MERGE_CHANNELS),
        num_warps=_MERGE_WARPS,
    )


def _merged_groups(partials: Tensor) -> Tensor:
    """Few enough partials for one program: these, or groups of them, merged, in fp64."""
    groups = _groups(partials)
    if groups == 1:
        return partials
    merged = partials.new_empty(groups, *partials.shape[1:], dtype=torch.float64)
    plan_merge(partials, merged).run(partials.device)
    return merged


def merge(partials: Tensor, out: Tensor) -> None:
    """Statistics of all parts together, rounded once.

    Args:
        partials: ``[R, 3, C]``, fp32 (fp64 for fp64), contiguous: counts, sums, and sums
            of squared deviations from the part's own mean. A part whose count is 0 is
            ignored, whatever its other numbers are.
        out: ``[3, C]``, dtype of ``partials``, contiguous: the same of all of them.
    """
    if out.numel() == 0:
        return
    assert_same("out", out, partials)
    plan_merge(_merged_groups(partials), out.unsqueeze(0)).run(out.device)


def plan_finish(
    partials: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, norm: Tensor
) -> Launch:
    """Decide the last launch of :func:`finish`. Nothing may be empty."""
    parts, _, c = partials.shape
    _assert_partials(partials)
    assert_packed("norm", norm, (NORM_ROWS, c), accumulator(norm.dtype))
    _assert_vector("gamma", gamma, c)
    _assert_vector("beta", beta, c)
    size = vector(partials)
    return Launch(
        finish_norm_kernel,
        grid=(cdiv(c, _MERGE_CHANNELS),),
        args=dict(
            partials_ptr=partials,
            gamma_ptr=gamma,
            beta_ptr=beta,
            out_ptr=norm,
            parts=parts,
            vectors=c // size,
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_R=_MERGE_PARTS,
            BLOCK_C=_MERGE_CHANNELS,
            EPS=eps,
            GAMMA=gamma is not None,
            BETA=beta is not None,
        ),
        num_warps=_MERGE_WARPS,
    )


def finish(
    partials: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, norm: Tensor
) -> None:
    """Merge partial statistics, and make of them the rows that the head of this file lists.

    Args:
        partials: as in :func:`merge`.
        gamma: ``[C]``, any floating dtype, contiguous, or None for 1.
        beta: as ``gamma``, or None for 0.
        eps: added to the variance.
        norm: ``[6, C]``, dtype of ``partials``, contiguous.
    """
    if norm.numel() == 0:
        return
    assert_same("norm", norm, partials)
    plan_finish(_merged_groups(partials), gamma, beta, eps, norm).run(norm.device)


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
        norm: ``[6, C]`` from :func:`finish`.
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
    _assert_vector("gamma", gamma, c)
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
        norm: ``[6, C]`` from :func:`finish`.
        sums: ``[2, C]`` from :func:`backward_sums`.
        gamma: ``[C]``, any floating dtype, contiguous, or None for 1.
        out: as ``g``; may be ``g`` or ``z``.
    """
    if out.numel() == 0:
        return
    plan_input_grad(g, z, norm, sums, gamma, out).run(out.device)
