"""Tensors as fields of the structs of ``csrc/params.h``: pointers, strides and sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dtypes import accumulator
from ...compat import zip

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
"""Codes of dtypes."""


def pointer(name: str, tensor: Tensor) -> int:
    """The address of a tensor's first element, for somebody who reads or writes memory.

    Raises:
        TypeError: it has no memory that can be read so, as on the meta device, within
            ``FakeTensorMode`` or a transform of ``torch.func``, or in another layout.
    """
    try:
        address = tensor.data_ptr()
    except RuntimeError as error:
        raise _without_memory(name, tensor, str(error)) from error
    if address == 0 and tensor.numel():
        raise _without_memory(name, tensor, f"on {tensor.device} in layout {tensor.layout}")
    return address


def _without_memory(name: str, tensor: Tensor, reason: str) -> TypeError:
    return TypeError(
        f"{name} must be a plain tensor, with memory that a kernel can read, got a "
        f"{type(tensor).__name__}: {reason} (the reference backend takes all that PyTorch takes)"
    )


def view(name: str, tensor: Tensor | None, like: Tensor, *shape: int) -> tuple[int, ...] | None:
    """A ``[N, H, W, C]`` view of this shape, in the dtype and on the device of another."""
    if tensor is None:
        return None
    address = pointer(name, tensor)
    assert tuple(tensor.shape) == shape, (
        f"{name} must have shape {shape}, got {tuple(tensor.shape)}"
    )
    # contiguous() leaves the strides of an empty tensor as they are.
    assert shape[3] == 1 or tensor.stride(3) == 1 or tensor.numel() == 0, (
        f"{name} must have channel stride 1, got strides {tensor.stride()}"
    )
    assert (tensor.dtype, tensor.device) == (like.dtype, like.device), (
        f"{name} must be {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}"
    )
    return address, *tensor.stride()[:3]


def packed(name: str, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The pointer of a contiguous tensor of this dtype and shape."""
    if tensor is None:
        return None
    address = pointer(name, tensor)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True), (
        f"{name} must be a contiguous {dtype} tensor of shape {shape}, "
        f"got {tensor.dtype}, {tuple(tensor.shape)}, strides {tensor.stride()}"
    )
    return address


def array(name: str, tensor: Tensor | None, *shape: int) -> tuple[int, int] | None:
    """A contiguous tensor of this shape and of any floating dtype."""
    if tensor is None:
        return None
    address = packed(name, tensor, tensor.dtype, *shape)
    assert address is not None
    return address, DTYPES[tensor.dtype]


def image(tensor: Tensor) -> dict[str, int]:
    n, height, width, c = tensor.shape
    return dict(n=n, height=height, width=width, c=c)


def windows(wide: Tensor, narrow: Tensor) -> dict[str, int]:
    """Sizes of an op whose windows lie in ``wide``, and make the pixels of ``narrow``."""
    return dict(image(wide), out_height=narrow.shape[1], out_width=narrow.shape[2])


def weight_strides(weight: Tensor) -> dict[str, int]:
    """Sizes and strides of ``[C_out, K, K, C_in]``."""
    c_out, kernel, _, c_in = weight.shape
    names = ("stride_o", "stride_h", "stride_w", "stride_i")
    return dict(zip(names, weight.stride(), strict=True), c_out=c_out, kernel=kernel, c_in=c_in)


def new_high(tensor: Tensor, *shape: int) -> Tensor:
    """New memory for sums of a tensor."""
    return tensor.new_empty(shape, dtype=accumulator(tensor.dtype))
