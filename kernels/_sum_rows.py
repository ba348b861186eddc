"""Sums over the rows of packed partials, always in one order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._any_size import launched, vector
from ._common import Launch, assert_packed, cdiv

_SUM_ROWS = 64
_SUM_COLUMNS = 32


@triton.jit
def sum_rows(ptr, rows, c, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over the rows of channels c of a packed [rows, channels], always in one order."""
    sums = tl.zeros((BLOCK_R, BLOCK_C), dtype=ptr.dtype.element_ty)
    for first in tl.range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & (c < channels)[None, :]
        sums += tl.load(ptr + r[:, None] * channels + c[None, :], mask=mask, other=0.0)
    return tl.sum(sums, axis=0)


@launched
def sum_rows_kernel(
    rows_ptr, out_ptr, rows, vectors,
    VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: sums over the rows of BLOCK_C columns."""
    channels = vectors * VECTOR
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = sum_rows(rows_ptr, rows, c, channels, BLOCK_R, BLOCK_C)
    tl.store(out_ptr + c, sums, mask=c < channels)


def plan_sum_rows(rows: Tensor, out: Tensor) -> Launch:
    """Decide a launch that sums packed ``[R, ...]`` over R into ``out``, ``[...]``."""
    assert_packed("rows", rows, (rows.shape[0], *out.shape), out.dtype)
    size = vector(out.view(-1))
    return Launch(
        sum_rows_kernel,
        grid=(cdiv(out.numel(), _SUM_COLUMNS),),
        args=dict(rows_ptr=rows, out_ptr=out, rows=rows.shape[0], vectors=out.numel() // size),
        constants=dict(VECTOR=size, BLOCK_R=_SUM_ROWS, BLOCK_C=_SUM_COLUMNS),
    )
