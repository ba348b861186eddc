"""The backend of plain PyTorch: the signatures of :mod:`vovnet_fast.backends`, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from .. import reference
from .._dtypes import accumulator
from ..specs import Gate, Pool


def why_not(device: torch.device | None) -> str | None:
    """Nothing keeps it from running."""
    return None


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _padding(weight: Tensor) -> int:
    return weight.shape[1] // 2


def _store(y: Tensor, out: Tensor, *, pool: bool) -> Tensor | None:
    """Round ``y`` into ``out``; with ``pool`` return its sums over the pixels, ``[N, 1, C]``."""
    out.copy_(y)
    return y.sum((1, 2)).unsqueeze(1) if pool else None


def _masked(g: Tensor, mask: Tensor | None) -> Tensor:
    """Zero where the last channels' activations are not positive; NaN lets gradients through."""
    if mask is None:
        return g
    first = g.shape[3] - mask.shape[3]
    return torch.cat([g[..., :first], g[..., first:].masked_fill(mask <= 0, 0)], dim=3)


def _accumulate(g: Tensor, out: Tensor, add: Tensor | None, mask: Tensor | None) -> None:
    """out = mask(g + add): ``add`` belongs to the first channels, ``mask`` to the last ones."""
    g = g.to(accumulator(out.dtype))
    if add is not None:
        g = torch.cat([g[..., : add.shape[3]] + add, g[..., add.shape[3] :]], dim=3)
    out.copy_(_masked(g, mask))


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
    z = F.conv2d(_nchw(x), _nchw(weight), stride=stride, padding=_padding(weight))
    y = z.permute(0, 2, 3, 1) * scale + shift  # Promotes to the dtype of scale.
    return _store(y.relu() if relu else y, out, pool=pool)


