"""One-Shot Aggregation in one concat buffer: no concatenation, no copy between layers.

The buffer is ``[N, H, W, C_in + L * C_mid]``. Slot 0 holds the block's input, slot i the
output of layer i: every layer reads one slot and writes the next, and the 1x1 over the
concat reads the buffer as it lies.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import backends
from ..specs import Gate
from . import _checks, conv
from ._checks import nchw, nhwc
from .conv import ConvParams
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

    def convs(self) -> list[ConvParams]:
        """All convolution layers in the order in which they run."""
        first = [] if self.reduction is None else [self.reduction]
        return [*first, *self.layers, self.concat]

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        found = [t for layer in self.convs() for t in layer if isinstance(t, Tensor)]
        return found + [t for t in (self.fc_weight, self.fc_bias) if t is not None]


def new_buffer(
    memory: Memory, like: Tensor, size: tuple[int, int, int], params: BlockParams
) -> Tensor:
    """An uninitialised concat buffer for a block on maps of ``(N, H, W)``."""
    return memory.chained(like, *size, params.concat.weight.shape[3])


def input_slot(buffer: Tensor, params: BlockParams) -> Tensor:
    """Slot 0, which the producer of the block's input fills."""
    return buffer[..., : params.in_channels]


def run(
    backend: ModuleType, buffer: Tensor, params: BlockParams, out: Tensor, memory: Memory
) -> None:
    """Run a block whose input is in slot 0 of ``buffer``.

    Args:
        buffer: ``[N, H, W, C_in + L * C_mid]``; all slots but the first are written.
        params: of the block.
        out: ``[N, H, W, C_out]`` view; slot 0 of the next block, or a feature.
        memory: for what lives only while the block runs.
    """
    slot = x = input_slot(buffer, params)
    if params.reduction is not None:
        slot = memory.scratch("block", x, *x.shape[:3], params.reduction.weight.shape[0])
        conv.run(backend, x, params.reduction, slot, memory)
    end = params.in_channels
    for layer in params.layers:
        begin, end = end, end + layer.weight.shape[0]
        conv.run(backend, slot, layer, buffer[..., begin:end], memory)
        slot = buffer[..., begin:end]
    identity = x if params.identity else None
    if params.fc_weight is None and identity is None:
        conv.run(backend, buffer, params.concat, out, memory)
        return
    z = memory.scratch("block", x, *out.shape)
    gated = params.fc_weight is not None
    partials = conv.run(backend, buffer, params.concat, z, memory, pool=gated)
    if partials is None:
        backend.apply_gates(z, None, identity, out)
    else:
        assert params.fc_weight is not None
        assert params.fc_bias is not None
        run_ese(backend, z, partials, params.fc_weight, params.fc_bias, params.gate, identity, out)


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


def osa_block(x: Tensor, params: BlockParams) -> Tensor:
    """One OSA block. ``x`` is copied once, into slot 0 of a new concat buffer.

    Args:
        x: ``[N, C_in, H, W]`` in fp16, bf16, fp32 or fp64.
        params: of the block, in the dtype of ``x``.

    Returns:
        ``[N, C_out, H, W]``, ``channels_last``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: a gradient would be needed.
        BackendError: the backend that was asked for cannot run.
    """
    _checks.activations("osa_block", "x", x, params.in_channels)
    check("osa_block", params, x)
    _checks.no_gradient("osa_block", x, *params.tensors())
    flat = flatten([*params.convs()])
    fc = [t for t in (params.fc_weight, params.fc_bias) if t is not None]
    out: Tensor = torch.ops.vovnet_fast.osa_block(
        x, *flat, fc, params.reduction is not None, params.gate, params.identity
    )
    return out


FlatConvs = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]]


def flatten(layers: list[ConvParams]) -> FlatConvs:
    """Layers as what ``torch.library`` takes: lists of tensors and of integers.

    The integers are the stride, negative where a depthwise convolution comes first.
    """
    return (
        [layer.weight for layer in layers],
        [layer.scale for layer in layers],
        [layer.shift for layer in layers],
        [layer.depthwise for layer in layers if layer.depthwise is not None],
        [layer.stride if layer.depthwise is None else -layer.stride for layer in layers],
    )


def unflatten(
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    depthwise: list[Tensor],
    strides: list[int],
) -> list[ConvParams]:
    """The inverse of :func:`flatten`."""
    spatial = iter(depthwise)
    return [
        ConvParams(weight, scale, shift, abs(stride), next(spatial) if stride < 0 else None)
        for weight, scale, shift, stride in zip(weights, scales, shifts, strides, strict=True)
    ]


@torch.library.custom_op("vovnet_fast::osa_block", mutates_args=())
def _osa_block(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    depthwise: list[Tensor],
    strides: list[int],
    fc: list[Tensor],
    reduction: bool,
    gate: str,
    identity: bool,
) -> Tensor:
    layers = unflatten(weights, scales, shifts, depthwise, strides)
    params = BlockParams(
        tuple(layers[1 if reduction else 0 : -1]),
        layers[-1],
        layers[0] if reduction else None,
        fc[0] if fc else None,
        fc[1] if fc else None,
        cast(Gate, gate),
        identity,
    )
    view = nhwc(x)
    n, h, w, _ = view.shape
    memory = Memory()
    buffer = new_buffer(memory, view, (n, h, w), params)
    input_slot(buffer, params).copy_(view)
    out = memory.feature(view, n, h, w, params.concat.weight.shape[0])
    run(backends.get(x.device), buffer, params, out, memory)
    return nchw(out)


@_osa_block.register_fake
def _(x, weights, scales, shifts, depthwise, strides, fc, reduction, gate, identity):
    n, _, h, w = x.shape
    return nchw(x.new_empty(n, h, w, weights[-1].shape[0]))
