"""3x3 max pool with stride 2."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .. import backends
from ..specs import Pool
from . import _checks
from ._checks import nchw, nhwc


def output_size(height: int, width: int, mode: Pool) -> tuple[int, int]:
    """Height and width of the output.

    ``ceil`` rounds up, but the last window starts inside the image, which is
    height // 2; ``padded`` pads every side by one.
    """
    if mode == "ceil":
        return height // 2, width // 2
    return (height - 1) // 2 + 1, (width - 1) // 2 + 1


def max_pool(x: Tensor, mode: Pool = "ceil") -> Tensor:
    """3x3 max pool, stride 2. A NaN in a window makes its output NaN.

    Args:
        x: ``[N, C, H, W]`` in fp16, bf16, fp32 or fp64.
        mode: ``ceil`` or ``padded``, see :func:`vovnet_fast.reference.max_pool`.

    Returns:
        ``[N, C, H', W']``, ``channels_last``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: a gradient would be needed.
        BackendError: the backend that was asked for cannot run.
    """
    _checks.activations("max_pool", "x", x)
    if mode not in ("ceil", "padded"):
        raise ValueError(f"max_pool: mode must be ceil or padded, got {mode!r}")
    if mode == "ceil" and min(x.shape[2:]) < 2:
        raise ValueError(f"max_pool: ceil mode needs maps of at least 2x2, got {list(x.shape)}")
    _checks.no_gradient("max_pool", x)
    out: Tensor = torch.ops.vovnet_fast.max_pool(x, mode)
    return out


@torch.library.custom_op("vovnet_fast::max_pool", mutates_args=())
def _max_pool(x: Tensor, mode: str) -> Tensor:
    view = nhwc(x)
    size = output_size(x.shape[2], x.shape[3], cast(Pool, mode))
    out = view.new_empty(x.shape[0], *size, x.shape[1])
    backends.get(x.device).max_pool(view, out, mode)
    return nchw(out)


@_max_pool.register_fake
def _(x, mode):
    size = output_size(x.shape[2], x.shape[3], mode)
    return nchw(x.new_empty(x.shape[0], *size, x.shape[1]))
