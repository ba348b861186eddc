"""Both passes of a block as ops of ``torch.library``, and as an autograd Function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..._dtypes import accumulator
from ...backends import _steps
from ...compat import zip
from ...specs import Gate
from .. import _checks, _library, conv, flattening, gradients, rooms
from .._checks import nchw, nhwc
from ..conv import ConvParams
from ..ese import Gates
from .params import BlockParams
from .saving import KEEP, RECOMPUTE, backward, forward


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


@_library.op("osa_block")
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
    layers = flattening.unflatten(weights, scales, shifts, depthwise, strides, epsilons, group)
    params = _params(layers, fcs, reduction, gate, identity)
    return forward(x, params, keep, choice)


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


@_library.op("osa_block_backward")
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
    layers = flattening.unflatten(weights, scales, shifts, depthwise, strides, epsilons, group)
    params = _params(layers, fcs, reduction, gate, identity)
    tensors = [*weights, *scales, *shifts, *depthwise]
    wanted = flattening.wanted(needs[1 : 1 + len(tensors)], strides)
    dout = nchw(nhwc(dout))

    def work() -> list[Tensor]:
        grads = backward(x, params, keep, choice, norms, saved, dout, needs[0], wanted)
        dx = None if grads.x is None else nchw(grads.x)
        dfcs = [g.to(t.dtype) for g, t in zip(grads.fcs, fcs, strict=True)]
        found = [dx, *gradients.flatten(grads.convs, tensors, strides), *dfcs]
        return [g for g, need in zip(found, needs, strict=True) if need and g is not None]

    key = "osa_block_backward", reduction, gate, identity, keep, len(fcs), *needs
    # Where all that is needed was kept, the input is a part of it.
    own = [x] if keep == RECOMPUTE or norms else []
    return conv.repeat(choice, key, layers, [dout, *own, *norms, *saved, *fcs], work)


@_osa_block_backward.register_fake
def _(
    x, weights, scales, shifts, depthwise, strides, epsilons, group, fcs, reduction, gate,
    identity, keep, choice, norms, saved, dout, needs,
):  # fmt: skip
    tensors = [*weights, *scales, *shifts, *depthwise, *fcs]
    grads = [gradients.new(t) for t, need in zip(tensors, needs[1:], strict=True) if need]
    return [nchw(x.new_empty(nhwc(x).shape)), *grads] if needs[0] else grads


_checks.backward_op(_osa_block_backward, "osa_block")


class Statics(NamedTuple):
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
    ctx: Any, statics: Statics, x: Tensor, tensors: Sequence[Tensor], found: Sequence[Tensor]
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
    weights, *vectors = flattening.regroup(tensors[: statics.convs], statics.strides)
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
    _save(ctx, Statics(*rest[4:7], *rest[8:]), x, tensors, output)


def _op_backward(ctx, grads):
    found = _gradients(ctx, grads[0], ctx.needs)
    dx = next(found)
    by_group = [[next(found) for _ in range(count)] for count in ctx.counts]
    return dx, *by_group[:4], None, None, None, by_group[4], None, None, None, None, None


_osa_block.register_autograd(_op_backward, _setup_context)


class Block(torch.autograd.Function):
    """The same outside of torch.compile, where the output can be given room, and take it."""

    @staticmethod
    def forward(ctx, statics, width, x, *tensors):
        strides, epsilons, group, *options, keep, choice = statics
        flat = flattening.regroup(tensors[: statics.convs], strides)
        layers = flattening.unflatten(*flat, strides, epsilons, group)
        params = _params(layers, list(tensors[statics.convs :]), *options)
        with _steps.forward():
            found = forward(x, params, keep, choice, width)
        found[0] = rooms.owned(found[0])
        _save(ctx, statics, x, tensors, found)
        norms = found[1 : 1 + statics.batch]
        ctx.mark_non_differentiable(*norms)
        return found[0], *norms

    @staticmethod
    def backward(ctx, dout, *_):
        needs = list(ctx.needs_input_grad[2:])
        found = _checks.for_each_gradient(lambda g: list(_gradients(ctx, g, needs)), dout)
        return None, None, *found
