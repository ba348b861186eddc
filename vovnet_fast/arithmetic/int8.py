"""The ops of a network in int8 by plain PyTorch: exact on any device, the ground truth of kernels.

See :mod:`vovnet_fast.arithmetic` for what is summed and rounded. ``levels`` is the largest
activation, 127 or 255.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..specs import Pool
from .layers import QuantizedConv, QuantizedDepthwise, QuantizedGate, QuantizedSum
from .sums import conv_sums, depthwise_sums

ACTIVATION = torch.uint8

LARGEST = 127
"""Of weights, and of images."""

WIDE = 1023
"""Of the images of a wide stem: their products with its weights are summed exactly below
:data:`WIDE_SUM` by fp32, by fp16 on a tensor core with fp32 sums, and by int32."""

WIDE_WEIGHT = 2047
"""Of its weights: fp16 holds every integer up to 2048."""

WIDE_SUM = 2**24

SUM = 2**31 - 1
"""No accumulator gets beyond it."""

FACTOR = 2**15 - 1
"""The largest factor of :func:`apply_gates`, and weight of :func:`gates`."""

MEAN_BITS = 13
"""Of the mean over the pixels that :func:`gates` takes."""

TABLE = 2048
"""Entries of a table of sigmoids."""

TABLE_REACH = 8
"""They are those of logits from minus this to this."""


def image_dtype(wide: bool) -> torch.dtype:
    """Of quantised images."""
    return torch.int16 if wide else torch.int8


def requantize(acc: Tensor, multiplier: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """The one rounding there is.

    Args:
        acc: integers below 2**31, in fp64 or an integer dtype: fp32 rounds them to nearest even.
        multiplier: fp32, of the last dimension of ``acc``.
        low, high: integers between which the result is.

    Returns:
        integers in fp32.
    """
    scaled = acc.to(torch.float32) * multiplier
    return torch.minimum(
        torch.maximum(scaled, _like(low, scaled)), _like(high, scaled)
    ).round()  # To nearest even.


def _like(bound: Tensor | int, x: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=x.dtype, device=x.device)


def quantize_image(x: Tensor, scale: float, out: Tensor, *, wide: bool = False) -> None:
    """Images as signed integers: ``clamp(x * float32(1 / scale), -limit, limit)``, rounded.

    Args:
        x: ``[N, H, W, C]`` fp32, finite.
        scale: the value of one step.
        out: ``[N, H, W, C]`` int8, of a wide stem int16.
        wide: the limit is :data:`WIDE`, and not :data:`LARGEST`.
    """
    limit = WIDE if wide else LARGEST
    out.copy_(requantize(x, _like_number(1 / scale, x), -limit, limit))


def _like_number(value: float, x: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=x.device)


def conv(
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None = None,
    pool: bool = False,
) -> Tensor | None:
    """A convolution and its ReLU, without the depthwise one that may come before it.

    Args:
        x: ``[N, H, W, C_in]`` uint8: a slot, or a whole concat buffer. Images are int8 or int16.
        layer: weights; the stride is 1 if it has a depthwise part, which had it.
        out: ``[N, H', W', C_out]`` uint8, a slot say; None where only the feature is wanted.
        levels: the largest activation.
        feature: ``[N, H', W', C_out]`` fp32 for the same before its rounding,
            ``max(float32(acc) * unit, 0)``, or None.
        pool: return sums of ``out`` over the pixels.

    Returns:
        ``[N, T, C_out]`` int32 if ``pool``: partial sums, of which T may be any number.
    """
    stride = 1 if layer.depthwise is not None else layer.stride
    acc = conv_sums(x, layer.weight, stride).round_() + layer.bias
    if feature is not None:
        feature.copy_((acc.to(torch.float32) * layer.unit).clamp_min(0))
    if out is None:
        return None
    out.copy_(requantize(acc, layer.multiplier, 0, levels))
    return out.sum((1, 2), dtype=torch.int32).unsqueeze(1) if pool else None


def depthwise(
    x: Tensor, layer: QuantizedDepthwise, out: Tensor, *, levels: int, stride: int = 1
) -> None:
    """A depthwise 3x3: ``clamp(float32(acc) * multiplier, -zero, levels - zero)``, rounded, + zero.

    Args:
        x: ``[N, H, W, C]`` uint8.
        layer: weights.
        out: ``[N, H', W', C]`` uint8.
        levels: the largest activation.
        stride: of the convolution.
    """
    acc = depthwise_sums(x, layer.weight, stride).round_()
    zero = layer.zero.to(torch.float32)
    out.copy_(requantize(acc, layer.multiplier, -zero, levels - zero) + zero)


def max_pool(x: Tensor, out: Tensor, mode: Pool) -> None:
    """See :func:`vovnet_fast.reference.max_pool`; of ``[N, H, W, C]`` views."""
    options = dict(ceil_mode=True) if mode == "ceil" else dict(padding=1)
    y = F.max_pool2d(x.permute(0, 3, 1, 2).to(torch.float32), 3, 2, **options)
    out.copy_(y.permute(0, 2, 3, 1))


def gates(sums: Tensor, num_pixels: int, layer: QuantizedGate) -> Tensor:
    """The gates of eSE: ``mean = round(float32(sum) * float32(mean_scale / num_pixels))``, then
    int16 x int16 products summed in int32; see :class:`.layers.QuantizedGate`.

    Args:
        sums: ``[N, T, C]`` int32 of :func:`conv`, for fewer than 2**31 / levels pixels.
        num_pixels: H * W.
        layer: weights.

    Returns:
        ``[N, C]`` int32, between 0 and ``layer.most``.
    """
    total = sums.sum(1, dtype=torch.int64).to(torch.float32)
    mean = (total * _like_number(layer.mean_scale / num_pixels, total)).round()
    acc = mean.double() @ layer.weight.double().T + layer.bias
    if layer.table is None:
        return requantize(acc, layer.multiplier, 0, int(layer.most)).to(torch.int32)
    return layer.table[requantize(acc, layer.multiplier, 0, TABLE - 1).long()]


def apply_gates(
    z: Tensor,
    gates: Tensor | None,
    identity: Tensor | None,
    layer: QuantizedSum,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None = None,
) -> None:
    """The end of a block: ``acc = z * gate + identity * layer.identity``, one rescale.

    Args:
        z: ``[N, H, W, C]`` uint8, what the 1x1 over the concat made.
        gates: ``[N, C]`` int32 of :func:`gates`, or None for ``layer.gate`` throughout.
        identity: ``[N, H, W, C]`` uint8, the block's input (slot 0), or None.
        layer: factors.
        out: ``[N, H, W, C]`` uint8, slot 0 of the next block say; None where only the feature is
            wanted.
        levels: the largest activation.
        feature: ``[N, H, W, C]`` fp32 for the same before its rounding,
            ``float32(acc) * float32(scale * 2**-shift)``, or None.
    """
    acc = z.to(torch.int32) * (int(layer.gate) if gates is None else gates[:, None, None, :])
    if identity is not None:
        acc += identity.to(torch.int32) * int(layer.identity)
    if out is not None:
        out.copy_(requantize(acc, _like_number(2.0**-layer.shift, acc), 0, levels))
    if feature is not None:
        unit = _like_number(layer.scale * 2.0**-layer.shift, acc)
        feature.copy_(acc.to(torch.float32) * unit)
