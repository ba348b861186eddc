"""The backend of the extension's CUDA half: the signatures of :mod:`vovnet_fast.backends`.

Memory-bound functions are CUDA C++ (csrc/cuda). Convolutions are cuDNN's, through ATen,
followed by one pass into the slot; on Hopper also those of :mod:`.conv_sm90`, where it is
on offer. Runs on NVIDIA GPUs of compute capability 8.0 and newer that the extension was
compiled for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import tuning
from . import _extension, conv_sm90
from ._engines import ATEN, aten, conv_trial, problem

MIN_CAPABILITY = (8, 0)

_ops = _extension.CUDA


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
    own = ("backends._engines", "backends.conv_sm90") if function == "conv" else ()
    return ("backends.cuda", *own, *_extension.SOURCES)


def extension() -> Any:
    """``vovnet_fast._C.cuda``: ops as functions of a stream and the fields of a struct.

    Raises:
        RuntimeError: it is not there.
    """
    return _extension.load("cuda")


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    pool: bool = False,
) -> Tensor | None:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    tensors = (x, weight, scale, shift, out)
    options: dict[str, Any] = dict(stride=stride, relu=relu, pool=pool)
    own = conv_sm90.engines(x, weight, out, stride=stride) if out.numel() else []
    if not own:
        return _run_engine(ATEN, *tensors, **options)

    def run(engine: str) -> None:
        _run_engine(engine, *tensors, **options)

    key = problem("conv", x, weight.shape, stride, "pool" if pool else "", "in CUDA C++")
    names = [*aten(x, out), *own]
    prepare = functools.partial(conv_trial, _run_engine, x, weight, out, **options)
    engine = tuning.choose(x.device, key, names, ATEN, run, prepare=prepare)
    return _run_engine(engine, *tensors, **options)


def _run_engine(
    engine: str, *tensors: Tensor, stride: int, relu: bool, pool: bool
) -> Tensor | None:
    """Run :func:`conv` on one engine."""
    if engine == ATEN:
        return _ops.conv(*tensors, stride=stride, relu=relu, pool=pool)
    return conv_sm90.run(engine, *tensors, relu=relu, pool=pool)


conv_statistics = _ops.conv_statistics
conv_input_grad = _ops.conv_input_grad
conv_weight_grad = _ops.conv_weight_grad
normalize = _ops.normalize
batch_norm_merge = _ops.batch_norm_merge
batch_norm_finish = _ops.batch_norm_finish
batch_norm_sums = _ops.batch_norm_sums
batch_norm_input_grad = _ops.batch_norm_input_grad
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
