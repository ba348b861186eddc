"""Layers one after another: convolution, batch norm, ReLU, as often as there are layers.

Between two layers, the backward pass applies the ReLU's mask in the epilogue of the
convolution that makes the gradient. With fixed statistics the outputs are all that is
kept; with those of the batch the raw convolutions are, and outputs are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._dtypes import accumulator
from ..backends import _steps
from ..compat import zip
from . import _checks, _library, conv, flattening, gradients, rooms
from ._checks import nchw, nhwc
from .conv import ConvGrads, ConvParams, Kept, Kinds
from .memory import Memory


def needs(kinds: Kinds, *, backward: bool) -> tuple[str, ...]:
    """The functions of a backend that a chain uses; see :meth:`Kinds.needs`."""
    return (*kinds.needs(backward=backward), *(("apply_gates_backward",) if backward else ()))


def conv_bn_relu(x: Tensor, params: ConvParams) -> Tensor:
    """relu(conv(x) * scale + shift): a convolution, its batch norm, ReLU. Differentiable.

    Args:
        x: ``[N, C_in, H, W]`` in fp16, bf16, fp32 or fp64.
        params: see :class:`ConvParams` and :func:`fold`. Padding is K // 2. Gradients of
            weights have their dtype, and are summed in fp32 (fp64 for fp64).

    Returns:
        ``[N, C_out, H', W']``, ``channels_last``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    return conv_chain(x, [params], op="conv_bn_relu")[0][0]


def conv_chain(
    x: Tensor, layers: Sequence[ConvParams], *, width: int = 0, op: str = "conv_chain"
) -> tuple[list[Tensor], list[Tensor]]:
    """Layers one after another; see :func:`conv_bn_relu`.

    Args:
        x: ``[N, C_in, H, W]``.
        layers: at least one.
        width: channels of the concat buffer of the OSA block that takes the last output,
            which is then made inside such a buffer; 0 for memory of its own.
        op: who asks, for messages.

    Returns:
        the output of every layer, and the ``[6, C_out]`` statistics
        (:mod:`.batch_norm`) of those that take them from the batch.
    """
    _checks.activations(op, "x", x, layers[0].weight.shape[-1])
    channels = x.shape[1]
    size = x.shape[2], x.shape[3]
    for layer in layers:
        conv.check(op, layer, x, channels)
        channels = layer.weight.shape[0]
        size = conv.output_size(*size, layer)
        _checks.batch_statistics(op, layer.eps, layer.group, x.shape[0] * size[0] * size[1])
    flat = flattening.flatten(op, list(layers))
    tensors = [t for group in flat[:4] for t in group]
    _checks.transforms(op, x, *tensors)
    keep, choice = _checks.needs_gradient(x, *tensors), backends.chosen()
    if _checks.traced(x):
        found = torch.ops.vovnet_fast.conv_chain(x, *flat, keep, choice)
    elif keep:
        found = _Chain.apply(flat[4:], choice, width, x, *tensors)
    else:
        found = _forward(x, layers, keep, choice, width)
    count = len(layers)
    norms = sum(layer.eps is not None for layer in layers)
    return list(found[:count]), [norm.detach() for norm in found[count : count + norms]]


@_checks.in_given_dtypes
def _forward(
    x: Tensor, layers: Sequence[ConvParams], keep: bool, choice: str, width: int = 0
) -> list[Tensor]:
    """Outputs, statistics, and with ``keep`` the raw convolutions of layers with statistics."""
    view = nhwc(x)
    size = view.shape[1], view.shape[2]
    for layer in layers:
        size = conv.output_size(*size, layer)
    c_out = layers[-1].weight.shape[0]
    last = rooms.new(view, view.shape[0], *size, c_out, max(width, c_out))

    def work() -> list[Tensor]:
        needed = needs(Kinds.of(layers), backward=keep)
        return _run(backends.get(x.device, x.dtype, needed, choice), view, layers, last, keep)

    if not keep:
        return work()
    return conv.repeat(choice, ("conv_chain",), layers, [view, last], work)


def _run(
    backend: ModuleType, view: Tensor, layers: Sequence[ConvParams], last: Tensor, keep: bool
) -> list[Tensor]:
    memory = Memory()
    outs: list[Tensor] = []
    kept: list[Kept] = []
    for layer in layers:
        out = last
        if len(outs) < len(layers) - 1:
            size = conv.output_size(view.shape[1], view.shape[2], layer)
            out = view.new_empty(view.shape[0], *size, layer.weight.shape[0])
        kept.append(conv.run(backend, view, layer, out, memory))
        outs.append(out)
        view = out
    norms = [k.norm for k in kept if k.norm is not None]
    raws = [nchw(k.raw) for k in kept if k.raw is not None]
    return [*map(nchw, outs), *norms, *(raws if keep else [])]


