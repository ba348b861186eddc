"""Convolution, batch norm with fixed statistics, ReLU."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from . import _checks
from ._checks import nchw, nhwc
from .memory import Memory


class ConvParams(NamedTuple):
    """One convolution layer with its batch norm folded to a scale and a shift.

    Attributes:
        weight: ``[C_out, K, K, C_in]``, contiguous, K = 1 or 3, dtype of the activations.
        scale: ``[C_out]``, fp32 (fp64 for fp64): gamma / sqrt(var + eps).
        shift: ``[C_out]``, as ``scale``: beta + (bias - mean) * scale.
        stride: of the convolution, or of the depthwise one before it.
        depthwise: ``[3, 3, C_in]`` of a depthwise 3x3 that comes first, or None.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: int = 1
    depthwise: Tensor | None = None


def fold(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    stride: int = 1,
    depthwise: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> ConvParams:
    """Fold a batch norm with fixed statistics, and pack weights for the backends.

    The scale is kept apart from the weight, and applied in fp32 to the fp32 sum:
    folding it into fp16 weights would round it a second time.

    Args:
        weight: ``[C_out, C_in, K, K]``; ``channels_last`` ones are not copied.
        bias: ``[C_out]`` of the convolution, or None.
        bn_weight, bn_bias: ``[C_out]`` (gamma, beta), or None for one and zero.
        running_mean, running_var: ``[C_out]``.
        eps: added to the variance.
        stride: see :class:`ConvParams`.
        depthwise: ``[C_in, 1, 3, 3]`` of a depthwise convolution that comes first.
        dtype: of the activations; that of ``weight`` by default.
    """
    dtype = dtype or weight.dtype
    high = _checks.accumulator(dtype)
    scale = torch.rsqrt(running_var.to(high) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(high)
    offset = running_mean.to(high) if bias is None else running_mean.to(high) - bias.to(high)
    shift = -offset * scale
    if bn_bias is not None:
        shift = shift + bn_bias.to(high)
    packed = weight.to(dtype).permute(0, 2, 3, 1).contiguous()
    if depthwise is not None:
        depthwise = depthwise.to(dtype)[:, 0].permute(1, 2, 0).contiguous()
    return ConvParams(packed, scale, shift, stride, depthwise)


def output_size(height: int, width: int, params: ConvParams) -> tuple[int, int]:
    """Height and width of a layer's output."""
    stride = params.stride
    return (height - 1) // stride + 1, (width - 1) // stride + 1


def run(
    backend: ModuleType,
    x: Tensor,
    params: ConvParams,
    out: Tensor,
    memory: Memory,
    *,
    pool: bool = False,
) -> Tensor | None:
    """Run a layer on ``[N, H, W, C]`` views; see :mod:`vovnet_fast.backends`."""
    stride = params.stride
    if params.depthwise is not None:
        spatial = memory.scratch("spatial", x, *out.shape[:3], x.shape[3])
        backend.depthwise(x, params.depthwise, spatial, stride=stride)
        x, stride = spatial, 1
    partials: Tensor | None = backend.conv(
        x, params.weight, params.scale, params.shift, out, stride=stride, relu=True, pool=pool
    )
    return partials


def check(op: str, params: ConvParams, x: Tensor, channels: int | None = None) -> None:
    """Refuse parameters that do not fit each other or the activations."""
    if params.weight.ndim != 4 or params.weight.shape[1] not in (1, 3):
        raise ValueError(
            f"{op}: weight must be packed as [C_out, K, K, C_in] with K = 1 or 3 (see "
            f"vovnet_fast.ops.fold), got {list(params.weight.shape)}"
        )
    c_out, kernel, _, c_in = params.weight.shape
    if channels is not None and c_in != channels:
        raise ValueError(f"{op}: a layer takes {c_in} channels, and is given {channels}")
    _checks.parameter(op, "weight", params.weight, (c_out, kernel, kernel, c_in), x)
    if not params.weight.is_contiguous():
        raise ValueError(f"{op}: weight must be contiguous, got strides {params.weight.stride()}")
    if params.weight.dtype != x.dtype:
        raise TypeError(f"{op}: weight is {params.weight.dtype} and x {x.dtype}: fold for x.dtype")
    for name, vector in (("scale", params.scale), ("shift", params.shift)):
        _checks.parameter(op, name, vector, (c_out,), x)
        if vector.dtype != _checks.accumulator(x.dtype):
            raise TypeError(
                f"{op}: {name} must be {_checks.accumulator(x.dtype)}, got {vector.dtype}"
            )
    if params.depthwise is not None:
        _checks.parameter(op, "depthwise", params.depthwise, (3, 3, c_in), x)
    if params.stride not in (1, 2):
        raise ValueError(f"{op}: stride must be 1 or 2, got {params.stride}")


def conv_bn_relu(x: Tensor, params: ConvParams) -> Tensor:
    """relu(conv(x) * scale + shift): a convolution with its batch norm folded, and ReLU.

    Args:
        x: ``[N, C_in, H, W]`` in fp16, bf16, fp32 or fp64.
        params: see :func:`fold`. Padding is K // 2.

    Returns:
        ``[N, C_out, H', W']``, ``channels_last``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: a gradient would be needed.
        BackendError: the backend that was asked for cannot run.
    """
    op = "conv_bn_relu"
    _checks.activations(op, "x", x, params.weight.shape[-1])
    check(op, params, x)
    _checks.no_gradient(op, x, *(t for t in params if isinstance(t, Tensor)))
    out: Tensor = torch.ops.vovnet_fast.conv_bn_relu(
        x, params.weight, params.scale, params.shift, params.stride, params.depthwise
    )
    return out


@torch.library.custom_op("vovnet_fast::conv_bn_relu", mutates_args=())
def _conv_bn_relu(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int, depthwise: Tensor | None
) -> Tensor:
    params = ConvParams(weight, scale, shift, stride, depthwise)
    view = nhwc(x)
    out = view.new_empty(x.shape[0], *output_size(x.shape[2], x.shape[3], params), weight.shape[0])
    run(backends.get(x.device), view, params, out, Memory())
    return nchw(out)


@_conv_bn_relu.register_fake
def _(x, weight, scale, shift, stride, depthwise):
    params = ConvParams(weight, scale, shift, stride, depthwise)
    return nchw(
        x.new_empty(x.shape[0], *output_size(x.shape[2], x.shape[3], params), weight.shape[0])
    )
