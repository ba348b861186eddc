"""Building blocks: they hold parameters under their published names, and run ops.

State-dict keys are those of ``vovnet-detectron2``, slashes included
(``stage2.OSA2_1.layers.0.OSA2_1_0/conv.weight``), so that a published file
loads as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import compat, reference
from ..compat import zip
from ..ops import ConvParams
from ..ops.chain import conv_chain
from ..ops.chain import needs as chain_needs
from ..ops.conv import Kinds
from ..specs import Gate
from .decision import compute_dtype, needs_gradient
from .fusing import Fusable, Geometry, Parts, conv_params, update_running_statistics
from .norms import NormCfg, build_norm
from .structure import computed_by
from .telling import told


def _add_conv_norm_relu(
    owner: nn.Module,
    name: str,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    depthwise: bool = False,
    bias: bool = False,
    norm_cfg: NormCfg | None = None,
) -> None:
    """Register the parts of one convolution layer on ``owner`` under their keys."""
    if depthwise:
        dw = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        owner.add_module(f"{name}/dw_conv3x3", dw)
        owner.add_module(f"{name}/pw_conv1x1", nn.Conv2d(in_channels, out_channels, 1, bias=bias))
        owner.add_module(f"{name}/pw_norm", build_norm(norm_cfg, out_channels))
    else:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias
        )
        owner.add_module(f"{name}/conv", conv)
        owner.add_module(f"{name}/norm", build_norm(norm_cfg, out_channels))


def _run_conv_norm_relu(owner: nn.Module, name: str, x: Tensor) -> Tensor:
    """Run the layer ``name`` of ``owner`` on plain PyTorch."""
    parts = Parts.of(owner, name)
    return reference.conv_norm_relu(x, parts.convs(), parts.norm)


@computed_by("name")
class ConvNormReLU(nn.Module):
    """Convolution, normalisation, ReLU, under the keys ``<name>/conv`` and ``<name>/norm``.

    Args:
        name: prefix of the children's names, e.g. ``OSA2_1_0``.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: 3 (padded by one) or 1.
        stride: of the convolution.
        depthwise: a depthwise 3x3 and a 1x1 instead, under ``<name>/dw_conv3x3``,
            ``<name>/pw_conv1x1`` and ``<name>/pw_norm``.
        bias: the convolution (the 1x1 of a depthwise pair) has a bias.
        norm_cfg: see :func:`build_norm`.
    """

    def __init__(self, name: str, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__()
        self.name = name
        _add_conv_norm_relu(self, name, in_channels, out_channels, **options)

    @compat.traced
    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H', W']``."""
        return _run_conv_norm_relu(self, self.name, x)

    def parts(self) -> Parts:
        """Its modules."""
        return Parts.of(self, self.name)


@computed_by()
class Stem(Fusable):
    """Three convolution layers that take an image to stride 4 (2 in the seed dialect).

    Their parts are registered flat, as published: ``stem.stem_1/conv.weight``.

    Args:
        input_ch: channels of the image.
        channels: output channels of the three layers.
        strides: their strides.
        depthwise: layers 2 and 3 are depthwise.
        pointwise_bias: the 1x1 of a depthwise layer has a bias.
        norm_cfg: see :func:`build_norm`.
    """

    def __init__(
        self,
        input_ch: int,
        channels: tuple[int, int, int],
        strides: tuple[int, int, int],
        depthwise: bool,
        pointwise_bias: bool,
        norm_cfg: NormCfg | None,
    ) -> None:
        super().__init__()
        self._geometry: dict[str, Geometry] = {}
        in_channels = input_ch
        for i, (out_channels, stride) in enumerate(zip(channels, strides, strict=True), start=1):
            separable = depthwise and i > 1
            _add_conv_norm_relu(
                self,
                f"stem_{i}",
                in_channels,
                out_channels,
                stride=stride,
                depthwise=separable,
                bias=separable and pointwise_bias,
                norm_cfg=norm_cfg,
            )
            self._geometry[f"stem_{i}"] = Geometry(
                in_channels, out_channels, 3, separable, (stride,)
            )
            in_channels = out_channels

    @compat.traced
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, C, H, W]`` to the outputs of the second and of the third layer."""
        if self.decide(x).op:
            width, apart = told(self)
            layers = list(self.conv_layers().values())
            dtype = compute_dtype(x)
            x = x.to(dtype)
            outs: list[Tensor] = []
            statistics: list[Tensor] = []
            gradient = apart and needs_gradient(self, x)
            for part in (layers[:2], layers[2:]) if gradient else (layers,):
                room = width if part[-1] is layers[-1] else 0
                found, of_norms = conv_chain(x, conv_params(part, dtype), width=room, op="stem")
                x = found[-1]
                outs += found
                statistics += of_norms
            update_running_statistics(layers, statistics)
            return outs[1], outs[2]
        stem_2 = _run_conv_norm_relu(self, "stem_2", _run_conv_norm_relu(self, "stem_1", x))
        return stem_2, _run_conv_norm_relu(self, "stem_3", stem_2)

    def fold(self, dtype: torch.dtype) -> tuple[ConvParams, ...]:
        """Parameters of the ops for activations of ``dtype``, fixed norms folded."""
        return tuple(conv_params(list(self.conv_layers().values()), dtype))

    def conv_layers(self) -> dict[str, Parts]:
        """See :class:`Fusable`."""
        return {name: Parts.of(self, name) for name in self._geometry}

    def why_other_layers(self) -> str | None:
        """See :class:`Fusable`."""
        for name, layer in self._geometry.items():
            reason = layer.why_other(self, name)
            if reason is not None:
                return reason
        return None

    def needs(self, kinds: Kinds, *, backward: bool) -> tuple[str, ...]:
        """See :class:`Fusable`."""
        return chain_needs(kinds, backward=backward)


@computed_by("gate")
class ESE(nn.Module):
    """Effective Squeeze-Excitation (arXiv:1911.06667, section 3.2).

    Args:
        channels: C.
        gate: ``hard_sigmoid`` or ``sigmoid``.
    """

    def __init__(self, channels: int, gate: Gate) -> None:
        super().__init__()
        self.gate: Gate = gate
        # A 1x1 convolution and not nn.Linear: published weights are [C, C, 1, 1].
        self.fc = nn.Conv2d(channels, channels, 1)

    @compat.traced
    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same."""
        # As a module: it may have hooks, or something else may be in its place.
        return x * reference.gate(self.fc(F.adaptive_avg_pool2d(x, 1)), self.gate)

    def extra_repr(self) -> str:
        return f"gate={self.gate}"
