"""One-Shot Aggregation in one concat buffer: no concatenation, no copy between layers.

The buffer is ``[N, H, W, C_in + L * C_mid]``. Slot 0 holds the block's input, slot i the
output of layer i: every layer reads one slot and writes the next, and the 1x1 over the
concat reads the buffer as it lies.

The backward pass has one buffer of the same shape for the gradients. The 1x1 fills it;
then, from the last layer to the first, each layer's slot is complete when its turn
comes, and the gradient of its input is added into the slot before, in place, and masked
by the ReLU there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import backends
from .._dtypes import accumulator
from ..specs import Gate
from . import _checks, conv, rooms
from ._checks import nchw, nhwc
from .conv import ConvGrads, ConvParams, Kept, Kinds
from .ese import Gates, gates_backward
from .ese import check as check_ese
from .ese import run as run_ese
from .memory import Memory


class BlockParams(NamedTuple):
    """Parameters of one OSA block.

    Attributes:
        layers: the L chained layers.
        concat: the 1x1 over the concat.
        reduction: a 1x1 before the first layer, or None.
        fc_weight, fc_bias: ``[C_out, C_out]`` and ``[C_out]`` of the eSE gate, or None.
        gate: its nonlinearity.
        identity: the block's input is added to its output.
    """

    layers: tuple[ConvParams, ...]
    concat: ConvParams
    reduction: ConvParams | None = None
    fc_weight: Tensor | None = None
    fc_bias: Tensor | None = None
    gate: Gate = "hard_sigmoid"
    identity: bool = False

    @property
    def in_channels(self) -> int:
        """Width of slot 0."""
        mid = self.layers[0].weight.shape[0]
        return self.concat.weight.shape[3] - len(self.layers) * mid

    @property
    def width(self) -> int:
        """Channels of the concat buffer."""
        return self.concat.weight.shape[3]

    @property
    def fixed(self) -> bool:
        """Whether all batch norms have fixed statistics."""
        return all(layer.eps is None for layer in self.convs())

    @property
    def plain(self) -> bool:
        """Whether the 1x1's output is the block's: no gate, no identity."""
        return self.fc_weight is None and not self.identity

    def convs(self) -> list[ConvParams]:
        """All convolution layers in the order in which they run."""
        first = [] if self.reduction is None else [self.reduction]
        return [*first, *self.layers, self.concat]

    def fcs(self) -> list[Tensor]:
        """Weight and bias of the gate, if there is one."""
        return [t for t in (self.fc_weight, self.fc_bias) if t is not None]

    def slots(self) -> list[slice]:
        """Channels of the layers' slots, 1 to L, in the concat buffer."""
        found, end = [], self.in_channels
        for layer in self.layers:
            found.append(slice(end, end + layer.weight.shape[0]))
            end = found[-1].stop
        return found


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


_GATED = ("gates", "apply_gates")
_ADDED = ("apply_gates",)
_BACKWARD = ("apply_gates_backward",)
_GATED_BACKWARD = ("gate_sums", "gates_backward")


def needs(kinds: Kinds, *, gated: bool, identity: bool, backward: bool) -> tuple[str, ...]:
    """The functions of a backend that a block uses; see :meth:`Kinds.needs`.

    Args:
        kinds: of its layers.
        gated: it has an eSE gate.
        identity: its input is added to its output.
        backward: as there.
    """
    used = (
        (_GATED, gated),
        (_ADDED, identity and not gated),
        (_BACKWARD, backward),
        (_GATED_BACKWARD, backward and gated),
    )
    names = (name for names, needed in used if needed for name in names)
    return (*kinds.needs(backward=backward), *names)


def _needs(params: BlockParams, *, backward: bool) -> tuple[str, ...]:
    gated = params.fc_weight is not None
    kinds = Kinds.of(params.convs())
    return needs(kinds, gated=gated, identity=params.identity, backward=backward)


def new_buffer(
    memory: Memory, like: Tensor, size: tuple[int, int, int], params: BlockParams
) -> Tensor:
    """An uninitialised concat buffer for a block on maps of ``(N, H, W)``."""
    return memory.chained(like, *size, params.width)


def input_slot(buffer: Tensor, params: BlockParams) -> Tensor:
    """Slot 0, which the producer of the block's input fills."""
    return buffer[..., : params.in_channels]


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


