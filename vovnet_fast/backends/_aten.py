"""ATen's convolutions (cuDNN's, oneDNN's) of ``[N, H, W, C]`` views, and their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv(x: Tensor, weight: Tensor, *, stride: int) -> Tensor:
    """Convolution with ``weight``, ``[C_out, K, K, C_in]``; the result has channel stride 1."""
    z = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight.permute(0, 3, 1, 2),
        stride=stride,
        padding=weight.shape[1] // 2,
    ).permute(0, 2, 3, 1)
    return z if z.stride(3) == 1 else z.contiguous()


def input_grad(g: Tensor, packed: Tensor, out: Tensor, stride: int) -> Tensor:
    """Gradient of the input of a convolution, as ``out``, with channel stride 1.

    Args:
        g: gradient of its output.
        packed: ``[C_in, K, K, C_out]``, its weights, transposed and flipped.
        out: ``[N, H, W, C_in]``: only its shape matters.
        stride: of the convolution.
    """
    if stride == 1:
        return conv(g, packed, stride=1)
    kernel = packed.shape[1]
    rest = [(size - 1) % stride for size in out.shape[1:3]]  # What the stride left over.
    dx = F.conv_transpose2d(
        g.permute(0, 3, 1, 2),
        packed.flip(1, 2).permute(3, 0, 1, 2),
        stride=stride,
        padding=kernel // 2,
        output_padding=rest,
    ).permute(0, 2, 3, 1)
    return dx if dx.stride(3) == 1 else dx.contiguous()


def input_grad_of(g: Tensor, weight: Tensor, out: Tensor, stride: int) -> Tensor:
    """:func:`input_grad` with a weight as convolutions have it, ``[C_out, K, K, C_in]``.

    On a CPU that is oneDNN's own function: a transposed convolution is one more pass over the
    weight, to flip it, and took up to twice as long.
    """
    size = weight.shape[1]
    dx, _, _ = torch.ops.aten.convolution_backward(
        g.permute(0, 3, 1, 2),
        # Of the input only shape, layout and dtype matter.
        torch.empty_like(out, memory_format=torch.contiguous_format).permute(0, 3, 1, 2),
        weight.permute(0, 3, 1, 2),
        None,
        [stride, stride],
        [size // 2, size // 2],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, False, False],
    )
    dx = dx.permute(0, 2, 3, 1)
    return dx if dx.stride(3) == 1 else dx.contiguous()


def weight_grad(x: Tensor, g: Tensor, weight: Tensor, *, stride: int) -> Tensor:
    """Gradient of ``weight``, ``[C_out, K, K, C_in]``, in the dtype of ``x``, in any layout."""
    size = weight.shape[1]
    _, dw, _ = torch.ops.aten.convolution_backward(
        g.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        # Of the weight only shape, layout and dtype matter.
        torch.empty_like(weight, dtype=x.dtype).permute(0, 3, 1, 2),
        None,
        [stride, stride],
        [size // 2, size // 2],
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, False],
    )
    return dw.permute(0, 2, 3, 1)
