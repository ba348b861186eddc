"""The network that is quantised: norms folded, in floating point, by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..compat import zip
from ..ops import ConvParams, NetworkParams
from ..specs import BlockPlan, Pool, VoVNetSpec
from .walking import DEPTHWISE, STEM, Walker, layer_names, walk


class Folded(NamedTuple):
    """Weights of a network, with all scales one.

    Attributes:
        spec: the architecture.
        layers: convolutions by name; see :mod:`.walking`.
        gates: weight ``[C, C]`` and bias ``[C]`` of an eSE by the name of its block.
    """

    spec: VoVNetSpec
    layers: dict[str, ConvParams]
    gates: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, params: NetworkParams) -> Folded:
        """Those of a network whose scales are in its weights."""
        layers, gates = dict(zip(STEM, params.stem, strict=True)), {}
        for plan, block in zip(params.spec.blocks(), params.blocks, strict=True):
            layers.update(zip(layer_names(plan), block.convs(), strict=True))
            if block.fc_weight is not None and block.fc_bias is not None:
                gates[plan.name] = block.fc_weight, block.fc_bias
        return cls(params.spec, layers, gates)

    def map(self, function: Callable[[Tensor], Tensor]) -> Folded:
        """The same with other tensors."""

        def layer(params: ConvParams) -> ConvParams:
            return params._replace(
                weight=function(params.weight),
                shift=function(params.shift),
                depthwise=None if params.depthwise is None else function(params.depthwise),
            )

        return Folded(
            self.spec,
            {name: layer(params) for name, params in self.layers.items()},
            {name: (function(w), function(b)) for name, (w, b) in self.gates.items()},
        )


class Floating(Walker[Tensor]):
    """Computes a folded network on ``[N, C, H, W]`` tensors. Differentiable.

    Args:
        folded: weights, in the dtype of the images.
        observe: is given every activation by its name, outputs of depthwise convolutions too.
    """

    def __init__(self, folded: Folded, observe: Callable[[str, Tensor], None]) -> None:
        self._folded, self._observe = folded, observe

    def conv(self, name: str, inputs: list[Tensor], feature: bool) -> Tensor:
        x = torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]
        layer = self._folded.layers[name]
        if layer.depthwise is not None:
            x = depthwise(x, layer.depthwise, layer.stride)
            self._observe(name + DEPTHWISE, x)
        x = conv(x, layer.weight, layer.shift, 1 if layer.depthwise is not None else layer.stride)
        self.before_relu(name, x)
        x = F.relu(x)
        self._observe(name, x)
        return x

    def before_relu(self, name: str, x: Tensor) -> None:
        """What a layer makes before its ReLU."""

    def finish(self, plan: BlockPlan, z: Tensor, x: Tensor | None, feature: bool) -> Tensor:
        if plan.ese:
            z = z * gate(z, *self._folded.gates[plan.name], self._folded.spec)
        out = z if x is None else z + x
        self._observe(plan.name, out)
        return out

    def pool(self, x: Tensor, mode: Pool) -> Tensor:
        return reference.max_pool(x, mode)

    def run(self, x: Tensor, out_features: tuple[str, ...]) -> list[Tensor]:
        """Features of ``[N, C, H, W]`` images."""
        return walk(self, self._folded.spec, x, out_features)


def conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """``weight`` is ``[C_out, K, K, C_in]``."""
    return F.conv2d(x, weight.permute(0, 3, 1, 2), bias, stride, weight.shape[1] // 2)


def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """``weight`` is ``[3, 3, C]``."""
    kernel = weight.permute(2, 0, 1).unsqueeze(1)
    return F.conv2d(x, kernel, None, stride, 1, groups=x.shape[1])


def gate(z: Tensor, weight: Tensor, bias: Tensor, spec: VoVNetSpec) -> Tensor:
    """``[N, C, 1, 1]`` gates of an eSE."""
    logits = F.linear(z.mean((2, 3)), weight, bias)
    return reference.gate(logits, spec.gate)[:, :, None, None]
