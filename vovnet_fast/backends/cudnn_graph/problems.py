"""What a plan depends on, and what is not put to cuDNN at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...arithmetic import fp8, int8
from ...compat import zip

_ALIGNMENT = 16  # Bytes; what cuDNN assumes of every pointer.
_INT32_LIMIT = 2**31
DTYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}
EIGHT_BITS = {int8.ACTIVATION: "INT8", **({fp8.ACTIVATION: "FP8_E4M3"} if fp8.ACTIVATION else {})}
"""Names of activations' dtypes: a byte of at most 127 is the same number in int8."""


@dataclass(frozen=True)
class Operand:
    """A 4-D tensor as cuDNN describes it, ``[N, C, H, W]``; strides are in elements."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last one."""
        return 1 + sum((d - 1) * s for d, s in zip(self.dims, self.strides, strict=True))


@dataclass(frozen=True)
class Problem:
    """All that a plan depends on.

    Attributes:
        x, weight, out: the operands.
        stride: of the convolution, along both axes.
        relu: the graph ends in one.
        dtype: of the operands. Sums, scale and shift are fp32.
        tf32: fp32 products may be rounded to TF32.
        aligned: every pointer is a multiple of 16 bytes.
        device: where it runs.
        levels: in eight bits the largest activation, elsewhere 0.
    """

    x: Operand
    weight: Operand
    out: Operand
    stride: int
    relu: bool
    dtype: torch.dtype
    tf32: bool
    aligned: bool
    device: torch.device
    levels: int = 0

    @property
    def padding(self) -> int:
        """Of the image, on all sides."""
        return self.weight.dims[2] // 2


def operand(view: Tensor) -> Operand:
    """Describe a ``[N, H, W, C]`` view.

    The stride of a dimension of size 1 says nothing, and torch leaves anything there. It
    becomes that of adjacent pixels, so that cuDNN recognises the layout.
    """
    n, h, w, c = view.shape
    pixel = view.stride(2) if w > 1 else c
    row = view.stride(1) if h > 1 else w * pixel
    image = view.stride(0) if n > 1 else h * row
    channel = view.stride(3) if c > 1 else 1
    return Operand((n, c, h, w), (image, channel, row, pixel))


def describe(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    tf32: bool,
    levels: int = 0,
) -> Problem:
    """The problem of some arguments of :func:`.engine.run`."""
    pointers = (t.data_ptr() for t in (x, weight, scale, shift, out))
    return Problem(
        operand(x),
        operand(weight),
        operand(out),
        stride,
        relu,
        x.dtype,
        tf32,
        all(pointer % _ALIGNMENT == 0 for pointer in pointers),
        x.device,
        levels,
    )


def refusal(problem: Problem) -> str | None:
    """The reason why a problem is not put to cuDNN at all, or None."""
    if problem.dtype not in (EIGHT_BITS if problem.levels else DTYPES):
        return f"no plans for {problem.dtype}"
    if problem.dtype == int8.ACTIVATION and problem.levels > int8.LARGEST:
        return f"activations of up to {problem.levels} are no numbers of int8"
    channels = problem.x.dims[1], problem.out.dims[1]
    if problem.levels and any(number % _ALIGNMENT for number in channels):
        return f"of {channels[0]} and {channels[1]} channels of a byte vectors have {_ALIGNMENT}"
    if problem.dtype == torch.float32 and not problem.tf32:
        return "fp32 would be rounded to TF32, which torch does not allow here"
    if not problem.aligned:
        return f"a pointer is no multiple of {_ALIGNMENT} bytes"
    for name in ("x", "out"):
        found: Operand = getattr(problem, name)
        if min(found.strides) < 1 or found.strides[1] != 1:
            return f"{name} has strides {found.strides}"
        if found.span >= _INT32_LIMIT:
            return f"{name} spans {found.span} elements; cuDNN may count in 32 bits"
    return None
