"""A block from slot to slot, on a backend."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from ...compat import zip
from .. import conv
from ..conv import Kept
from ..ese import Gates
from ..ese import run as run_ese
from ..memory import Memory
from .params import BlockParams, input_slot


class BlockKept(NamedTuple):
    """What a block leaves beside its output, all that its backward pass needs.

    Attributes:
        buffer: the concat buffer, all slots filled.
        reduced: ``[N, H, W, C_mid]``, output of the reduction, or None.
        features: ``[N, H, W, C_out]``, output of the 1x1.
        gates: of eSE, or None.
        layers: what each of :meth:`BlockParams.convs` left.
    """

    buffer: Tensor
    reduced: Tensor | None
    features: Tensor
    gates: Gates | None
    layers: list[Kept]


def run(
    backend: ModuleType, buffer: Tensor, params: BlockParams, out: Tensor, memory: Memory
) -> BlockKept:
    """Run a block whose input is in slot 0 of ``buffer``.

    Args:
        backend: who does the work.
        buffer: ``[N, H, W, C_in + L * C_mid]``; all slots but the first are written.
        params: of the block.
        out: ``[N, H, W, C_out]`` view; slot 0 of the next block, or a feature.
        memory: for what lives only while the block runs.
    """
    layers: list[Kept] = []
    slot = x = input_slot(buffer, params)
    reduced = None
    if params.reduction is not None:
        reduced = memory.scratch("block", x, *x.shape[:3], params.reduction.weight.shape[0])
        layers.append(conv.run(backend, x, params.reduction, reduced, memory))
        slot = reduced
    for layer, channels in zip(params.layers, params.slots(), strict=True):
        layers.append(conv.run(backend, slot, layer, buffer[..., channels], memory))
        slot = buffer[..., channels]
    gated = params.fc_weight is not None
    features = out if params.plain else memory.scratch("block", x, *out.shape)
    last = conv.run(backend, buffer, params.concat, features, memory, pool=gated)
    layers.append(last)
    identity = x if params.identity else None
    gates = None
    if last.partials is not None:
        weight, bias = params.fcs()
        gates = run_ese(backend, features, last.partials, weight, bias, params.gate, identity, out)
    elif not params.plain:
        backend.apply_gates(features, None, identity, out)
    return BlockKept(buffer, reduced, features, gates, layers)
