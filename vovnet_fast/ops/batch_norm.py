"""Batch norm: fixed statistics folded into a scale and a shift, or those of the batch.

Statistics of the batch are kept as ``[6, C]`` in fp32 (fp64 for fp64): mean, 1 / sqrt(var
+ eps), scale, shift, unbiased variance, number of values. With a process group they are
those of all its processes (SyncBN), each of which must then take part in every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from .. import compat
from .._dtypes import accumulator
from ..compat import zip
from .memory import copy

MEAN, RSTD, SCALE, SHIFT, VARIANCE, COUNT = range(6)
"""Rows of the statistics of a batch."""


class FixedNorm(NamedTuple):
    """A batch norm with fixed statistics, after a convolution.

    Attributes:
        weight, bias: ``[C]`` (gamma, beta), or None for one and zero.
        mean, var: ``[C]`` running statistics.
        eps: added to the variance.
        conv_bias: ``[C]`` of the convolution before, or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    conv_bias: Tensor | None = None


def fold(norms: Sequence[FixedNorm], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(scale, shift) of each norm, in the accumulator of activations of ``dtype``.

    Differentiable. All norms are folded at a time: one by one, the launches of these
    few numbers would take longer than a small convolution.
    """
    high = accumulator(dtype)
    sizes = [len(norm.mean) for norm in norms]
    if _trains_affine_terms(norms, high):
        affine = [t for norm in norms for t in (norm.weight, norm.bias)]
        constants = [t for norm in norms for t in (norm.mean, norm.var)]
        found = _Fold.apply(sizes, [norm.eps for norm in norms], constants, *affine)
        return list(zip(found[: len(norms)], found[len(norms) :], strict=True))

    def joined(parts: list[Tensor | None], default: float) -> Tensor | None:
        if all(part is None for part in parts):
            return None
        full = [
            norm.mean.new_full((size,), default, dtype=high) if part is None else part.to(high)
            for part, norm, size in zip(parts, norms, sizes, strict=True)
        ]
        return torch.cat(full) if len(full) > 1 else full[0]

    mean, var = joined([n.mean for n in norms], 0.0), joined([n.var for n in norms], 0.0)
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + _spread([norm.eps for norm in norms], sizes, var))
    gamma, beta = joined([n.weight for n in norms], 1.0), joined([n.bias for n in norms], 0.0)
    conv_bias = joined([n.conv_bias for n in norms], 0.0)
    if gamma is not None:
        scale = scale * gamma
    shift = (-mean if conv_bias is None else conv_bias - mean) * scale
    if beta is not None:
        shift = shift + beta
    return list(zip(scale.split(sizes), shift.split(sizes), strict=True))


def _trains_affine_terms(norms: Sequence[FixedNorm], high: torch.dtype) -> bool:
    """Whether gammas and betas, and they alone, can have gradients, outside of torch.compile."""
    if compat.is_compiling() or not torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False  # PyTorch's own functions have rules for these.
    trained = False
    for norm in norms:
        affine, constants = (norm.weight, norm.bias), (norm.mean, norm.var)
        if norm.conv_bias is not None or any(t is None or t.dtype != high for t in affine):
            return False
        if any(t.dtype != high or t.requires_grad for t in constants):
            return False
        trained = trained or any(t is not None and t.requires_grad for t in affine)
    return trained


class _Fold(torch.autograd.Function):
    """What :func:`fold` does, of gamma and beta of one norm after the other.

    Of PyTorch's functions alone each would be a node of autograd's graph: in a training step on a
    CPU, these take as long as a small convolution.
    """

    @staticmethod
    def forward(ctx, sizes, epsilons, constants, *affine):
        gamma, beta, mean, var = (
            torch.cat(each) for each in (affine[::2], affine[1::2], constants[::2], constants[1::2])
        )
        rstd = torch.rsqrt(var + _spread(epsilons, sizes, var))
        scale = rstd * gamma
        shift = -mean * scale + beta
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rstd, mean)
        return *scale.split(sizes), *shift.split(sizes)

    @staticmethod
    def backward(ctx, *grads):
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        rstd, mean = ctx.saved_tensors
        given = [
            mean.new_zeros(size) if g is None else g
            for g, size in zip(grads, ctx.sizes * 2, strict=True)
        ]
        count = len(ctx.sizes)
        dscale, dbeta = torch.cat(given[:count]), torch.cat(given[count:])
        dgamma = (dscale - dbeta * mean) * rstd
        found = zip(dgamma.split(ctx.sizes), dbeta.split(ctx.sizes), strict=True)
        needed = ctx.needs_input_grad[3:]
        flat = [g for pair in found for g in pair]
        return (
            None,
            None,
            None,
            *(g if need else None for g, need in zip(flat, needed, strict=True)),
        )


def _spread(epsilons: Sequence[float], sizes: Sequence[int], like: Tensor) -> Tensor | float:
    """What is added to variances, for all channels of several norms."""
    if len(set(epsilons)) == 1:
        return epsilons[0]
    return torch.cat(
        [like.new_full((size,), eps) for eps, size in zip(epsilons, sizes, strict=True)]
    )


def group_name(group: dist.ProcessGroup | None) -> str:
    """Name by which ops know a process group (None: all processes); empty for one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return ""
    members = group or dist.group.WORLD
    assert members is not None
    return compat.group_name(members)


def statistics(
    backend: ModuleType, partials: Tensor, gamma: Tensor, beta: Tensor, eps: float, group: str
) -> Tensor:
    """``[6, C]`` statistics from partial ones, ``[R, 3, C]``; see :mod:`vovnet_fast.backends`."""
    if group:
        local = backend.batch_norm_merge(partials)
        members = compat.process_group(group)
        rows, channels = local.shape
        gathered = local.new_empty(dist.get_world_size(members) * rows, channels)
        compat.all_gather(gathered, local, members)
        partials = gathered.view(-1, rows, channels)
    norm: Tensor = backend.batch_norm_finish(partials, gamma, beta, eps)
    return norm


def backward(
    backend: ModuleType, g: Tensor, z: Tensor, norm: Tensor, gamma: Tensor, group: str
) -> tuple[Tensor, Tensor]:
    """Turn the gradient of the norm's output into that of its input ``z``, in place.

    Returns:
        gradients of gamma and of beta. As in SyncBN they are this process's share: DDP
        averages them.
    """
    sums = backend.batch_norm_sums(g, z, norm)
    total = sums
    if group:
        total = sums.clone()
        dist.all_reduce(total, group=compat.process_group(group))
    backend.batch_norm_input_grad(g, z, norm, total, gamma, g)
    dgamma, dbeta = (sums.new_empty(sums.shape[1]) for _ in range(2))
    for row, out in ((sums[1], dgamma), (sums[0], dbeta)):  # Results of ops share no memory.
        copy(backend, row[None, None, None], out[None, None, None])
    return dgamma, dbeta
