"""A block's gradients, in one buffer of the shape of the concat, on a backend."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from .. import conv
from ..conv import ConvGrads
from ..ese import gates_backward
from .forward import BlockKept
from .params import BlockParams, input_slot


class BlockGrads(NamedTuple):
    """Gradients of a block: of its input, ``[N, H, W, C_in]``, and of its parameters."""

    x: Tensor | None
    convs: list[ConvGrads | None]
    fcs: list[Tensor]


def run_backward(
    backend: ModuleType,
    dout: Tensor,
    params: BlockParams,
    kept: BlockKept,
    *,
    need_x: bool,
    wanted: list[bool],
) -> BlockGrads:
    """Gradients of a block.

    Args:
        backend: who does the work.
        dout: ``[N, H, W, C_out]``, the gradient of its output, of any strides.
        params: of the block.
        kept: what the forward pass left.
        need_x: whether the gradient of the input is needed.
        wanted: whether gradients of the parameters are, of each of :meth:`BlockParams.convs`.
    """
    features, buffer = kept.features, kept.buffer
    fcs: list[Tensor] = []
    share = None
    if kept.gates is not None:
        assert params.fc_weight is not None
        share, *fcs = gates_backward(
            backend, dout, features, kept.gates, params.fc_weight, params.gate
        )
    g = features.new_empty(features.shape)
    gates = None if kept.gates is None else kept.gates.gates
    backend.apply_gates_backward(dout, gates, share, features, g)

    convs, layers = params.convs(), kept.layers
    found: list[ConvGrads | None] = [None] * len(convs)
    x, slots = input_slot(buffer, params), params.slots()
    # Of the gradients' buffer, slot 0 is left out where nobody needs it.
    first = 0 if need_x else params.in_channels
    grads = buffer.new_empty(*buffer.shape[:3], params.width - first)
    found[-1] = conv.run_backward(
        backend, buffer, g, convs[-1], layers[-1], wanted=wanted[-1], dx=grads,
        add=dout if params.identity and need_x else None, mask=buffer[..., slots[-1]],
    )  # fmt: skip

    def slot_grad(slot: slice) -> Tensor:
        return grads[..., slot.start - first : slot.stop - first]

    through_x = grads[..., : params.in_channels] if need_x else None
    before = len(convs) - 1 - len(params.layers)  # 1 where there is a reduction.
    for i in reversed(range(1, len(params.layers))):
        into = slot_grad(slots[i - 1])
        found[before + i] = conv.run_backward(
            backend, buffer[..., slots[i - 1]], slot_grad(slots[i]), params.layers[i],
            layers[before + i], wanted=wanted[before + i],
            dx=into, add=into, mask=buffer[..., slots[i - 1]],
        )  # fmt: skip
    # The input's gradient leaves in memory of its own, and the buffer's can go.
    dx = x.new_empty(x.shape) if need_x else None
    g = slot_grad(slots[0])
    if params.reduction is None:
        found[0] = conv.run_backward(
            backend, x, g, params.layers[0], layers[0], wanted=wanted[0], dx=dx, add=through_x
        )
        return BlockGrads(dx, found, fcs)
    assert kept.reduced is not None
    dreduced = kept.reduced.new_empty(kept.reduced.shape)
    found[1] = conv.run_backward(
        backend, kept.reduced, g, params.layers[0], layers[1], wanted=wanted[1],
        dx=dreduced, mask=kept.reduced,
    )  # fmt: skip
    found[0] = conv.run_backward(
        backend, x, dreduced, params.reduction, layers[0], wanted=wanted[0], dx=dx, add=through_x
    )
    return BlockGrads(dx, found, fcs)
