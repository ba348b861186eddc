"""Which forms of a kernel can run here."""

import pytest
import torch

from vovnet_fast.kernels._triton import TensorDescriptor


def why_not(config, device):
    """Why a configuration cannot run, or None."""
    if config.form == "pointer":
        return None
    if TensorDescriptor is None:
        return "this Triton, or its interpreter, has no bulk copies that a launch describes"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "bulk copies need sm_90"
    return None


def require(config, device):
    """Skip the test where a configuration cannot run."""
    reason = why_not(config, device)
    if reason is not None:
        pytest.skip(reason)
