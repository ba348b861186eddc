"""The eager path: plain PyTorch, short, and the ground truth of every test.

Whatever a fused kernel computes is compared with these functions in fp64.
They work on any device, dtype and memory layout that PyTorch supports, and
they are differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specs import Gate, Pool


def conv_norm_relu(x: Tensor, convs: Sequence[nn.Conv2d], norm: nn.Module) -> Tensor:
    """Convolution(s), normalisation, ReLU.

    Args:
        x: ``[N, C_in, H, W]``.
        convs: one convolution, or a depthwise 3x3 followed by a 1x1.
        norm: normalisation over the C_out channels.

    Returns:
        ``[N, C_out, H', W']``, non-negative or NaN.
    """
    for conv in convs:
        x = conv(x)
    return F.relu(norm(x))


def gate(z: Tensor, kind: Gate) -> Tensor:
    """relu6(z + 3) / 6 for ``hard_sigmoid``, or the logistic ``sigmoid``."""
    return F.relu6(z + 3.0) / 6.0 if kind == "hard_sigmoid" else torch.sigmoid(z)


def ese(x: Tensor, weight: Tensor, bias: Tensor, kind: Gate = "hard_sigmoid") -> Tensor:
    """Effective Squeeze-Excitation: x * gate(fc(global_average_pool(x))).

    CenterMask (arXiv:1911.06667), section 3.2 and eq. 3: one fully connected
    layer without channel reduction.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, C, 1, 1]``, the fully connected layer as a 1x1 convolution.
        bias: ``[C]``.
        kind: of the gate, see :func:`gate`.

    Returns:
        ``[N, C, H, W]``.
    """
    z = F.conv2d(F.adaptive_avg_pool2d(x, 1), weight, bias)  # [N, C, 1, 1]
    return x * gate(z, kind)


def max_pool(x: Tensor, mode: Pool = "ceil") -> Tensor:
    """3x3 max pool, stride 2.

    Args:
        x: ``[N, C, H, W]``.
        mode: ``ceil`` rounds the output size up and pads nothing; ``padded``
            pads every side by one.

    Returns:
        ``[N, C, H', W']`` with H' = ceil((H - 3) / 2) + 1 for ``ceil`` (where
        the last window must start inside the input) and (H - 1) // 2 + 1 for
        ``padded``.
    """
    if mode == "ceil":
        return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def osa_block(
    x: Tensor,
    layers: Sequence[Callable[[Tensor], Tensor]],
    concat: Callable[[Tensor], Tensor],
    *,
    reduction: Callable[[Tensor], Tensor] | None = None,
    ese: Callable[[Tensor], Tensor] | None = None,
    identity: bool = False,
) -> Tensor:
    """One-Shot Aggregation: chain the layers, concatenate once, mix by a 1x1.

    VoVNet (arXiv:1904.09730), figure 1b; the gate and the identity add are
    VoVNetV2's (arXiv:1911.06667, figure 3).

    Args:
        x: ``[N, C_in, H, W]``.
        layers: the L chained layers, each to C_mid channels.
        concat: the 1x1 layer from C_in + L * C_mid to C_out channels.
        reduction: a 1x1 layer from C_in to C_mid before the first layer. The
            concat still takes ``x`` itself.
        ese: the gate on the aggregated features.
        identity: add ``x``; needs C_in == C_out.

    Returns:
        ``[N, C_out, H, W]``.
    """
    slots = [x]
    y = x if reduction is None else reduction(x)
    for layer in layers:
        y = layer(y)
        slots.append(y)
    y = concat(torch.cat(slots, dim=1))
    if ese is not None:
        y = ese(y)
    return y + x if identity else y
