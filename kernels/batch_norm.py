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

:mod:`.batch_norm_backward` has the gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._any_size import launched, vector
from ._common import Launch, accumulator, assert_packed, assert_same, cdiv, processors
from ._device_functions import batch_offset

STATISTICS = 3
NORM_ROWS = 6

_MERGE_CHANNELS = 32
_MERGE_PARTS = 32
_MERGE_WARPS = 8  # Registers: a tile holds three numbers in fp64.
_MIN_PARTS = 256  # A program merges so many before others are worth a second launch,
_MAX_PARTS = 2048  # and at most so many, lest the last ones wait for it.


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


def _assert_partials(partials: Tensor) -> None:
    """Assert packed statistics ``[R, 3, C]`` in fp32 or fp64."""
    parts, _, c = partials.shape
    assert_packed("partials", partials, (parts, STATISTICS, c), accumulator(partials.dtype))


def assert_vector(name: str, vector: Tensor | None, channels: int) -> None:
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
    assert_vector("gamma", gamma, c)
    assert_vector("beta", beta, c)
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