def check(op: str, params: BlockParams, x: Tensor) -> None:
    """Refuse parameters that do not fit each other or the activations."""
    channels = params.in_channels
    if not params.layers:
        raise ValueError(f"{op}: an OSA block needs at least one layer")
    width = channels
    for layer in params.convs()[:-1]:
        conv.check(op, layer, x, width)
        width = layer.weight.shape[0]
        if layer.stride != 1:
            raise ValueError(f"{op}: layers of a block have stride 1, got {layer.stride}")
    conv.check(op, params.concat, x)
    c_out = params.concat.weight.shape[0]
    if (params.fc_weight is None) != (params.fc_bias is None):
        raise ValueError(f"{op}: give both fc_weight and fc_bias, or neither")
    if params.fc_weight is not None and params.fc_bias is not None:
        check_ese(op, params.fc_weight, params.fc_bias, params.gate, c_out, x)
    if params.identity and c_out != channels:
        raise ValueError(f"{op}: the identity add needs C_in == C_out, got {channels} and {c_out}")


KEEP_NOTHING, KEEP, RECOMPUTE = range(3)
"""What a forward pass keeps for the backward one. RECOMPUTE is activation checkpointing."""


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
        the output, and the ``[6, C]`` statistics (:mod:`.batch_norm`) of those layers that
        take them from the batch, in the order of :meth:`BlockParams.convs`.
    """
    op = "osa_block"
    _checks.activations(op, "x", x, params.in_channels)
    check(op, params, x)
    for layer in params.convs():
        values = x.shape[0] * x.shape[2] * x.shape[3]
        _checks.batch_statistics(op, layer.eps, layer.group, values)
    flat = conv.flatten(op, params.convs())
    fcs = params.fcs()
    options = (params.reduction is not None, params.gate, params.identity)
    tensors = [t for group in (*flat[:4], fcs) for t in group]
    needed = _checks.needs_gradient(x, *tensors)
    keep = KEEP_NOTHING if not needed else RECOMPUTE if recompute else KEEP
    choice = backends.chosen()
    if _checks.traced(x):
        found = torch.ops.vovnet_fast.osa_block(x, *flat, fcs, *options, keep, choice)
    elif needed:
        found = _Block.apply(_Statics(*flat[4:], *options, keep, choice), width, x, *tensors)
    else:
        found = _forward(x, params, keep, choice, width)
    norms = sum(layer.eps is not None for layer in params.convs())
    return found[0], [norm.detach() for norm in found[1 : 1 + norms]]


def _filled(x: Tensor, params: BlockParams, *, room: bool) -> Tensor:
    """A concat buffer with ``x`` in slot 0; that around ``x`` if ``room`` and there is one."""
    view = nhwc(x)
    buffer = rooms.take(view, params.width) if room else None
    if buffer is None:
        buffer = view.new_empty(*view.shape[:3], params.width)
        input_slot(buffer, params).copy_(view)
    return buffer


@_checks.in_given_dtypes
def _forward(
    x: Tensor, params: BlockParams, keep: int, choice: str, width: int = 0
) -> list[Tensor]:
    """The output, the statistics of the batch, and what ``keep`` says.

    With fixed statistics the concat buffer is kept. Otherwise the raw convolutions are:
    a ReLU cannot be undone, and the buffer can be made again from them.
    """
    needed = _needs(params, backward=keep != KEEP_NOTHING)
    backend = backends.get(x.device, x.dtype, needed, choice)
    buffer = _filled(x, params, room=params.fixed and keep != RECOMPUTE)
    n, h, w, _ = buffer.shape
    c_out = params.concat.weight.shape[0]
    out = rooms.new(buffer, n, h, w, c_out, max(width, c_out))
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
    """What :func:`run` left, from what :func:`_forward` kept of it.

    Where the 1x1's output is the block's, ``saved`` ends with the latter.
    """
    if keep == RECOMPUTE:
        buffer = _filled(x, params, room=False)
        again = buffer.new_empty(*buffer.shape[:3], params.concat.weight.shape[0])
        return run(backend, buffer, params, again, Memory())
    rest, statistics = iter(saved), iter(norms)
    gates = Gates(next(rest), next(rest)) if params.fc_weight is not None else None
    if params.fixed:
        buffer = nhwc(next(rest))
        reduced = None if params.reduction is None else nhwc(next(rest))
        features = nhwc(next(rest))
        return BlockKept(buffer, reduced, features, gates, [Kept()] * len(params.convs()))
    buffer = _filled(x, params, room=False)
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
def _backward(
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
    """Gradients from what :func:`_forward` kept; see :func:`run_backward`."""
    backend = backends.get(x.device, x.dtype, _needs(params, backward=True), choice)
    kept = _restore(backend, x, params, keep, norms, saved)
    return run_backward(backend, nhwc(dout), params, kept, need_x=need_x, wanted=wanted)


# --------------------------------------------------------------------------------------
# torch.library
# --------------------------------------------------------------------------------------


def _params(
    layers: list[ConvParams], fcs: list[Tensor], reduction: bool, gate: str, identity: bool
) -> BlockParams:
    """The inverse of :meth:`BlockParams.convs` and :meth:`BlockParams.fcs`."""
    return BlockParams(
        tuple(layers[1 if reduction else 0 : -1]),
        layers[-1],
        layers[0] if reduction else None,
        fcs[0] if fcs else None,
        fcs[1] if fcs else None,
        cast(Gate, gate),
        identity,
    )


@torch.library.custom_op("vovnet_fast::osa_block", mutates_args=())
def _osa_block(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    depthwise: list[Tensor],
    strides: list[int],
    epsilons: list[float],
    group: str,
    fcs: list[Tensor],
    reduction: bool,
    gate: str,
    identity: bool,
    keep: int,
    choice: str,
) -> list[Tensor]:
    layers = conv.unflatten(weights, scales, shifts, depthwise, strides, epsilons, group)
    params = _params(layers, fcs, reduction, gate, identity)
    return _forward(x, params, keep, choice)


@_osa_block.register_fake
def _(
    x, weights, scales, shifts, depthwise, strides, epsilons, group, fcs, reduction, gate,
    identity, keep, choice,
):  # fmt: skip
    n, _, h, w = x.shape
    high = accumulator(x.dtype)

    def activations(channels):
        return nchw(x.new_empty(n, h, w, channels))

    widths = [weight.shape[0] for weight in weights]
    batch = [c for c, eps in zip(widths, epsilons, strict=True) if eps >= 0]
    found = [activations(widths[-1]), *(x.new_empty(6, c, dtype=high) for c in batch)]
    if keep != KEEP:
        return found
    if fcs:
        found += [x.new_empty(n, widths[-1], dtype=high) for _ in Gates._fields]
    if batch:
        return [*found, *map(activations, widths)]
    found.append(activations(weights[-1].shape[3]))
    found += [activations(widths[0])] if reduction else []
    return [*found, activations(widths[-1])] if fcs or identity else found


@torch.library.custom_op("vovnet_fast::osa_block_backward", mutates_args=())
def _osa_block_backward(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    depthwise: list[Tensor],
    strides: list[int],
    epsilons: list[float],
    group: str,
    fcs: list[Tensor],
    reduction: bool,
    gate: str,
    identity: bool,
    keep: int,
    choice: str,
    norms: list[Tensor],
    saved: list[Tensor],
    dout: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    layers = conv.unflatten(weights, scales, shifts, depthwise, strides, epsilons, group)
    params = _params(layers, fcs, reduction, gate, identity)
    tensors = [*weights, *scales, *shifts, *depthwise]
    wanted = conv.wanted(needs[1 : 1 + len(tensors)], strides)
    grads = _backward(x, params, keep, choice, norms, saved, dout, needs[0], wanted)
    dx = None if grads.x is None else nchw(grads.x)
    dfcs = [g.to(t.dtype) for g, t in zip(grads.fcs, fcs, strict=True)]
    found = [dx, *conv.flatten_grads(grads.convs, tensors, strides), *dfcs]
    return [g for g, need in zip(found, needs, strict=True) if need and g is not None]


@_osa_block_backward.register_fake
def _(
    x, weights, scales, shifts, depthwise, strides, epsilons, group, fcs, reduction, gate,
    identity, keep, choice, norms, saved, dout, needs,
):  # fmt: skip
    tensors = [*weights, *scales, *shifts, *depthwise, *fcs]
    grads = [t.new_empty(t.shape) for t, need in zip(tensors, needs[1:], strict=True) if need]
    return [nchw(x.new_empty(nhwc(x).shape)), *grads] if needs[0] else grads


_checks.refuse_second_order(_osa_block_backward, "osa_block")


class _Statics(NamedTuple):
    """Arguments of the ops that are no tensors."""

    strides: list[int]
    epsilons: list[float]
    group: str
    reduction: bool
    gate: str
    identity: bool
    keep: int
    choice: str

    @property
    def convs(self) -> int:
        """Number of tensors of the convolution layers."""
        return 3 * len(self.strides) + sum(stride < 0 for stride in self.strides)

    @property
    def batch(self) -> int:
        """Number of layers with the batch's statistics."""
        return sum(eps >= 0 for eps in self.epsilons)

    @property
    def needs_input(self) -> bool:
        """Whether the backward pass needs the block's input beside what was kept."""
        return self.keep == RECOMPUTE or self.batch > 0


