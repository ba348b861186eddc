"""The quantised network as something that has gradients: what it computes is the integers' bit for
bit, and gradients pass its roundings as if they were not there.

"Estimating or Propagating Gradients Through Stochastic Neurons" (Bengio et al.,
arXiv:1308.3432); Jacob et al. (arXiv:1712.05877), section 3. Beside each activation of the
integer network goes the value that it stands for, computed by PyTorch's convolutions of the
rounded weights. Its gradient is the real one of that convolution, and zero where the activation
was cut at an end of its range; its value is that of the integers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..arithmetic.layers import QuantizedConv, QuantizedNetwork
from ..specs import BlockPlan, Pool
from . import floating
from .floating import Folded
from .formats import Format
from .walking import DEPTHWISE, IMAGE, Walker, walk


class _Replace(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def replace(source: Tensor, value: Tensor) -> Tensor:
    """``value``, through which gradients go to ``source`` unchanged."""
    if source.shape != value.shape:
        raise ValueError(f"{list(source.shape)} cannot stand for {list(value.shape)}")
    if not (torch.is_grad_enabled() and source.requires_grad):
        return value
    return _Replace.apply(source, value.detach())


class Both(NamedTuple):
    """An activation.

    Attributes:
        q: ``[N, H, W, C]``, of the integer network.
        x: ``[N, C, H, W]`` fp32, the value of that, with gradients.
        scale: the value of one step.
        feature: ``[N, C, H, W]`` fp32, the same before its rounding, where it is a feature.
        sums: over the pixels, where an eSE comes next.
    """

    q: Tensor
    x: Tensor
    scale: float
    feature: Tensor | None = None
    sums: Tensor | None = None


class StraightThrough(Walker[Both]):
    """Computes a quantised network with gradients.

    Args:
        network: made of ``folded``.
        folded: weights in fp32, to which gradients go; None for no gradients.
    """

    def __init__(self, network: QuantizedNetwork, folded: Folded | None = None) -> None:
        self.network, self._folded = network, folded
        self.form = Format(network.dtype, network.levels, network.wide_stem)
        self._ops = self.form.ops
        # What activations are cut at.
        self._largest = network.levels

    def run(self, x: Tensor) -> list[Tensor]:
        """Features of ``[N, C, H, W]`` fp32 images."""
        found = walk(self, self.network.spec, self.image(x), self.network.out_features)
        return [each.feature for each in found if each.feature is not None]

    def image(self, x: Tensor) -> Both:
        """Quantised images."""
        ops, wide, scale = self._ops, self.network.wide_stem, self.network.scales[IMAGE]
        pixels = x.permute(0, 2, 3, 1)
        q = torch.empty(pixels.shape, dtype=ops.image_dtype(wide), device=x.device)
        ops.quantize_image(pixels.detach(), scale, q, wide=wide)
        if wide and self.form.dtype == "fp8":
            return self._noted(IMAGE, Both(q, x, 1.0))
        limit = self.form.image_limit * scale
        value = replace(x.clamp(-limit, limit), _value(q, scale))
        return self._noted(IMAGE, Both(q, value, scale))

    def conv(self, name: str, inputs: list[Both], feature: bool) -> Both:
        layer = self.network.layers[name]
        q = torch.cat([one.q for one in inputs], 3) if len(inputs) > 1 else inputs[0].q
        x = torch.cat([one.x for one in inputs], 1) if len(inputs) > 1 else inputs[0].x
        if layer.depthwise is not None:
            q, x = self._depthwise(name, inputs[0])
            self.observe(name + DEPTHWISE, x)
        stride = 1 if layer.depthwise is not None else layer.stride
        out = self._empty(q, stride, layer.weight.shape[0])
        exact = out.new_empty(out.shape, dtype=torch.float32) if feature else None
        sums = self._ops.conv(
            q, layer, out, levels=self.network.levels, feature=exact, pool=name.endswith("_concat")
        )
        value, unrounded = _value(out, layer.scale), None if exact is None else _nchw(exact)
        if self._differentiable():
            y = F.relu(self.before_relu(name, x))
            value = replace(y.clamp(max=self._largest * layer.scale), value)
            unrounded = None if unrounded is None else replace(y, unrounded)
        return self._noted(name, Both(out, value, layer.scale, unrounded, sums))

    def before_relu(self, name: str, x: Tensor) -> Tensor:
        """What a layer makes of ``x`` before its ReLU and its rounding, by rounded weights."""
        layer = self.network.layers[name]
        weight, bias = dequantized(layer)
        if self._folded is not None:
            params = self._folded.layers[name]
            weight, bias = replace(params.weight, weight), replace(params.shift, bias)
        return floating.conv(x, weight, bias, 1 if layer.depthwise is not None else layer.stride)

    def finish(self, plan: BlockPlan, z: Both, x: Both | None, feature: bool) -> Both:
        ops, rescale, y = self._ops, self.network.sums[plan.name], z.x
        _, h, w, channels = z.q.shape
        gates = None
        if plan.ese:
            gates = ops.gates(z.sums, h * w, self.network.gates[plan.name])
        out = self._empty(z.q, 1, channels)
        exact = out.new_empty(out.shape, dtype=torch.float32) if feature else None
        identity, levels = None if x is None else x.q, self.network.levels
        ops.apply_gates(z.q, gates, identity, rescale, out, levels=levels, feature=exact)
        value, unrounded = _value(out, rescale.scale), None if exact is None else _nchw(exact)
        if self._folded is not None and self._differentiable():
            if plan.ese:
                y = y * floating.gate(y, *self._folded.gates[plan.name], self.network.spec)
            y = y if x is None else y + x.x
            value = replace(y.clamp(max=self._largest * rescale.scale), value)
            unrounded = None if unrounded is None else replace(y, unrounded)
        return self._noted(plan.name, Both(out, value, rescale.scale, unrounded))

    def pool(self, x: Both, mode: Pool) -> Both:
        y = reference.max_pool(x.x, mode)  # A largest value is one of the values.
        out = x.q.new_empty(y.permute(0, 2, 3, 1).shape)
        self._ops.max_pool(x.q, out, mode)
        return Both(out, y, x.scale)

    def observe(self, name: str, x: Tensor) -> None:
        """Is given every activation, as the value that it stands for."""

    def _noted(self, name: str, made: Both) -> Both:
        self.observe(name, made.x)
        return made

    def _depthwise(self, name: str, source: Both) -> tuple[Tensor, Tensor]:
        layer = self.network.layers[name]
        spatial = layer.depthwise
        assert spatial is not None
        out = self._empty(source.q, layer.stride, source.q.shape[3])
        levels = self.network.levels
        self._ops.depthwise(source.q, spatial, out, levels=levels, stride=layer.stride)
        value = _nchw((out.float() - spatial.zero.float()) * spatial.scale)
        if self._folded is not None and self._differentiable():
            weight = self._folded.layers[name].depthwise
            assert weight is not None
            rounded = spatial.weight.float() * (spatial.unit / source.scale)
            y = floating.depthwise(source.x, replace(weight, rounded), layer.stride)
            low, high = self.ends(name + DEPTHWISE)
            value = replace(torch.minimum(torch.maximum(y, low), high), value)
        return out, value

    def ends(self, name: str) -> tuple[Tensor, Tensor]:
        """What an activation is cut at, ``[]`` or for each channel ``[C, 1, 1]``."""
        if name.endswith(DEPTHWISE):
            spatial = self.network.layers[name[: -len(DEPTHWISE)]].depthwise
            assert spatial is not None
            zero, scale = spatial.zero.float()[:, None, None], spatial.scale[:, None, None]
            low = -self._largest if self.form.dtype == "fp8" else -zero
            return low * scale, (self._largest - zero) * scale
        scale = torch.tensor(self.network.scales[name])
        if name == IMAGE:
            return -self.form.image_limit * scale, self.form.image_limit * scale
        return 0 * scale, self._largest * scale

    def _differentiable(self) -> bool:
        return self._folded is not None and torch.is_grad_enabled()

    def _empty(self, q: Tensor, stride: int, channels: int) -> Tensor:
        """An activation for what a layer makes of ``q``; images have another dtype."""
        n, h, w, _ = q.shape
        size = (h - 1) // stride + 1, (w - 1) // stride + 1
        return q.new_empty(n, *size, channels, dtype=self._ops.ACTIVATION)


def dequantized(layer: QuantizedConv) -> tuple[Tensor, Tensor]:
    """The weight ``[C_out, K, K, C_in]`` and the bias that a layer computes with, in fp32."""
    bias = layer.bias.double()
    if layer.in_zeros is not None:
        bias = bias + (layer.weight.double() * layer.in_zeros.double()).sum((1, 2, 3))
    weight = layer.weight.float() * layer.unit[:, None, None, None] / layer.in_scales
    return weight, (bias * layer.unit.double()).float()


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _value(q: Tensor, scale: float) -> Tensor:
    return _nchw(q.float() * scale)
