"""The ops of a network in fp8 e4m3, emulated: the signatures of :mod:`.int8`.

Activations and weights are e4m3 (1 sign, 4 exponent, 3 mantissa bits; at most 448; no infinity),
sums are those of fp64 rounded to fp32 once, biases, gates and means fp32. What a kernel sums in
fp32 differs from that in the last bits, and its results by at most one unit in the last place of
e4m3. What is beyond 448 becomes 448.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import reference
from ..specs import Pool
from . import int8
from .layers import QuantizedConv, QuantizedDepthwise, QuantizedGate, QuantizedSum
from .sums import conv_sums, depthwise_sums

LARGEST = 448
"""Of e4m3."""

ACTIVATION = getattr(torch, "float8_e4m3fn", None)


def why_not() -> str | None:
    """Why this torch cannot emulate fp8, or None."""
    if ACTIVATION is None:
        return f"torch {torch.__version__} has no float8_e4m3fn: install a newer one"
    if not _concatenates(ACTIVATION):
        return f"torch {torch.__version__} concatenates no float8_e4m3fn: install a newer one"
    return None


@functools.cache
def _concatenates(dtype: torch.dtype) -> bool:
    """torch 2.1 does not."""
    try:
        torch.cat([torch.zeros(1, device="cpu").to(dtype)] * 2)
    except RuntimeError:
        return False
    return True


def image_dtype(wide: bool) -> torch.dtype:
    """Of quantised images."""
    assert ACTIVATION is not None
    return torch.float32 if wide else ACTIVATION


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded to nearest even, and no larger than 448."""
    assert ACTIVATION is not None
    return x.clamp(-LARGEST, LARGEST).to(ACTIVATION)


def quantize_image(x: Tensor, scale: float, out: Tensor, *, wide: bool = False) -> None:
    """See :func:`.int8.quantize_image`. Images of a wide stem stay as they are, in fp32."""
    out.copy_(x if wide else to_e4m3(x * (1 / scale)))


def conv(
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int = LARGEST,
    feature: Tensor | None = None,
    pool: bool = False,
) -> Tensor | None:
    """See :func:`.int8.conv`. Partial sums are fp32."""
    stride = 1 if layer.depthwise is not None else layer.stride
    acc = conv_sums(x, layer.weight, stride).to(torch.float32) + layer.bias
    if feature is not None:
        feature.copy_((acc * layer.unit).clamp_min(0))
    if out is None:
        return None
    out.copy_(to_e4m3((acc * layer.multiplier).clamp_min(0)))
    return out.double().sum((1, 2)).to(torch.float32).unsqueeze(1) if pool else None


def depthwise(
    x: Tensor, layer: QuantizedDepthwise, out: Tensor, *, levels: int = LARGEST, stride: int = 1
) -> None:
    """See :func:`.int8.depthwise`. There are no zero points."""
    acc = depthwise_sums(x, layer.weight, stride).to(torch.float32)
    out.copy_(to_e4m3(acc * layer.multiplier))


def max_pool(x: Tensor, out: Tensor, mode: Pool) -> None:
    """See :func:`.int8.max_pool`."""
    int8.max_pool(x, out, mode)


def gates(sums: Tensor, num_pixels: int, layer: QuantizedGate) -> Tensor:
    """See :func:`.int8.gates`: ``[N, C]`` fp32, the gates times ``layer.most``."""
    mean = sums.double().sum(1) / num_pixels
    acc = (mean @ layer.weight.double().T + layer.bias).to(torch.float32)
    return reference.gate(acc * layer.multiplier, layer.kind) * layer.most


def apply_gates(
    z: Tensor,
    gates: Tensor | None,
    identity: Tensor | None,
    layer: QuantizedSum,
    out: Tensor | None,
    *,
    levels: int = LARGEST,
    feature: Tensor | None = None,
) -> None:
    """See :func:`.int8.apply_gates`."""
    acc = z.to(torch.float32) * (layer.gate if gates is None else gates[:, None, None, :])
    if identity is not None:
        acc = acc + identity.to(torch.float32) * layer.identity
    if out is not None:
        out.copy_(to_e4m3(acc))
    if feature is not None:
        feature.copy_(acc * layer.scale)