def _save(
    ctx: Any, statics: _Statics, x: Tensor, tensors: Sequence[Tensor], found: Sequence[Tensor]
) -> None:
    """Save for the backward pass what it needs, and nothing that would only occupy memory."""
    ctx.statics = statics
    ctx.set_materialize_grads(False)
    out, *kept = found
    if statics.needs_input:
        kept.append(x)
    elif len(tensors) == statics.convs and not statics.identity:
        kept.append(out)
    ctx.save_for_backward(*tensors, *kept)


def _gradients(ctx: Any, dout: Tensor | None, needs: list[bool]) -> Iterator[Tensor | None]:
    """Gradients of the input and of all tensors, None for those that need none."""
    if dout is None:
        return iter([None] * len(needs))
    statics, count = ctx.statics, len(needs) - 1
    every = list(ctx.saved_tensors)
    tensors, saved = every[:count], every[count:]
    weights, *vectors = conv.regroup(tensors[: statics.convs], statics.strides)
    fcs = tensors[statics.convs :]
    # Where the input was not saved, it is in slot 0 of the concat buffer, which follows what
    # the gate kept.
    x = saved.pop() if statics.needs_input else saved[len(fcs)][:, : weights[0].shape[3]]
    strides, epsilons, group, *options = statics
    found = iter(
        _checks.call(
            _osa_block_backward,
            statics.choice,
            x,
            weights,
            *vectors,
            strides,
            epsilons,
            group,
            fcs,
            *options,
            saved[: statics.batch],
            saved[statics.batch :],
            dout,
            needs,
        )
    )
    return iter([next(found) if need else None for need in needs])


