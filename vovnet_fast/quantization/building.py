"""Integer layers out of folded weights and the ranges of activations.

A scale of weights is the least with which none exceeds its limit and no accumulator its own,
whatever the input::

    scale = max(amax(W) / limit, (sum(|W|) * x_max + |bias|) / (largest sum - rounding), floor)

where W has the input's scales in it already, by input channel. So there is no spec whose sums
overflow: only one whose weights would have fewer digits. The second bound is what sets the scale
of an eSE's weights and of a wide stem's, the floor that of channels which are all but zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arithmetic import fp8, int8
from ..arithmetic.layers import (
    QuantizedConv,
    QuantizedDepthwise,
    QuantizedGate,
    QuantizedNetwork,
    QuantizedSum,
)
from ..compat import zip
from ..ops import ConvParams
from ..specs import BlockPlan, Pool
from .floating import Folded
from .formats import Format
from .ranges import Range
from .walking import DEPTHWISE, IMAGE, Walker, walk

_FLOOR = 2.0**-40
"""Of a multiplier: an int32 times this is below one half, and rounds to zero; and no multiplier is
so small that a GPU would flush it to zero."""


class Builder(Walker[str]):
    """Makes the layers of a network as it goes through it.

    Args:
        folded: weights, of any floating dtype.
        ranges: of every activation by its name.
        form: dtype and levels.
    """

    def __init__(self, folded: Folded, ranges: dict[str, Range], form: Format) -> None:
        self._folded, self._ranges, self._form = folded, ranges, form
        self.layers: dict[str, QuantizedConv] = {}
        self.gates: dict[str, QuantizedGate] = {}
        self.sums: dict[str, QuantizedSum] = {}
        self.scales: dict[str, float] = {IMAGE: self._scale(IMAGE)}

    def network(self, out_features: tuple[str, ...]) -> QuantizedNetwork:
        """All of it, up to its last feature."""
        spec, form = self._folded.spec, self._form
        walk(self, spec, IMAGE, out_features)
        return QuantizedNetwork(
            spec, form.dtype, form.levels, form.wide_stem, out_features,
            self.layers, self.gates, self.sums, self.scales,
        )  # fmt: skip

    def conv(self, name: str, inputs: list[str], feature: bool) -> str:
        self.scales[name] = self._scale(name)
        self.layers[name] = self.layer(name, inputs, self._folded.layers[name])
        return name

    def layer(self, name: str, inputs: list[str], params: ConvParams) -> QuantizedConv:
        """A layer, with weights that need not be those of the network."""
        weight, shift = params.weight.detach().double(), params.shift.detach().double()
        wide = self._form.wide_stem and inputs == [IMAGE]
        zeros, spatial, stride = None, None, params.stride
        if params.depthwise is not None:
            [source] = inputs
            spatial = self._depthwise(name, params.depthwise.detach().double(), source)
            in_scales = spatial.scale.double()
            zeros = spatial.zero if self._form.dtype == "int8" else None
        else:
            in_scales = self._in_scales(weight, inputs)
        if wide and self._form.dtype == "fp8":
            in_scales = torch.ones_like(in_scales)  # Images stay as they are.
        folded = weight * in_scales
        if self._form.dtype == "int8":
            rounded, bias, unit = self._int8(name, folded, shift, zeros, wide)
        else:
            unit = folded.abs().amax((1, 2, 3)) / fp8.LARGEST
            unit = torch.where(unit > 0, unit, torch.ones_like(unit))
            if wide:
                unit = torch.ones_like(unit)
            scaled = (folded / unit[:, None, None, None]).float()
            rounded, bias = scaled if wide else fp8.to_e4m3(scaled), (shift / unit).float()
        scale = self.scales[name]
        return QuantizedConv(
            rounded, bias, (unit / scale).float(), unit.float(), stride, spatial,
            in_scales.float(), zeros, scale,
        )  # fmt: skip

    def finish(self, plan: BlockPlan, z: str, x: str | None, feature: bool) -> str:
        scale = self.scales[plan.name] = self._scale(plan.name)
        ratios = self.scales[z] / scale, 0.0 if x is None else self.scales[x] / scale
        shift = 0
        if self._form.dtype == "int8":
            shift = min(math.floor(math.log2(int8.FACTOR / max(ratios))), 30)
            factors = [float(round(ratio * 2.0**shift)) for ratio in ratios]
        else:
            factors = list(ratios)
        self.sums[plan.name] = QuantizedSum(factors[0], factors[1], shift, scale)
        if plan.ese:
            weight, bias = (tensor.detach().double() for tensor in self._folded.gates[plan.name])
            self.gates[plan.name] = self._gate(weight, bias, self.scales[z], factors[0])
        return plan.name

    def pool(self, x: str, mode: Pool) -> str:
        return x

    def _scale(self, name: str) -> float:
        return self._form.scale(name, self._ranges[name]).item()

    def _in_scales(self, weight: Tensor, inputs: list[str]) -> Tensor:
        """``[C_in]``: of several inputs the first is as wide as the others leave it."""
        channels = weight.shape[3]
        widths = [self._folded.layers[name].weight.shape[0] for name in inputs[1:]]
        widths = [channels - sum(widths), *widths]
        scales = [
            torch.full((width,), self.scales[name], dtype=torch.float64, device=weight.device)
            for name, width in zip(inputs, widths, strict=True)
        ]
        return torch.cat(scales)

    def _int8(
        self, name: str, weight: Tensor, bias: Tensor, zeros: Tensor | None, wide: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, bias and unit: ``[C_out, K, K, C_in]``, ``[C_out]``, ``[C_out]``."""
        if name == "stem_1":
            largest = self._form.image_limit
        else:  # With zero points the bias holds as much again.
            largest = self._form.levels * (1 if zeros is None else 2)
        limit, most = (
            (int8.WIDE_WEIGHT, int8.WIDE_SUM) if wide else (int8.LARGEST, int8.SUM)
        )  # fmt: skip
        unit = _unit(name, weight, bias, largest, limit, most)
        unit = unit.clamp_min(self.scales[name] * _FLOOR)
        rounded = (weight / unit[:, None, None, None]).round()
        whole = (bias / unit).round()
        if zeros is not None:
            whole = whole - (rounded * zeros.double()).sum((1, 2, 3))
        return (
            rounded.to(torch.int16 if wide else torch.int8),
            whole.to(torch.int32),
            unit,
        )

    def _depthwise(self, name: str, weight: Tensor, source: str) -> QuantizedDepthwise:
        """``weight`` is ``[3, 3, C]``."""
        site = name + DEPTHWISE
        reached, folded = self._ranges[site], weight * self.scales[source]
        scale, zero = self._form.scale(site, reached), self._form.zero(site, reached)
        largest = int8.LARGEST if self._form.dtype == "int8" else fp8.LARGEST
        unit = torch.maximum(folded.abs().amax((0, 1)) / largest, scale * _FLOOR)
        rounded = folded / unit
        exact = rounded.round().to(torch.int8) if self._form.dtype == "int8" else None
        return QuantizedDepthwise(
            fp8.to_e4m3(rounded.float()) if exact is None else exact,
            (unit / scale).float(),
            zero,
            unit.float(),
            scale.float(),
        )

    def _gate(self, weight: Tensor, bias: Tensor, scale: float, most: float) -> QuantizedGate:
        """``scale``: of the activations whose mean it is. ``most``: the gate 1."""
        kind = self._folded.spec.gate
        if self._form.dtype == "fp8":
            one = torch.ones_like(bias).float()
            return QuantizedGate((weight * scale).float(), bias.float(), one, 1, most, kind, None)
        mean_scale = self._form.mean_scale
        hard = kind == "hard_sigmoid"
        folded, whole = weight * (scale / mean_scale), bias + (3 if hard else int8.TABLE_REACH)
        largest = self._form.levels * mean_scale
        unit = _unit("an eSE", folded, whole, largest, int8.FACTOR, int8.SUM)
        unit = unit.clamp_min(_FLOOR)
        per_unit = most / 6 if hard else int8.TABLE / (2 * int8.TABLE_REACH)
        return QuantizedGate(
            (folded / unit[:, None]).round().to(torch.int16),
            (whole / unit).round().to(torch.int32),
            (unit * per_unit).float(),
            mean_scale,
            most,
            kind,
            None if hard else sigmoids(most, weight.device),
        )


