"""Whether NVIDIA's frontend and cuDNN are there, and fit torch."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from ... import _optional

MIN_CAPABILITY = (8, 0)
MIN_CUDNN = 91000
"""The oldest cuDNN that was seen to grant strided outputs."""


def why_not(device: torch.device) -> str | None:
    """The reason why nothing at all is offered on ``device``, or None."""
    reason = _optional.why_not("cudnn")
    if reason is not None:
        return f"NVIDIA's cuDNN frontend: {reason}"
    if device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, these are on {device}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is off"
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below 8.0 (Ampere)"
    return _mismatch()


def frontend() -> Any:
    """The frontend, which may be missing. It loads cuDNN, torch's where torch has one."""
    return importlib.import_module("cudnn")


@functools.cache
def _mismatch() -> str | None:
    """What is wrong with the frontend, or with the cuDNN that it found."""
    try:
        found = frontend().backend_version()
    except (OSError, RuntimeError) as error:
        return f"NVIDIA's cuDNN frontend does not load: {error}"
    if found < MIN_CUDNN:
        return f"cuDNN {found} is older than {MIN_CUDNN}"
    expected = torch.backends.cudnn.version()
    if found != expected:
        return f"the frontend found cuDNN {found}, torch has {expected}"
    return None
