"""The ops of :mod:`vovnet_fast.arithmetic.fp8` by Triton's kernels: see :mod:`.eight_bits`."""

from __future__ import annotations

import torch

from ...arithmetic import fp8
from ...arithmetic.fp8 import ACTIVATION, image_dtype
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
    "ACTIVATION", "FUNCTIONS", "MIN_CAPABILITY", "apply_gates", "conv", "depthwise", "forget",
    "gates", "image_dtype", "max_pool", "quantize_image", "sources", "why_not",
]  # fmt: skip

MIN_CAPABILITY = (8, 9)


def why_not(device: torch.device) -> str | None:
    """The reason why it cannot run on a device (None: it can)."""
    reason = fp8.why_not() or _why_not(device)
    if reason is None and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < MIN_CAPABILITY:
            return f"compute capability {found[0]}.{found[1]} has no products of fp8: 8.9 (Ada) has"
    return reason