def _setup_context(ctx, inputs, output):
    x, *rest = inputs
    groups = [*rest[:4], rest[7]]
    tensors = [t for group in groups for t in group]
    ctx.counts = [len(group) for group in groups]
    ctx.needs = [t.requires_grad for t in (x, *tensors)]
    _save(ctx, _Statics(*rest[4:7], *rest[8:]), x, tensors, output)


def _op_backward(ctx, grads):
    found = _gradients(ctx, grads[0], ctx.needs)
    dx = next(found)
    by_group = [[next(found) for _ in range(count)] for count in ctx.counts]
    return dx, *by_group[:4], None, None, None, by_group[4], None, None, None, None, None


_osa_block.register_autograd(_op_backward, setup_context=_setup_context)


class _Block(torch.autograd.Function):
    """The same outside of torch.compile, where the output can be given room, and take it."""

    @staticmethod
    def forward(ctx, statics, width, x, *tensors):
        strides, epsilons, group, *options, keep, choice = statics
        flat = conv.regroup(tensors[: statics.convs], strides)
        layers = conv.unflatten(*flat, strides, epsilons, group)
        params = _params(layers, list(tensors[statics.convs :]), *options)
        found = _forward(x, params, keep, choice, width)
        found[0] = rooms.owned(found[0])
        _save(ctx, statics, x, tensors, found)
        norms = found[1 : 1 + statics.batch]
        ctx.mark_non_differentiable(*norms)
        return found[0], *norms

    @staticmethod
    def backward(ctx, dout, *_):
        return None, None, *_gradients(ctx, dout, list(ctx.needs_input_grad[2:]))
