"""What the kernels in int8 and fp8 share: how sums become activations, and tensors as they take
them.

The arithmetic is that of :mod:`vovnet_fast.arithmetic`: in int8 integers are summed, converted to
fp32 once, scaled by one product, and rounded once to nearest even.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._any_size import vector
from ._triton import interpreted


@triton.jit
def multiply_add(acc, a, b, FP8: tl.constexpr, DEPTH: tl.constexpr):
    """acc + a @ b, which is DEPTH products deep.

    In fp8 the tensor cores of Ada and Hopper add to some 14 bits, whatever the accumulator:
    products of a step are summed from zero there, and added in fp32.
    """
    if FP8:
        acc += tl.dot(a, b, out_dtype=acc.dtype, max_num_imprecise_acc=DEPTH)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def biased(acc, bias, INT8: tl.constexpr):
    """fp32 of an accumulator and its bias. Integers, and what fp32 sums of them hold, are added
    as such, and rounded once."""
    return (acc.to(tl.int32) + bias).to(tl.float32) if INT8 else acc + bias


@triton.jit
def nearest(y):
    """The nearest integer, ties to even, of magnitudes below 2**22: fp32 numbers near 1.5 * 2**23
    have no fractions."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def rounded(y, low, high, dtype: tl.constexpr, INT8: tl.constexpr, SOFT: tl.constexpr):
    """An activation: y between two bounds, rounded to nearest even.

    SOFT: without the conversion to e4m3 of Triton's interpreter, which truncates.
    """
    y = tl.minimum(tl.maximum(y, low), high)
    if INT8:
        q = nearest(y).to(tl.int32).to(dtype)
    elif SOFT:
        q = _e4m3(y).to(dtype, bitcast=True)
    else:
        q = y.to(dtype)
    return q


@triton.jit
def _e4m3(y):
    """The bits of e4m3, rounded to nearest even, of magnitudes up to 448."""
    sign = tl.where(y < 0, 128, 0)
    y = tl.abs(y)
    # Below 2**-6 the steps are 2**-9: fp32 numbers near 1.5 * 2**14 have no finer digits.
    small = ((y + 24576.0) - 24576.0) * 512.0
    bits = y.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    normal = bits - ((127 - 7) << 3)
    return (sign + tl.where(y < 0.015625, small.to(tl.int32), normal)).to(tl.uint8)


def soft(form: str) -> bool:
    """Whether kernels must work around Triton's interpreter, which does not round to e4m3."""
    return interpreted() and form == "fp8"


def signed(x: Tensor) -> Tensor:
    """Bytes as tensor cores take them: one in [0, 127] is the same number in int8, and a larger
    one that number minus 256."""
    return x.view(torch.int8) if x.dtype == torch.uint8 else x


def common_vector(*views: Tensor | None) -> int:
    """:func:`.vector` of views that may be absent, or of dtypes of several sizes: the least."""
    return min(vector(view) for view in views if view is not None)
