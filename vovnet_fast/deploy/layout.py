"""The buffers of a frozen network by its architecture alone: names, shapes, and which is whose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulator
from ..compat import zip
from ..ops import ConvParams, NetworkParams
from ..ops.features import rebuild
from ..specs import VoVNetSpec


class Layer(NamedTuple):
    """A layer: ``weight_<number>`` is ``[C_out, K, K, C_in]``.

    Of a depthwise one K is 1, and ``depthwise_<number>`` is ``[3, 3, C_in]``.
    """

    out_channels: int
    in_channels: int
    kernel: int
    stride: int = 1
    depthwise: bool = False


def layers(spec: VoVNetSpec, input_ch: int) -> Iterator[Layer]:
    """The layers of a network in the order in which they run."""
    width = input_ch
    for i, (out, stride) in enumerate(zip(spec.stem_channels, spec.stem_strides, strict=True)):
        depthwise = spec.depthwise and i > 0
        yield Layer(out, width, 1 if depthwise else 3, stride, depthwise)
        width = out
    for block in spec.blocks():
        mid, kernel = block.mid_channels, 1 if block.depthwise else 3
        if block.reduction:
            yield Layer(mid, block.in_channels, 1)
        width = mid if block.depthwise else block.in_channels
        for _ in range(block.num_layers):
            yield Layer(mid, width, kernel, depthwise=block.depthwise)
            width = mid
        yield Layer(block.out_channels, block.concat_channels, 1)


def expected(
    spec: VoVNetSpec, input_ch: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes by name, without the buffers that are one number throughout."""
    exact, width = accumulator(dtype), 0
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for i, layer in enumerate(layers(spec, input_ch)):
        out, k, width = layer.out_channels, layer.kernel, width + layer.out_channels
        found[f"weight_{i}"] = (out, k, k, layer.in_channels), dtype
        if layer.depthwise:
            found[f"depthwise_{i}"] = (3, 3, layer.in_channels), dtype
    gates = [block.out_channels for block in spec.blocks() if block.ese]
    for i, channels in enumerate(gates):
        found[f"fc_{2 * i}"] = (channels, channels), dtype
        found[f"fc_{2 * i + 1}"] = (channels,), dtype
    if dtype != exact:  # Otherwise it is in the weights.
        found["scale"] = (width,), exact
    found["shift"] = (width,), exact
    return found


def params(spec: VoVNetSpec, encoded_spec: str, tensors: Mapping[str, Tensor]) -> NetworkParams:
    """The buffers as the ops take them; their values are not copied."""
    every = list(layers(spec, tensors["weight_0"].shape[3]))
    widths, shift = [layer.out_channels for layer in every], tensors["shift"]
    scale = tensors["scale"] if "scale" in tensors else torch.ones_like(shift)
    parts = zip(every, scale.split(widths), shift.split(widths), strict=True)
    convs = []
    for i, (layer, own_scale, own_shift) in enumerate(parts):
        depthwise = tensors[f"depthwise_{i}"] if layer.depthwise else None
        convs.append(
            ConvParams(tensors[f"weight_{i}"], own_scale, own_shift, layer.stride, depthwise)
        )
    fcs = [tensors[f"fc_{i}"] for i in range(2 * sum(block.ese for block in spec.blocks()))]
    return rebuild(convs, fcs, spec, encoded_spec)