def conv_statistics(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    z = F.conv2d(_nchw(x), _nchw(weight), stride=stride, padding=_padding(weight))
    z = z.permute(0, 2, 3, 1)
    out.copy_(z)
    z = z.to(accumulator(z.dtype)).flatten(0, 2)  # [N * H * W, C]
    deviations = (z - z.mean(0)).square().sum(0)
    return torch.stack([torch.full_like(deviations, z.shape[0]), z.sum(0), deviations])[None]


def conv_input_grad(
    g: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    if scale is not None:
        weight = weight * scale[:, None, None, None]
    n, h, w, c_in = out.shape
    dx = grad.conv2d_input(
        (n, c_in, h, w), _nchw(weight.to(g.dtype)), _nchw(g), stride, _padding(weight)
    )
    _accumulate(dx.permute(0, 2, 3, 1), out, add, mask)


def conv_weight_grad(
    x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :mod:`vovnet_fast.backends`."""
    c_out, kernel, _, c_in = weight.shape
    dw = grad.conv2d_weight(
        _nchw(x), (c_out, c_in, kernel, kernel), _nchw(g), stride, _padding(weight)
    )
    high = accumulator(g.dtype)
    dw = dw.permute(0, 2, 3, 1).to(high)
    dshift = g.sum((0, 1, 2), dtype=high)
    if scale is None:
        return dw, None, dshift
    return dw * scale[:, None, None, None], (dw * weight).sum((1, 2, 3)), dshift


def normalize(
    z: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, pool: bool = False
) -> Tensor | None:
    """See :mod:`vovnet_fast.backends`."""
    return _store((z * scale + shift).relu(), out, pool=pool)


def batch_norm_merge(partials: Tensor) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    counts, sums, deviations = partials.unbind(1)  # [R, C]
    count, total = counts.sum(0), sums.sum(0)
    shifts = torch.where(counts > 0, sums / counts.clamp_min(1) - total / count, 0)
    return torch.stack([count, total, (deviations + counts * shifts.square()).sum(0)])


def batch_norm_finish(
    partials: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    count, total, deviations = batch_norm_merge(partials)
    mean, rstd = total / count, torch.rsqrt(deviations / count + eps)
    scale = rstd if gamma is None else gamma.to(rstd.dtype) * rstd
    shift = -mean * scale if beta is None else beta.to(rstd.dtype) - mean * scale
    return torch.stack([mean, rstd, scale, shift, deviations / (count - 1), count])


def batch_norm_sums(g: Tensor, z: Tensor, norm: Tensor) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    g = g.to(norm.dtype)
    return torch.stack([g.sum((0, 1, 2)), (g * (z - norm[0]) * norm[1]).sum((0, 1, 2))])


def batch_norm_input_grad(
    g: Tensor, z: Tensor, norm: Tensor, sums: Tensor, gamma: Tensor | None, out: Tensor
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    mean, rstd, _, _, _, count = norm
    dz = g - sums[0] / count - (z - mean) * rstd * (sums[1] / count)
    out.copy_(dz * (rstd if gamma is None else gamma * rstd))


def depthwise(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> None:
    """See :mod:`vovnet_fast.backends`."""
    kernel = weight.permute(2, 0, 1).unsqueeze(1)  # [C, 1, 3, 3]
    y = F.conv2d(_nchw(x), kernel, stride=stride, padding=1, groups=x.shape[3])
    out.copy_(y.permute(0, 2, 3, 1))


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
    n, h, w, c = out.shape
    kernel = weight.permute(2, 0, 1).unsqueeze(1)
    dx = grad.conv2d_input((n, c, h, w), kernel, _nchw(g), stride, 1, groups=c)
    _accumulate(dx.permute(0, 2, 3, 1), out, add, mask)


def depthwise_weight_grad(x: Tensor, g: Tensor, *, stride: int = 1) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    c = x.shape[3]
    dw = grad.conv2d_weight(_nchw(x), (c, 1, 3, 3), _nchw(g), stride, 1, groups=c)
    return dw[:, 0].permute(1, 2, 0).to(accumulator(g.dtype))


def gates(
    partials: Tensor, num_pixels: int, fc_weight: Tensor, fc_bias: Tensor, kind: Gate
) -> tuple[Tensor, Tensor]:
    """See :mod:`vovnet_fast.backends`."""
    mean = partials.sum(1) / num_pixels
    z = F.linear(mean, fc_weight.to(mean.dtype), fc_bias.to(mean.dtype))
    return reference.gate(z, kind), mean


def gate_sums(dout: Tensor, y: Tensor) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    return (dout.to(accumulator(y.dtype)) * y).sum((1, 2))


def gates_backward(
    dgates: Tensor,
    gates: Tensor,
    mean: Tensor,
    num_pixels: int,
    fc_weight: Tensor,
    kind: Gate,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`vovnet_fast.backends`."""
    if kind == "hard_sigmoid":
        d = torch.where((gates <= 0) | (gates >= 1), 0, dgates / 6)
    else:
        d = dgates * gates * (1 - gates)
    return d @ fc_weight.to(d.dtype) / num_pixels, d.T @ mean, d.sum(0)


def apply_gates(z: Tensor, gates: Tensor | None, identity: Tensor | None, out: Tensor) -> None:
    """See :mod:`vovnet_fast.backends`."""
    y = z if gates is None else z * gates[:, None, None, :]
    out.copy_(y if identity is None else y + identity)


def apply_gates_backward(
    dout: Tensor, gates: Tensor | None, dpixel: Tensor | None, y: Tensor, out: Tensor
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    if gates is not None and dpixel is not None:
        dout = dout * gates[:, None, None, :] + dpixel[:, None, None, :]
    out.copy_(_masked(dout, y))


def max_pool(x: Tensor, out: Tensor, mode: Pool, argmax: Tensor | None = None) -> None:
    """See :mod:`vovnet_fast.backends`."""
    options = dict(ceil_mode=True) if mode == "ceil" else dict(padding=1)
    y, position = F.max_pool2d(_nchw(x), 3, 2, return_indices=True, **options)
    out.copy_(y.permute(0, 2, 3, 1))
    if argmax is None:
        return
    pad = 1 if mode == "padded" else 0
    first_h = torch.arange(y.shape[2], device=x.device)[:, None] * 2 - pad
    first_w = torch.arange(y.shape[3], device=x.device) * 2 - pad
    tap = 3 * (position // x.shape[2] - first_h) + position % x.shape[2] - first_w
    argmax.copy_(tap.permute(0, 2, 3, 1))


def max_pool_backward(dout: Tensor, argmax: Tensor, out: Tensor, mode: Pool) -> None:
    """See :mod:`vovnet_fast.backends`."""
    n, height, width, c = out.shape
    rows, columns = dout.shape[1:3]
    pad = 1 if mode == "padded" else 0
    # Room for the padding, and for windows that reach over the far side.
    wide = dout.new_zeros(n, 2 * rows + 1, 2 * columns + 1, c)
    for tap in range(9):
        h, w = tap // 3, tap % 3
        wide[:, h : h + 2 * rows : 2, w : w + 2 * columns : 2] += dout.masked_fill(argmax != tap, 0)
    out.copy_(wide[:, pad : pad + height, pad : pad + width])
