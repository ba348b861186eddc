"""The backend of plain PyTorch: the signatures of :mod:`vovnet_fast.backends`, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..specs import Gate, Pool


def why_not(device: torch.device | None) -> str | None:
    """Nothing keeps it from running."""
    return None


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


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
    """See :mod:`vovnet_fast.backends`."""
    z = F.conv2d(_nchw(x), _nchw(weight), stride=stride, padding=weight.shape[1] // 2)
    y = z.permute(0, 2, 3, 1) * scale + shift  # Promotes to the dtype of scale.
    if relu:
        y = y.relu()
    out.copy_(y)
    return y.sum((1, 2)).unsqueeze(1) if pool else None


def depthwise(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> None:
    """See :mod:`vovnet_fast.backends`."""
    kernel = weight.permute(2, 0, 1).unsqueeze(1)  # [C, 1, 3, 3]
    y = F.conv2d(_nchw(x), kernel, stride=stride, padding=1, groups=x.shape[3])
    out.copy_(y.permute(0, 2, 3, 1))


def gates(
    partials: Tensor, num_pixels: int, fc_weight: Tensor, fc_bias: Tensor, kind: Gate
) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    mean = partials.sum(1) / num_pixels
    z = F.linear(mean, fc_weight.to(mean.dtype), fc_bias.to(mean.dtype))
    return reference.gate(z, kind)


def apply_gates(z: Tensor, gates: Tensor | None, identity: Tensor | None, out: Tensor) -> None:
    """See :mod:`vovnet_fast.backends`."""
    y = z if gates is None else z * gates[:, None, None, :]
    out.copy_(y if identity is None else y + identity)


def max_pool(x: Tensor, out: Tensor, mode: Pool) -> None:
    """See :mod:`vovnet_fast.backends`."""
    out.copy_(reference.max_pool(_nchw(x), mode).permute(0, 2, 3, 1))
