"""Convolutions of what eight bits hold, without rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_sums(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Sums of products in fp64, exact for integers.

    fp64 holds every integer below 2**53, and PyTorch convolves fp64 in fp64 on all devices, where
    fp32 may be TF32, bf16 or a Winograd transform. Other algorithms than sums of products would
    leave a fraction: :mod:`.int8` rounds it away.

    Args:
        x: ``[N, H, W, C_in]``, any dtype.
        weight: ``[C_out, K, K, C_in]``.
        stride: of the convolution. Padding is K // 2.

    Returns:
        ``[N, H', W', C_out]`` fp64.
    """
    kernel = weight.double().permute(0, 3, 1, 2).contiguous()
    y = F.conv2d(_nchw(x), kernel, stride=stride, padding=weight.shape[1] // 2)
    return y.permute(0, 2, 3, 1)


def depthwise_sums(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """As :func:`conv_sums`, for a depthwise 3x3 with ``[3, 3, C]`` weights."""
    kernel = weight.double().permute(2, 0, 1).unsqueeze(1).contiguous()
    y = F.conv2d(_nchw(x), kernel, stride=stride, padding=1, groups=x.shape[3])
    return y.permute(0, 2, 3, 1)


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).to(torch.float64, memory_format=torch.contiguous_format)
