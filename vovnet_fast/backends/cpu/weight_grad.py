"""Weight gradients of convolutions of the ``cpu`` backend: the extension's own, or oneDNN's.

The extension's (csrc/cpu/conv_weight_grad*) reads slots where they lie, and sums products in
fp32, whatever dtype they are stored in; :func:`preferred` is what measurements say of it.
Neither depends on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from .._extension.fields import DTYPES, pointer, view


def preferred(dtype: torch.dtype) -> bool:
    """Whether the extension's own is taken for a layer, where it has one.

    With AVX2 it was 1.5 to 5 times as fast as oneDNN's on V-39's 3x3 layers in fp32, more in half
    precision, and level with it (0.94 to 1.2) on 1x1 layers in fp32. It was timed on no other
    instruction set.
    """
    return dtype != torch.float64


def conv_weight_grad(
    x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :mod:`vovnet_fast.backends`."""
    kernel = weight.shape[1]
    ours = preferred(x.dtype) and _extension.load("cpu").has_conv_weight_grad()
    if g.numel() == 0 or not ours:
        return _extension.CPU.conv_weight_grad(x, g, weight, scale, stride=stride)
    products, shift = sums(x, g, kernel, stride=stride), _extension.CPU.channel_sums(g)
    if scale is None:
        return products, None, shift
    return *_extension.CPU.pack_backward(products, weight, scale), shift


def sums(x: Tensor, g: Tensor, kernel: int, *, stride: int = 1) -> Tensor:
    """Sums over all pixels of the products of a gradient and the inputs of its taps.

    Args:
        x: ``[N, H, W, C_in]`` view, in fp16, bf16 or fp32.
        g: ``[N, H', W', C_out]`` view of that dtype, the gradient of a convolution's output.
        kernel: 1 or 3.
        stride: of the convolution.

    Returns:
        ``[C_out, K, K, C_in]`` in fp32.
    """
    n, height, width, c_in = x.shape
    c_out = g.shape[3]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    cpu = _extension.load("cpu")
    parts = cpu.conv_weight_grad_parts(n, out_height, out_width, c_in, c_out, kernel, stride)
    out = x.new_empty(c_out, kernel, kernel, c_in, dtype=torch.float32)
    partials = out.new_empty(parts, *out.shape) if parts > 1 else None  # Held here.
    cpu.conv_weight_grad(
        torch.get_num_threads(),
        x=view("x", x, x, n, height, width, c_in),
        g=view("g", g, x, n, out_height, out_width, c_out),
        partials=None if partials is None else pointer("partials", partials),
        out=pointer("out", out),
        n=n,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        c_in=c_in,
        c_out=c_out,
        parts=parts,
        kernel=kernel,
        stride=stride,
        dtype=DTYPES[x.dtype],
    )
    return out
