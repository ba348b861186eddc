"""One OSA block as a function of tensors, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .. import _checks, flattening
from .library import Block, Statics
from .params import BlockParams, check
from .saving import KEEP, KEEP_NOTHING, RECOMPUTE, forward


def osa_block(x: Tensor, params: BlockParams) -> Tensor:
    """One OSA block. Differentiable.

    ``x`` is copied once, into slot 0 of a new concat buffer, unless its producer made it
    there.

    Args:
        x: ``[N, C_in, H, W]`` in fp16, bf16, fp32 or fp64.
        params: of the block, with scales and shifts for activations of that dtype.

    Returns:
        ``[N, C_out, H, W]``, ``channels_last``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    return osa_block_with_statistics(x, params)[0]


def osa_block_with_statistics(
    x: Tensor, params: BlockParams, *, recompute: bool = False, width: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """:func:`osa_block`, and what running statistics are updated with.

    Args:
        x: as there.
        params: as there.
        recompute: keep only ``x`` for the backward pass, which then computes the block
            again: less memory for more time (activation checkpointing).
        width: channels of the concat buffer of the OSA block that takes the output,
            which is then made inside such a buffer; 0 for memory of its own.

    Returns:
        the output, and the ``[6, C]`` statistics (:mod:`..batch_norm`) of those layers that
        take them from the batch, in the order of :meth:`BlockParams.convs`.
    """
    op = "osa_block"
    _checks.activations(op, "x", x)
    check(op, params, x)
    _checks.activations(op, "x", x, params.in_channels)
    for layer in params.convs():
        values = x.shape[0] * x.shape[2] * x.shape[3]
        _checks.batch_statistics(op, layer.eps, layer.group, values)
    flat = flattening.flatten(op, params.convs())
    fcs = params.fcs()
    options = (params.reduction is not None, params.gate, params.identity)
    tensors = [t for group in (*flat[:4], fcs) for t in group]
    _checks.transforms(op, x, *tensors)
    needed = _checks.needs_gradient(x, *tensors)
    keep = KEEP_NOTHING if not needed else RECOMPUTE if recompute else KEEP
    choice = backends.chosen()
    if _checks.traced(x):
        found = torch.ops.vovnet_fast.osa_block(x, *flat, fcs, *options, keep, choice)
    elif needed:
        found = Block.apply(Statics(*flat[4:], *options, keep, choice), width, x, *tensors)
    else:
        found = forward(x, params, keep, choice, width)
    norms = sum(layer.eps is not None for layer in params.convs())
    return found[0], [norm.detach() for norm in found[1 : 1 + norms]]