@_checks.in_given_dtypes
def _backward(
    x: Tensor,
    layers: list[ConvParams],
    outs: list[Tensor],
    norms: list[Tensor],
    raws: list[Tensor],
    douts: list[Tensor | None],
    need_x: bool,
    wanted: list[bool],
    choice: str,
) -> tuple[Tensor | None, list[ConvGrads | None]]:
    """Gradients of the input, ``[N, C, H, W]``, and of every layer.

    ``outs`` are those of layers with fixed statistics; of the others there are ``norms``
    and ``raws``.
    """
    backend = backends.get(x.device, x.dtype, needs(Kinds.of(layers), backward=True), choice)
    rest, statistics, results = iter(outs), iter(norms), iter(raws)
    kept, ys = [], []
    for layer in layers:
        if layer.eps is None:
            kept.append(Kept())
            ys.append(nhwc(next(rest)))
        else:
            raw = nhwc(next(results))
            kept.append(Kept(None, raw, next(statistics)))
            ys.append(_like(raw))
            conv.run_again(backend, kept[-1], ys[-1])
    inputs = [nhwc(x), *ys[:-1]]
    dout = douts[-1]
    g = _like(ys[-1])
    if dout is None:
        g.zero_()
    else:
        backend.apply_gates_backward(nhwc(dout), None, None, ys[-1], g)
    grads: list[ConvGrads | None] = [None] * len(layers)
    for i in reversed(range(len(layers))):
        needed = need_x or any(wanted[:i])
        dx = _like(inputs[i]) if needed else None
        other = douts[i - 1] if i > 0 else None
        add = None if other is None else nhwc(other)
        grads[i] = conv.run_backward(
            backend,
            inputs[i],
            g,
            layers[i],
            kept[i],
            wanted=wanted[i],
            dx=dx,
            add=add,
            mask=ys[i - 1] if i > 0 else None,
        )
        if dx is None:
            return None, grads
        g = dx
    return nchw(g), grads


def _like(x: Tensor) -> Tensor:
    """Uninitialised and contiguous, of the shape and dtype of ``x``."""
    return x.new_empty(x.shape)


# --------------------------------------------------------------------------------------
# torch.library
# --------------------------------------------------------------------------------------


@_library.op("conv_chain")
def _conv_chain(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    depthwise: list[Tensor],
    strides: list[int],
    epsilons: list[float],
    group: str,
    keep: bool,
    choice: str,
) -> list[Tensor]:
    layers = flattening.unflatten(weights, scales, shifts, depthwise, strides, epsilons, group)
    return _forward(x, layers, keep, choice)


@_conv_chain.register_fake
def _(x, weights, scales, shifts, depthwise, strides, epsilons, group, keep, choice):
    n, h, w = x.shape[0], x.shape[2], x.shape[3]
    outs = []
    for weight, stride in zip(weights, strides, strict=True):
        h, w = (h - 1) // abs(stride) + 1, (w - 1) // abs(stride) + 1
        outs.append(nchw(x.new_empty(n, h, w, weight.shape[0])))
    batch = [out for out, eps in zip(outs, epsilons, strict=True) if eps >= 0]
    norms = [x.new_empty(6, out.shape[1], dtype=accumulator(x.dtype)) for out in batch]
    return [*outs, *norms, *(torch.empty_like(out) for out in batch if keep)]


@_library.op("conv_chain_backward")
def _conv_chain_backward(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    depthwise: list[Tensor],
    strides: list[int],
    epsilons: list[float],
    group: str,
    choice: str,
    outs: list[Tensor],
    norms: list[Tensor],
    raws: list[Tensor],
    douts: Sequence[Tensor | None],
    needs: list[bool],
) -> list[Tensor]:
    layers = flattening.unflatten(weights, scales, shifts, depthwise, strides, epsilons, group)
    wanted = flattening.wanted(needs[1:], strides)
    x = nchw(nhwc(x))
    given = [None if dout is None else nchw(nhwc(dout)) for dout in douts]

    def work() -> list[Tensor]:
        dx, grads = _backward(x, layers, outs, norms, raws, given, needs[0], wanted, choice)
        tensors = [*weights, *scales, *shifts, *depthwise]
        found = [dx, *gradients.flatten(grads, tensors, strides)]
        return [g for g, need in zip(found, needs, strict=True) if need and g is not None]

    key = "conv_chain_backward", *needs, *(dout is None for dout in given)
    read = [x, *outs, *norms, *raws, *(dout for dout in given if dout is not None)]
    return conv.repeat(choice, key, layers, read, work)