def sigmoids(most: float, device: torch.device) -> Tensor:
    """The table of :class:`vovnet_fast.arithmetic.layers.QuantizedGate`."""
    steps = torch.arange(int8.TABLE, dtype=torch.float64, device=device)
    logits = steps * (2 * int8.TABLE_REACH / int8.TABLE) - int8.TABLE_REACH
    return (logits.sigmoid() * most).round().to(torch.int32)


def _unit(name: str, weight: Tensor, bias: Tensor, largest: int, limit: int, most: int) -> Tensor:
    """``[C_out]`` fp64: the value of one unit of the accumulator; see the module.

    Raises:
        ValueError: there are more products than a sum has room for.
    """
    flat = weight.flatten(1)
    room = most - 1 - flat.shape[1] * largest / 2  # A weight may be rounded up by one half.
    if room < most / 2:
        raise ValueError(
            f"{name} sums {flat.shape[1]} products of up to {largest} * {limit}, which do not fit "
            f"below {most}: quantise it with stem='int8' if it is a stem's, or keep the network "
            "in floating point"
        )
    by_sum = (flat.abs().sum(1) * largest + bias.abs()) / room
    return torch.maximum(flat.abs().amax(1) / limit, by_sum)


def build(
    folded: Folded, ranges: dict[str, Range], form: Format, out_features: tuple[str, ...]
) -> QuantizedNetwork:
    """The integer network of folded weights.

    Args:
        folded: weights.
        ranges: of every activation by its name.
        form: dtype and levels.
        out_features: names, in network order.

    Raises:
        ValueError: a layer has more products than an accumulator has room for.
    """
    return Builder(folded, ranges, form).network(out_features)
