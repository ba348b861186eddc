"""A quantised network as tensors by name, and back; what its architecture says of them.

========================  ===============  ===================================================
``weight_3``              int8             of the fourth layer, ``[C_out, K, K, C_in]``
``bias_3``                int32            in units of the accumulator
``multiplier_3``          fp32             unit / scale
``unit_3``                fp32             the value of one unit of the accumulator
``depthwise_3``           int8             ``[3, 3, C]`` of the depthwise convolution before it
``depthwise_unit_3``, ``depthwise_multiplier_3``, ``depthwise_scale_3``, ``depthwise_zero_3``
``gate_weight_0``         int16            of the first eSE, ``[C, C]``
``gate_bias_0``, ``gate_multiplier_0``
``scales``                fp64             of :meth:`.walking.Names.activations`, in that order
``sums``                  fp64             gate, identity and shift of each block that ends in them
========================  ===============  ===================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..arithmetic import fp8
from ..arithmetic.layers import (
    QuantizedConv,
    QuantizedDepthwise,
    QuantizedGate,
    QuantizedNetwork,
    QuantizedSum,
)
from ..compat import zip
from ..deploy.layout import Layer
from ..deploy.layout import layers as frozen_layers
from ..specs import VoVNetSpec
from .building import sigmoids
from .formats import Format
from .walking import IMAGE, Names


class Architecture(NamedTuple):
    """What the tensors of a network depend on.

    Attributes:
        spec: the architecture.
        form: dtype and levels.
        out_features: names.
        input_ch: channels of images.
    """

    spec: VoVNetSpec
    form: Format
    out_features: tuple[str, ...]
    input_ch: int

    def names(self) -> Names:
        """Of its layers."""
        return Names(self.spec, self.out_features)

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """Those up to the last feature."""
        return zip(self.names().layers, frozen_layers(self.spec, self.input_ch))


def tensors(network: QuantizedNetwork) -> dict[str, Tensor]:
    """All that a network is, beside its :class:`Architecture`."""
    found: dict[str, Tensor] = {}
    for i, layer in enumerate(network.layers.values()):
        found[f"weight_{i}"], found[f"bias_{i}"] = layer.weight, layer.bias
        found[f"multiplier_{i}"], found[f"unit_{i}"] = layer.multiplier, layer.unit
        if layer.depthwise is not None:
            spatial = layer.depthwise
            found[f"depthwise_{i}"], found[f"depthwise_unit_{i}"] = spatial.weight, spatial.unit
            found[f"depthwise_multiplier_{i}"] = spatial.multiplier
            found[f"depthwise_scale_{i}"] = spatial.scale
            found[f"depthwise_zero_{i}"] = spatial.zero
    for i, gate in enumerate(network.gates.values()):
        found[f"gate_weight_{i}"], found[f"gate_bias_{i}"] = gate.weight, gate.bias
        found[f"gate_multiplier_{i}"] = gate.multiplier
    device = network.layers["stem_1"].weight.device
    options = dict(dtype=torch.float64, device=device)
    order = Names(network.spec, network.out_features).activations()
    found["scales"] = torch.tensor([network.scales[name] for name in order], **options)  # type: ignore[arg-type]
    sums = [[each.gate, each.identity, each.shift] for each in network.sums.values()]
    found["sums"] = torch.tensor(sums, **options).reshape(-1, 3)  # type: ignore[arg-type]
    return found


def expected(architecture: Architecture) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes by name."""
    whole = architecture.form.dtype == "int8"
    byte = torch.int8 if whole else fp8.ACTIVATION
    assert byte is not None
    bias, fc = (torch.int32, torch.int16) if whole else (torch.float32, torch.float32)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for i, (name, layer) in enumerate(architecture.layers()):
        out, k, channels = layer.out_channels, layer.kernel, layer.in_channels
        wide = name == "stem_1" and architecture.form.wide_stem
        first = (torch.int16 if whole else torch.float32) if wide else byte
        found[f"weight_{i}"] = (out, k, k, channels), first
        found[f"bias_{i}"] = (out,), bias
        found[f"multiplier_{i}"] = found[f"unit_{i}"] = (out,), torch.float32
        if layer.depthwise:
            found[f"depthwise_{i}"] = (3, 3, channels), byte
            for what in ("unit", "multiplier", "scale"):
                found[f"depthwise_{what}_{i}"] = (channels,), torch.float32
            found[f"depthwise_zero_{i}"] = (channels,), torch.uint8
    names = architecture.names()
    gates = [plan.out_channels for plan in names.blocks if plan.ese]
    for i, channels in enumerate(gates):
        found[f"gate_weight_{i}"] = (channels, channels), fc
        found[f"gate_bias_{i}"] = (channels,), bias
        found[f"gate_multiplier_{i}"] = (channels,), torch.float32
    found["scales"] = (len(names.activations()),), torch.float64
    found["sums"] = (len(names.blocks), 3), torch.float64
    return found


