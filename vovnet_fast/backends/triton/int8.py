"""The ops of :mod:`vovnet_fast.arithmetic.int8` by Triton's kernels: see :mod:`.eight_bits`."""

from __future__ import annotations

import torch

from ...arithmetic.int8 import ACTIVATION, image_dtype
from . import why_not as _why_not
from .eight_bits import (
    FUNCTIONS,
    apply_gates,
    conv,
    depthwise,
    forget,
    gates,
    max_pool,
    quantize_image,
    sources,
)

__all__ = [
    "ACTIVATION", "FUNCTIONS", "apply_gates", "conv", "depthwise", "forget", "gates",
    "image_dtype", "max_pool", "quantize_image", "sources", "why_not",
]  # fmt: skip


def why_not(device: torch.device) -> str | None:
    """The reason why it cannot run on a device (None: it can)."""
    return _why_not(device)
