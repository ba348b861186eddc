"""A frozen VoVNet by PyTorch's own convolutions, where no fused backend can run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..compat import zip
from ..network.model import STAGE_NAMES
from ..ops import BlockParams, ConvParams, NetworkParams
from ..specs import FIRST_STAGE

Statistics = tuple[Tensor, Tensor]

NO_EPS = torch.finfo(torch.float32).tiny
"""For a batch norm whose variances are one: rounded away, where torch 2.11 refuses zero."""


def folded_forward(
    x: Tensor, params: NetworkParams, out_features: tuple[str, ...], statistics: Statistics
) -> list[Tensor]:
    """A frozen network by PyTorch's convolutions, with ReLUs in place.

    Args:
        x: ``[N, C, H, W]``, ``channels_last``.
        params: of the network, in the dtype of ``x``. In fp32 and fp64 the scales are not
            looked at: they must be in the weights.
        out_features: names, in network order.
        statistics: zeros and ones, as many as the widest layer has channels: with these
            for mean and variance PyTorch's batch norm applies a scale and a shift, reading
            fp16 or bf16 and computing in fp32, in a single kernel.

    Returns:
        one ``[N, C', H', W']`` tensor a name.
    """
    found = {}
    for name, layer in zip(("stem_1", "stem_2", "stem"), params.stem, strict=True):
        x = _conv_relu(x, layer, statistics)
        if name in out_features:
            found[name] = x
    blocks = list(zip(params.spec.blocks(), params.blocks, strict=True))
    for number, name in enumerate(STAGE_NAMES, start=FIRST_STAGE):
        if len(found) == len(out_features):
            break
        if number >= params.spec.first_pooled_stage:
            x = reference.max_pool(x, params.spec.pool)
        for block in (block for shape, block in blocks if shape.stage == number):
            x = _osa_block(x, block, statistics)
        if name in out_features:
            found[name] = x
    return [found[name] for name in out_features]


def _conv_relu(x: Tensor, layer: ConvParams, statistics: Statistics) -> Tensor:
    stride = layer.stride
    if layer.depthwise is not None:
        spatial = layer.depthwise.permute(2, 0, 1).unsqueeze(1)  # [C, 1, 3, 3]
        x = F.conv2d(x, spatial, None, stride, 1, groups=x.shape[1])
        stride = 1
    weight = layer.weight.permute(0, 3, 1, 2)  # channels_last, as packed.
    folded = layer.shift.dtype == x.dtype
    y = F.conv2d(x, weight, layer.shift if folded else None, stride, weight.shape[2] // 2)
    if not folded:
        mean, var = (statistic[: y.shape[1]] for statistic in statistics)
        y = F.batch_norm(y, mean, var, layer.scale, layer.shift, eps=NO_EPS)
    return y.relu_()


def _osa_block(x: Tensor, block: BlockParams, statistics: Statistics) -> Tensor:
    def layer(params: ConvParams) -> Callable[[Tensor], Tensor]:
        return functools.partial(_conv_relu, layer=params, statistics=statistics)

    def ese(y: Tensor) -> Tensor:
        assert block.fc_weight is not None
        assert block.fc_bias is not None
        return reference.ese(y, block.fc_weight[:, :, None, None], block.fc_bias, block.gate)

    return reference.osa_block(
        x,
        [layer(params) for params in block.layers],
        layer(block.concat),
        reduction=None if block.reduction is None else layer(block.reduction),
        ese=None if block.fc_weight is None else ese,
        identity=block.identity,
    )