def blank(architecture: Architecture, device: torch.device | str) -> QuantizedNetwork:
    """A network of zeros and ones, which launches what any of its architecture does."""
    found = {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in expected(architecture).items()
    }
    for name in ("scales", "sums"):
        found[name] = torch.ones(found[name].shape, dtype=torch.float64)
    return network(architecture, found)


def network(architecture: Architecture, tensors: Mapping[str, Tensor]) -> QuantizedNetwork:
    """The network that tensors of :func:`expected` are; they are not copied."""
    spec, form = architecture.spec, architecture.form
    names = architecture.names()
    by_name = dict(zip(names.activations(), tensors["scales"].tolist(), strict=True))
    layers: dict[str, QuantizedConv] = {}
    for i, (name, shape) in enumerate(architecture.layers()):
        weight, inputs, spatial = tensors[f"weight_{i}"], names.inputs[name], None
        zeros = None
        if shape.depthwise:
            spatial = QuantizedDepthwise(
                tensors[f"depthwise_{i}"],
                tensors[f"depthwise_multiplier_{i}"],
                tensors[f"depthwise_zero_{i}"],
                tensors[f"depthwise_unit_{i}"],
                tensors[f"depthwise_scale_{i}"],
            )
            in_scales = spatial.scale
            zeros = spatial.zero if form.dtype == "int8" else None
        else:
            rest = [layers[other].weight.shape[0] for other in inputs[1:]]
            widths = [weight.shape[3] - sum(rest), *rest]
            values = [by_name[other] for other in inputs]
            if form.wide_stem and form.dtype == "fp8" and inputs == [IMAGE]:
                values = [1.0]
            in_scales = torch.cat(
                [
                    torch.full((width,), value, dtype=torch.float32, device=weight.device)
                    for width, value in zip(widths, values, strict=True)
                ]
            )
        layers[name] = QuantizedConv(
            weight, tensors[f"bias_{i}"], tensors[f"multiplier_{i}"], tensors[f"unit_{i}"],
            shape.stride, spatial, in_scales, zeros, by_name[name],
        )  # fmt: skip
    sums = {
        plan.name: QuantizedSum(gate, identity, int(shift), by_name[plan.name])
        for plan, (gate, identity, shift) in zip(
            names.blocks, tensors["sums"].tolist(), strict=True
        )
    }
    gates: dict[str, QuantizedGate] = {}
    for i, name in enumerate(plan.name for plan in names.blocks if plan.ese):
        most, weight = sums[name].gate, tensors[f"gate_weight_{i}"]
        whole = form.dtype == "int8"
        table = sigmoids(most, weight.device) if whole and spec.gate == "sigmoid" else None
        gates[name] = QuantizedGate(
            weight, tensors[f"gate_bias_{i}"], tensors[f"gate_multiplier_{i}"],
            form.mean_scale,
            most, spec.gate, table,
        )  # fmt: skip
    return QuantizedNetwork(
        spec, form.dtype, form.levels, form.wide_stem, architecture.out_features, layers, gates,
        sums, by_name,
    )  # fmt: skip
