"""The backend of Triton kernels: the signatures of :mod:`vovnet_fast.backends`.

Runs on NVIDIA GPUs of compute capability 8.0 and newer, and, for tests, on CPU
tensors in Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tuning
from ..specs import Gate, Pool

MIN_CAPABILITY = (8, 0)


@functools.cache
def _kernels() -> Any:
    """The kernels, imported on first use: importing the package never needs Triton."""
    from .. import kernels
    from ..kernels import conv, depthwise, epilogue, ese, max_pool  # noqa: F401

    return kernels


def why_not(device: torch.device | None) -> str | None:
    """The reason why the kernels cannot run on ``device`` (None: on any device here)."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    from ..kernels._common import interpreted

    if interpreted():
        return None
    if device is not None and device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, these are on {device}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below 8.0 (Ampere)"
    return None


ATEN = "aten"
"""The engine of ATen's (cuDNN's) convolution, followed by one fused epilogue into the slot."""


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
    if out.numel() == 0:
        return scale.new_zeros(x.shape[0], 1, weight.shape[0]) if pool else None
    engine = choose_engine(x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)
    return run_engine(engine, x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)


def choose_engine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
) -> str:
    """The fastest engine for a layer: :data:`ATEN`, or the name of a Triton configuration."""
    found, static = _kernels().conv.choices(x, weight, out, stride=stride, tf32=_tf32(x))
    c_out, kernel, _, c_in = weight.shape
    problem = (
        f"conv {kernel}x{kernel} stride {stride} {c_in}>{c_out} on "
        f"{'x'.join(map(str, x.shape[:3]))} {str(x.dtype).removeprefix('torch.')}"
        f"{' tf32' if _tf32(x) else ''}{' pool' if pool else ''} {found[0].form}"
    )

    def run(engine: str) -> None:
        run_engine(engine, x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)

    names = [config.name for config in found]
    if max(x.numel(), out.numel()) < 2**31:  # Where cuDNN counts in 32 bits it may crash.
        names.insert(0, ATEN)
    return tuning.choose(x.device, problem, names, static.name, run)


def run_engine(
    engine: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
) -> Tensor | None:
    """Run :func:`conv` on one engine. All of them leave the same result, up to rounding."""
    kernels, n, c_out = _kernels(), x.shape[0], weight.shape[0]
    if engine == ATEN:
        z = F.conv2d(
            x.permute(0, 3, 1, 2),
            weight.permute(0, 3, 1, 2),
            stride=stride,
            padding=weight.shape[1] // 2,
        ).permute(0, 2, 3, 1)
        tiles = kernels.epilogue.pool_tiles(out)
        partials = scale.new_empty(n, tiles, c_out) if pool else None
        z = z if z.stride(3) == 1 else z.contiguous()
        kernels.epilogue.epilogue(z, scale, shift, out, relu=relu, pool_partials=partials)
        return partials
    options: dict[str, Any] = dict(stride=stride, tf32=_tf32(x))
    found, _ = kernels.conv.choices(x, weight, out, **options)
    options["config"] = next(config for config in found if config.name == engine)
    partials = None
    if pool:
        tiles = kernels.conv.pool_tiles(x, weight, out, **options)
        partials = scale.new_empty(n, tiles, c_out)
    kernels.conv.conv(x, weight, scale, shift, out, relu=relu, pool_partials=partials, **options)
    return partials


def _tf32(x: Tensor) -> bool:
    """Whether products of ``x`` may be rounded to TF32: where torch lets cuDNN do it."""
    return x.dtype == torch.float32 and x.is_cuda and torch.backends.cudnn.allow_tf32


def depthwise(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().depthwise.depthwise(x, weight, out, stride=stride)


def gates(
    partials: Tensor, num_pixels: int, fc_weight: Tensor, fc_bias: Tensor, kind: Gate
) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    out = partials.new_empty(partials.shape[0], partials.shape[2])
    _kernels().ese.gates(partials, num_pixels, fc_weight, fc_bias, kind, out)
    return out


def apply_gates(z: Tensor, gates: Tensor | None, identity: Tensor | None, out: Tensor) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().ese.apply(z, gates, identity, out)


def max_pool(x: Tensor, out: Tensor, mode: Pool) -> None:
    """See :mod:`vovnet_fast.backends`."""
    _kernels().max_pool.max_pool(x, out, mode)
