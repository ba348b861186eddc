"""What lets one compiled kernel serve layers and images of all sizes.

By itself Triton compiles a kernel for each number of channels that is a constant, and for
each integer that is 1 or becomes a multiple of 16.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16
"""Of the widest load and store of a thread."""


def launched(function: Callable[..., None]) -> Any:
    """``triton.jit`` for a kernel that is compiled once, whatever its integers are."""
    numbers = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if not name.endswith("_ptr") and "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(function, do_not_specialize=numbers)


def vector(*views: Tensor) -> int:
    """Elements of 16 bytes where all views consist of such vectors, else 1.

    Their addresses, their strides and their numbers of channels are multiples of it then.
    Kernels are told strides and channels in vectors, and multiply them: so they know without
    a proof what they may load and store at once, whatever the sizes are.
    """
    size = VECTOR_BYTES // views[0].itemsize
    for view in views:
        if view.shape[-1] % size or view.data_ptr() % VECTOR_BYTES:
            return 1
        # Nothing is ever multiplied by the stride of a single image, row or column but 0.
        if any(s % size and n > 1 for s, n in zip(view.stride()[:-1], view.shape)):
            return 1
    return size


def strides(name: str, tensor: Tensor, size: int) -> dict[str, int]:
    """Batch, row and pixel stride in vectors, as kernel arguments ``<name>_stride_[nhw]``."""
    return {f"{name}_stride_{axis}": tensor.stride(i) // size for i, axis in enumerate("nhw")}


@triton.jit
def within(c, channels, TAIL: tl.constexpr):
    """Whether channels exist. Without a TAIL, blocks end where the channels do, and all do."""
    return c < channels if TAIL else c >= 0


@triton.jit
def carry(major, minor, size):
    """(major, minor) where minor may have reached its size: then the next major one, and 0.

    Loops carry positions from step to step, because a division by a number that is not known
    when a kernel is compiled takes longer than all else that a step computes for itself.
    """
    past = minor >= size
    return tl.where(past, major + 1, major), tl.where(past, 0, minor)


@triton.jit
def next_chunk(tap, c, c_in, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr):
    """(tap, first channel) of the step after this one: a tap's channels, then the next tap's."""
    c += BLOCK_K
    if KERNEL > 1:
        tap, c = carry(tap, c, c_in)
    return tap, c
