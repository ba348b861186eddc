"""Weight gradients of convolutions of the ``cpu`` backend: the extension's own, or oneDNN's.

The extension's engines (csrc/cpu/conv_weight_grad*) read slots where they lie, and sum products in
fp32, whatever dtype they are stored in; they are chosen as those of :mod:`.convolution`. Nothing
depends on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _extension
from .._extension.fields import DTYPES, packed, pointer, view, weight_strides
from . import convolution, scratch, unpacked


def engines() -> tuple[str, ...]:
    """The engines of the extension that have weight gradients on this processor."""
    return tuple(_extension.load("cpu").conv_weight_grad_engines())


def choose_engine(dtype: torch.dtype) -> str:
    """The engine of activations of a dtype, or oneDNN's; see :func:`.convolution.choose`."""
    return convolution.choose(dtype, engines(), "weight gradient", _trial)


def _trial(dtype: torch.dtype) -> Callable[[str], None]:
    x, weight, g = convolution.layer(dtype)

    def run(engine: str) -> None:
        sums(engine, x, g, weight.shape[1])

    return run


def conv_weight_grad(
    x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :mod:`vovnet_fast.backends`."""
    engine = choose_engine(x.dtype)
    if g.numel() == 0 or engine == convolution.ATEN:
        return _extension.CPU.conv_weight_grad(x, g, weight.contiguous(), scale, stride=stride)
    layer = unpacked.layer_of("weight gradient of", g, weight, stride, x.dtype)
    if unpacked.faster(layer, engine, _unpacked_trial) and unpacked.can_hold_gradient(weight):
        return unpacked.weight_grad(x, g, weight, scale, stride=stride)
    return _by_sums(engine, x, g, weight, scale, stride)


def _unpacked_trial(engine: str, x: Tensor, weight: Tensor, g: Tensor) -> None:
    scale, stride = torch.ones(g.shape[3]), x.shape[1] // g.shape[1]
    if engine == unpacked.NAME:
        unpacked.weight_grad(x, g, weight, scale, stride=stride)
    else:
        _by_sums(engine, x, g, weight, scale, stride)


def _by_sums(
    engine: str, x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, stride: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`conv_weight_grad` in a layout of its own first."""
    # Without a scale they are the gradient itself, but for where it lies.
    done = scale is None and weight.is_contiguous()
    products = sums(engine, x, g, weight.shape[1], stride=stride, lent=not done)
    shift = _extension.CPU.channel_sums(g)
    if done:
        return products, None, shift
    return *_finish(engine, products, weight, scale), shift


def _finish(
    engine: str, products: Tensor, weight: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and scale, from that of their product.

    Args:
        engine: by name.
        products: ``[C_out, K, K, C_in]``, fp32, contiguous.
        weight: of this shape, any floating dtype, any strides: the gradient has the same ones, as
            long as there is no gap between its numbers and no two are one.
        scale: ``[C_out]``, fp32, or None for one, which has no gradient.
    """
    dweight = torch.empty_like(weight, dtype=torch.float32)
    dscale = None if scale is None else torch.empty_like(scale)
    if dweight.stride() != weight.stride():
        weight, dweight = weight.contiguous(), torch.empty_like(products)
    _extension.load("cpu").conv_weight_grad_finish(
        torch.get_num_threads(),
        engine,
        products=packed("products", products, torch.float32, *weight.shape),
        weight=(pointer("weight", weight), DTYPES[weight.dtype]),
        scale=packed("scale", scale, torch.float32, weight.shape[0]),
        dweight=pointer("dweight", dweight),
        dscale=None if dscale is None else pointer("dscale", dscale),
        **weight_strides(weight),
    )
    return dweight, dscale


def _lent(role: str, *shape: int) -> Tensor:
    return scratch.lend(role, 4 * math.prod(shape)).view(torch.float32).view(shape)


def sums(
    engine: str, x: Tensor, g: Tensor, kernel: int, *, stride: int = 1, lent: bool = False
) -> Tensor:
    """Sums over all pixels of the products of a gradient and the inputs of its taps.

    Args:
        engine: by name.
        x: ``[N, H, W, C_in]`` view, in fp16, bf16 or fp32.
        g: ``[N, H', W', C_out]`` view of that dtype, the gradient of a convolution's output.
        kernel: 1 or 3.
        stride: of the convolution.
        lent: in memory that the next call writes to (:mod:`.scratch`).

    Returns:
        ``[C_out, K, K, C_in]`` in fp32.
    """
    n, height, width, c_in = x.shape
    c_out = g.shape[3]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    cpu = _extension.load("cpu")
    parts = cpu.conv_weight_grad_parts(n, out_height, out_width, c_in, c_out, kernel, stride)
    shape = c_out, kernel, kernel, c_in
    out = _lent("sums", *shape) if lent else x.new_empty(shape, dtype=torch.float32)
    partials = _lent("partials", parts, *shape) if parts > 1 else None  # Held here.
    cpu.conv_weight_grad(
        torch.get_num_threads(),
        engine,
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
