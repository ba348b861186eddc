"""Weight gradient of a convolution, from slots.

    dW[o, tap, i] = sum over pixels of g[pixel, o] * x[pixel + tap, i]

Deterministic in two stages: programs leave sums over splits of the pixels, and a finish
adds them up in one order and applies the scale; see :mod:`.conv_weight_grad_finish`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import conv_weight_grad_pointer, conv_weight_grad_tma, cost, device
from ._common import (
    Launch,
    accumulator,
    assert_nhwc,
    assert_packed,
    assert_same,
    collapse_rows,
    processors,
)
from .conv import output_size
from .conv_weight_grad_config import WeightGradConfig, split
from .conv_weight_grad_finish import channel_sums, finish

__all__ = ["channel_sums", "choices", "finish", "plan", "weight_grad"]

_GEOMETRIES = {(3, 1), (3, 2), (1, 1), (1, 2)}
_FORMS: dict[str, Any] = {"pointer": conv_weight_grad_pointer, "tma": conv_weight_grad_tma}


def _collapse(x: Tensor, g: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution sees an image as one row, where the layout allows it."""
    if kernel == 1 and stride == 1:
        x, g = collapse_rows(x, g)
    return x, g


def layer(x: Tensor, g: Tensor, kernel: int, *, stride: int = 1, tf32: bool = False) -> cost.Layer:
    """What predictions need of arguments of :func:`weight_grad`."""
    x, g = _collapse(x, g, kernel, stride)
    batch, height, width, c_out = g.shape
    return cost.Layer(
        batch,
        height,
        width,
        x.shape[3],
        c_out,
        kernel,
        stride,
        x.dtype,
        tf32,
        cost.WEIGHT_GRAD,
        conv_weight_grad_tma.legal(x, g, stride=stride),
    )


def choices(
    x: Tensor,
    g: Tensor,
    kernel: int,
    *,
    stride: int = 1,
    tf32: bool = False,
    capability: tuple[int, int] | None = None,
) -> tuple[list[WeightGradConfig], WeightGradConfig]:
    """The configurations that can take these arguments of :func:`weight_grad`, and the default.

    ``capability`` is that of the device of the tensors, or another to compile for.
    """
    found = layer(x, g, kernel, stride=stride, tf32=tf32)
    rates = device.known("", capability) if capability else device.of(x.device)
    return cost.choices(found, rates)


def plan(
    x: Tensor,
    g: Tensor,
    kernel: int,
    *,
    stride: int = 1,
    tf32: bool = False,
    config: WeightGradConfig | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Decide the main launch of :func:`weight_grad`. Nothing may be empty.

    Returns:
        the launch, and what it will fill: products ``[S, C_out, K, K, C_in]``, stored with
        the output channels last, and sums ``[S, C_out]``; both fp32 (fp64 for fp64).
    """
    assert (kernel, stride) in _GEOMETRIES, f"no kernel {kernel} with stride {stride}"
    assert not tf32 or x.dtype == torch.float32, f"TF32 is for fp32, got {x.dtype}"
    assert_nhwc("x", x)
    height, width = output_size(x.shape[1], x.shape[2], kernel, stride)
    assert_nhwc("g", g, x.shape[0], height, width, None)
    assert_same("g", g, x)
    config = config or choices(x, g, kernel, stride=stride, tf32=tf32)[1]
    x, g = _collapse(x, g, kernel, stride)
    c_in, c_out = x.shape[3], g.shape[3]
    form, high = _FORMS[config.form], accumulator(x.dtype)
    splits, each = split(
        config,
        c_in,
        c_out,
        kernel,
        steps=form.steps(config, g),
        processors=processors(x.device),
        itemsize=high.itemsize,
    )
    products = x.new_empty(splits, kernel, kernel, c_in, c_out, dtype=high)
    sums = x.new_empty(splits, c_out, dtype=high)
    launch = form.plan(
        x, g, products, sums,
        kernel=kernel, stride=stride, each=each, tf32=tf32, config=config,
    )  # fmt: skip
    return launch, products.permute(0, 4, 1, 2, 3), sums


def weight_grad(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    *,
    stride: int = 1,
    tf32: bool = False,
    config: WeightGradConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of z = conv(x, weight) * scale + shift with respect to its parameters.

    Products are summed in fp32 (fp64 for fp64), always in the same order on one device.

    Args:
        x: ``[N, H, W, C_in]`` view in fp16, bf16 or fp32 (fp64 in the interpreter); any
            strides but that of the channels, which is 1.
        g: ``[N, H', W', C_out]`` view, dtype of ``x``, the gradient of z.
        weight: ``[C_out, K, K, C_in]``, contiguous, any floating dtype.
        scale: ``[C_out]``, fp32 (fp64 for fp64), or None for 1.
        stride: 1 or 2.
        tf32: fp32 operands may be rounded to TF32.
        config: how to tile; None takes :func:`.cost.static_choice`.

    Returns:
        dweight ``[C_out, K, K, C_in]``, dscale ``[C_out]`` (None without a scale) and
        dshift ``[C_out]``, fp32 (fp64 for fp64). Zeros where there are no pixels.
    """
    c_out, kernel, _, c_in = weight.shape
    high = accumulator(x.dtype)
    assert_packed("weight", weight, (c_out, kernel, kernel, c_in), weight.dtype)
    assert (x.shape[3], g.shape[3]) == (c_in, c_out), (
        f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)} and g {tuple(g.shape)}"
    )
    if g.numel() == 0:
        zeros = torch.zeros(c_out, dtype=high, device=x.device)
        dweight = torch.zeros_like(weight, dtype=high)
        return dweight, None if scale is None else zeros, zeros.clone()
    launch, products, sums = plan(x, g, kernel, stride=stride, tf32=tf32, config=config)
    launch.run(x.device)
    return finish(products, sums, weight, scale)