@_conv_chain_backward.register_fake
def _(
    x,
    weights,
    scales,
    shifts,
    depthwise,
    strides,
    epsilons,
    group,
    choice,
    outs,
    norms,
    raws,
    douts,
    needs,
):
    tensors = [*weights, *scales, *shifts, *depthwise]
    grads = [gradients.new(t) for t, need in zip(tensors, needs[1:], strict=True) if need]
    return [nchw(x.new_empty(nhwc(x).shape)), *grads] if needs[0] else grads


_checks.backward_op(_conv_chain_backward, "conv_chain")


def _saved(found: Sequence[Tensor], epsilons: list[float]) -> list[Tensor]:
    """What the backward pass takes out of the results of :func:`_forward`."""
    outs = [out for out, eps in zip(found, epsilons, strict=False) if eps < 0]
    return [*outs, *found[len(epsilons) :]]


def _gradients(
    ctx: Any, flat: tuple[list[int], list[float], str], douts: list[Tensor | None], needs
) -> Iterator[Tensor | None]:
    """Gradients of the input and of all tensors, None for those that need none."""
    strides, epsilons, _ = flat
    if not any(dout is not None for dout in douts):
        return iter([None] * len(needs))
    needs = _reached(needs, strides, douts)
    count = 1 + 3 * len(strides) + sum(stride < 0 for stride in strides)
    x, *rest = ctx.saved_tensors
    tensors, saved = rest[: count - 1], rest[count - 1 :]
    fixed = sum(eps < 0 for eps in epsilons)
    batch = len(epsilons) - fixed
    found = iter(
        _checks.call(
            _conv_chain_backward,
            ctx.choice,
            x,
            *flattening.regroup(tensors, strides),
            *flat,
            ctx.choice,
            saved[:fixed],
            saved[fixed : fixed + batch],
            saved[fixed + batch :],
            douts,
            needs,
        )
    )
    return iter([next(found) if need else None for need in needs])


def _reached(
    needs: Sequence[bool], strides: list[int], douts: Sequence[Tensor | None]
) -> list[bool]:
    """Which tensors have a gradient: none of a layer on which no output in use depends."""
    last = max(i for i, dout in enumerate(douts) if dout is not None)
    by_layer = [i <= last for i in range(len(strides))]
    depthwise = [reached for reached, s in zip(by_layer, strides, strict=True) if s < 0]
    reached = [True, *by_layer, *by_layer, *by_layer, *depthwise]
    return [need and r for need, r in zip(needs, reached, strict=True)]


def _setup_context(ctx, inputs, output):
    x, *groups = inputs[:5]
    ctx.flat, ctx.counts = inputs[5:8], [len(group) for group in groups]
    ctx.choice = inputs[9]
    ctx.set_materialize_grads(False)
    tensors = [t for group in groups for t in group]
    ctx.needs = [t.requires_grad for t in (x, *tensors)]
    ctx.save_for_backward(x, *tensors, *_saved(output, ctx.flat[1]))


def _op_backward(ctx, grads):
    found = _gradients(ctx, ctx.flat, list(grads[: len(ctx.flat[0])]), ctx.needs)
    dx = next(found)
    return dx, *([next(found) for _ in range(count)] for count in ctx.counts), *([None] * 5)


_conv_chain.register_autograd(_op_backward, _setup_context)


class _Chain(torch.autograd.Function):
    """The same outside of torch.compile, where the last output can be given room."""

    @staticmethod
    def forward(ctx, flat, choice, width, x, *tensors):
        strides, epsilons, group = flat
        layers = flattening.unflatten(
            *flattening.regroup(tensors, strides), strides, epsilons, group
        )
        with _steps.forward():
            found = _forward(x, layers, True, choice, width)
        count = len(layers)
        found[:count] = map(rooms.owned, found[:count])
        ctx.flat, ctx.choice = flat, choice
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors, *_saved(found, flat[1]))
        ctx.mark_non_differentiable(*found[count:])
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads):
        needs = list(ctx.needs_input_grad[3:])
        found = _checks.for_each_gradient(
            lambda *douts: list(_gradients(ctx, ctx.flat, list(douts), needs)),
            *grads[: len(ctx.flat[0])],
        )
        return None, None, None, *found
