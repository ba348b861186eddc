"""Both passes of a block, and what the first keeps for the second."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ... import backends
from ...compat import zip
from .. import _checks, conv, rooms
from .._checks import nchw, nhwc
from ..conv import Kept, Kinds
from ..ese import Gates
from ..memory import Memory, copy
from .backward import BlockGrads, run_backward
from .forward import BlockKept, run
from .params import BlockParams, input_slot, needs

KEEP_NOTHING, KEEP, RECOMPUTE = range(3)
"""What a forward pass keeps for the backward one. RECOMPUTE is activation checkpointing."""


def _needs(params: BlockParams, *, backward: bool) -> tuple[str, ...]:
    gated = params.fc_weight is not None
    kinds = Kinds.of(params.convs())
    return needs(kinds, gated=gated, identity=params.identity, backward=backward)


def _filled(backend: ModuleType, view: Tensor, params: BlockParams) -> Tensor:
    """A concat buffer with ``[N, H, W, C]`` in slot 0."""
    buffer = view.new_empty(*view.shape[:3], params.width)
    copy(backend, view, input_slot(buffer, params))
    return buffer


@_checks.in_given_dtypes
def forward(x: Tensor, params: BlockParams, keep: int, choice: str, width: int = 0) -> list[Tensor]:
    """The output, the statistics of the batch, and what ``keep`` says.

    With fixed statistics the concat buffer is kept. Otherwise the raw convolutions are:
    a ReLU cannot be undone, and the buffer can be made again from them.
    """
    view, fixed, convs = nhwc(x), params.fixed, params.convs()
    room = rooms.take(view, params.width) if fixed and keep != RECOMPUTE else None
    n, h, w, _ = view.shape
    c_out = params.concat.weight.shape[0]
    out = rooms.new(view, n, h, w, c_out, max(width, c_out))

    def work() -> list[Tensor]:
        needed = _needs(params, backward=keep != KEEP_NOTHING)
        backend = backends.get(x.device, x.dtype, needed, choice)
        buffer = _filled(backend, view, params) if room is None else room
        return _run(backend, buffer, params, out, keep)

    if keep == KEEP_NOTHING:
        return work()
    key = "osa_block", params.reduction is None, params.gate, params.identity, keep, room is None
    given = [view if room is None else room, out, *params.fcs()]
    return conv.repeat(choice, key, convs, given, work)


def _run(
    backend: ModuleType, buffer: Tensor, params: BlockParams, out: Tensor, keep: int
) -> list[Tensor]:
    kept = run(backend, buffer, params, out, Memory())
    norms = [layer.norm for layer in kept.layers if layer.norm is not None]
    saved: list[Tensor] = []
    if keep == KEEP:
        saved += [] if kept.gates is None else kept.gates
        if params.fixed:
            saved.append(nchw(buffer))
            saved += [nchw(y) for y in (kept.reduced,) if y is not None]
            saved += [] if params.plain else [nchw(kept.features)]
        else:
            outputs = _outputs(params, kept)
            saved += [
                nchw(y.clone() if layer.raw is None else layer.raw)
                for y, layer in zip(outputs, kept.layers, strict=True)
            ]
    return [nchw(out), *norms, *saved]


def _outputs(params: BlockParams, kept: BlockKept) -> list[Tensor]:
    """The output of each of :meth:`BlockParams.convs`."""
    first = [] if kept.reduced is None else [kept.reduced]
    return [*first, *(kept.buffer[..., slot] for slot in params.slots()), kept.features]


def _restore(
    backend: ModuleType,
    x: Tensor,
    params: BlockParams,
    keep: int,
    norms: list[Tensor],
    saved: list[Tensor],
) -> BlockKept:
    """What :func:`run` left, from what :func:`forward` kept of it.

    Where the 1x1's output is the block's, ``saved`` ends with the latter.
    """
    if keep == RECOMPUTE:
        buffer = _filled(backend, nhwc(x), params)
        again = buffer.new_empty(*buffer.shape[:3], params.concat.weight.shape[0])
        return run(backend, buffer, params, again, Memory())
    rest, statistics = iter(saved), iter(norms)
    gates = Gates(next(rest), next(rest)) if params.fc_weight is not None else None
    if params.fixed:
        buffer = nhwc(next(rest))
        reduced = None if params.reduction is None else nhwc(next(rest))
        features = nhwc(next(rest))
        return BlockKept(buffer, reduced, features, gates, [Kept()] * len(params.convs()))
    buffer = _filled(backend, nhwc(x), params)
    layers = [
        Kept(None, nhwc(next(rest)), None if layer.eps is None else next(statistics))
        for layer in params.convs()
    ]
    [*early, last] = layers
    assert last.raw is not None
    features = last.raw.new_empty(last.raw.shape)
    reduced = None
    if params.reduction is not None:
        assert early[0].raw is not None
        reduced = early[0].raw.new_empty(early[0].raw.shape)
    kept = BlockKept(buffer, reduced, features, gates, layers)
    for layer, y in zip(layers, _outputs(params, kept), strict=True):
        if layer.norm is None:
            assert layer.raw is not None
            y.copy_(layer.raw)
        else:
            conv.run_again(backend, layer, y)
    return kept


@_checks.in_given_dtypes
def backward(
    x: Tensor,
    params: BlockParams,
    keep: int,
    choice: str,
    norms: list[Tensor],
    saved: list[Tensor],
    dout: Tensor,
    need_x: bool,
    wanted: list[bool],
) -> BlockGrads:
    """Gradients from what :func:`forward` kept; see :func:`run_backward`."""
    backend = backends.get(x.device, x.dtype, _needs(params, backward=True), choice)
    kept = _restore(backend, x, params, keep, norms, saved)
    return run_backward(backend, nhwc(dout), params, kept, need_x=need_x, wanted=wanted)
