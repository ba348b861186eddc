"""The backend of the extension's CUDA half: the signatures of :mod:`vovnet_fast.backends`.

Memory-bound functions are CUDA C++ (csrc/cuda). Convolutions are cuDNN's, through ATen,
followed by one pass into the slot, or those of :mod:`.conv_sm80`; on Hopper also those of
:mod:`.conv_sm90`, where it is on offer. A depthwise one and the 1x1 after it are one kernel where
that is faster. Runs on NVIDIA GPUs of compute capability 8.0 and newer that the extension was
compiled for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import _cuda_conv, _cuda_depthwise, _extension

MIN_CAPABILITY = (8, 0)

_ops = _extension.CUDA

_CHOSEN = ("conv", "conv_statistics", "conv_input_grad", "conv_weight_grad")
_CONVOLUTIONS = (
    "backends._cuda_conv",
    "backends._engines",
    "backends.conv_sm80",
    "backends.conv_sm80_grad",
    "backends.conv_sm80_input_grad",
    "backends.conv_sm90",
    "backends.conv_sm90_tiles",
)


def why_not(device: torch.device | None) -> str | None:
    """The reason why it cannot run on ``device`` (None: on any device here)."""
    reason = _extension.why_not("cuda")
    if reason is not None:
        return reason
    if device is not None and device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, these are on {device}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    if device is None or device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _refusal(device)


@functools.cache
def _refusal(device: torch.device) -> str | None:
    """The reason why the kernels cannot run on a GPU, or None."""
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below 8.0 (Ampere)"
    try:
        with torch.cuda.device(device):
            extension().probe()
    except RuntimeError as error:
        built = (_extension.build_info() or {}).get("archs")
        return (
            f"{error}; the extension was compiled for {built or 'unknown architectures'}, the GPU "
            f"is sm_{found[0]}{found[1]} (rebuild it with VOVNET_FAST_CUDA_ARCHS="
            f"{found[0]}.{found[1]}, or update the driver)"
        )
    return None


def sources(function: str) -> tuple[str, ...]:
    """Modules of this package that compute a function with static choices."""
    own = _CONVOLUTIONS if function in _CHOSEN else ()
    return ("backends.cuda", *own, *_extension.SOURCES)


def extension() -> Any:
    """``vovnet_fast._C.cuda``: ops as functions of a stream and the fields of a struct.

    Raises:
        RuntimeError: it is not there.
    """
    return _extension.load("cuda")


conv = _cuda_conv.conv
conv_statistics = _cuda_conv.conv_statistics
conv_input_grad = _cuda_conv.conv_input_grad
conv_weight_grad = _cuda_conv.conv_weight_grad
normalize = _ops.normalize
batch_norm_merge = _ops.batch_norm_merge
batch_norm_finish = _ops.batch_norm_finish
batch_norm_sums = _ops.batch_norm_sums
batch_norm_input_grad = _ops.batch_norm_input_grad
depthwise_conv = _cuda_depthwise.depthwise_conv
depthwise_conv_statistics = _cuda_depthwise.depthwise_conv_statistics
depthwise = _ops.depthwise
depthwise_input_grad = _ops.depthwise_input_grad
depthwise_weight_grad = _ops.depthwise_weight_grad
gates = _ops.gates
gates_backward = _ops.gates_backward
gate_sums = _ops.gate_sums
apply_gates = _ops.apply_gates
apply_gates_backward = _ops.apply_gates_backward
max_pool = _ops.max_pool
max_pool_backward = _ops.max_pool_backward
