"""All that is no dense convolution: one kernel each, and no choice of engines."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dtypes import accumulator
from ...specs import Gate, Pool
from .choosing import load_kernels


def depthwise(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> None:
    """See :mod:`vovnet_fast.backends`."""
    load_kernels().depthwise.depthwise(x, weight, out, stride=stride)


def depthwise_input_grad(
    g: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    load_kernels().depthwise.input_grad(g, weight, out, stride=stride, add=add, mask=mask)


def depthwise_weight_grad(x: Tensor, g: Tensor, *, stride: int = 1) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    return load_kernels().depthwise.weight_grad(x, g, stride=stride)


def normalize(
    z: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, pool: bool = False
) -> Tensor | None:
    """See :mod:`vovnet_fast.backends`."""
    if out.numel() == 0:
        return scale.new_zeros(z.shape[0], 1, z.shape[3]) if pool else None
    kernel, partials = load_kernels().epilogue, None
    if pool:
        partials = scale.new_empty(z.shape[0], kernel.pool_tiles(out), z.shape[3])
    kernel.epilogue(z, scale, shift, out, pool_partials=partials)
    return partials


def batch_norm_merge(partials: Tensor) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    out = partials.new_empty(partials.shape[1:])
    load_kernels().batch_norm.merge(partials, out)
    return out


def batch_norm_finish(
    partials: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    kernel = load_kernels().batch_norm
    norm = partials.new_empty(kernel.NORM_ROWS, partials.shape[2])
    kernel.finish(partials, gamma, beta, eps, norm)
    return norm


def batch_norm_sums(g: Tensor, z: Tensor, norm: Tensor) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    out = norm.new_empty(2, z.shape[3])
    load_kernels().batch_norm_backward.backward_sums(g, z, norm, out)
    return out


def batch_norm_input_grad(
    g: Tensor, z: Tensor, norm: Tensor, sums: Tensor, gamma: Tensor | None, out: Tensor
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    load_kernels().batch_norm_backward.input_grad(g, z, norm, sums, gamma, out)


def gates(
    partials: Tensor, num_pixels: int, fc_weight: Tensor, fc_bias: Tensor, kind: Gate
) -> tuple[Tensor, Tensor]:
    """See :mod:`vovnet_fast.backends`."""
    out = partials.new_empty(partials.shape[0], partials.shape[2])
    mean = torch.empty_like(out)
    load_kernels().ese.gates(partials, num_pixels, fc_weight, fc_bias, kind, mean, out)
    return out, mean


def gate_sums(dout: Tensor, y: Tensor) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    out = y.new_empty(y.shape[0], y.shape[3], dtype=accumulator(y.dtype))
    load_kernels().ese_backward.gate_sums(dout, y, out)
    return out


def gates_backward(
    dgates: Tensor,
    gates: Tensor,
    mean: Tensor,
    num_pixels: int,
    fc_weight: Tensor,
    kind: Gate,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`vovnet_fast.backends`."""
    dpixel, dfc_weight = torch.empty_like(mean), mean.new_empty(fc_weight.shape)
    dfc_bias = mean.new_empty(mean.shape[1])
    load_kernels().ese_backward.gates_backward(
        dgates, gates, mean, num_pixels, fc_weight, kind, dpixel, dfc_weight, dfc_bias
    )
    return dpixel, dfc_weight, dfc_bias


def apply_gates(z: Tensor, gates: Tensor | None, identity: Tensor | None, out: Tensor) -> None:
    """See :mod:`vovnet_fast.backends`."""
    load_kernels().ese.apply(z, gates, identity, out)


def apply_gates_backward(
    dout: Tensor, gates: Tensor | None, dpixel: Tensor | None, y: Tensor, out: Tensor
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    load_kernels().ese_backward.apply_backward(dout, gates, dpixel, y, out)


def max_pool(x: Tensor, out: Tensor, mode: Pool, argmax: Tensor | None = None) -> None:
    """See :mod:`vovnet_fast.backends`."""
    load_kernels().max_pool.max_pool(x, out, mode, argmax)


def max_pool_backward(dout: Tensor, argmax: Tensor, out: Tensor, mode: Pool) -> None:
    """See :mod:`vovnet_fast.backends`."""
    load_kernels().max_pool.max_pool_backward(dout, argmax, out, mode)
