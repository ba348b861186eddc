"""From layers to the arguments of an op of ``torch.library``, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..compat import zip
from .conv import ConvParams

FlatConvs = tuple[
    list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int], list[float], str
]


def flatten(op: str, layers: list[ConvParams]) -> FlatConvs:
    """Layers as what ``torch.library`` takes: lists of tensors and of numbers.

    The integers are the stride, negative where a depthwise convolution comes first; the
    other numbers are eps, negative where the statistics are fixed.

    Raises:
        ValueError: the layers belong to several process groups.
    """
    groups = {layer.group for layer in layers if layer.eps is not None} or {""}
    if len(groups) > 1:
        raise ValueError(f"{op}: all SyncBN layers must share one process group, got {groups}")
    return (
        [layer.weight for layer in layers],
        [layer.scale for layer in layers],
        [layer.shift for layer in layers],
        [layer.depthwise for layer in layers if layer.depthwise is not None],
        [layer.stride if layer.depthwise is None else -layer.stride for layer in layers],
        [-1.0 if layer.eps is None else layer.eps for layer in layers],
        groups.pop(),
    )


def unflatten(
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    depthwise: list[Tensor],
    strides: list[int],
    epsilons: list[float] | None = None,
    group: str = "",
) -> list[ConvParams]:
    """The inverse of :func:`flatten`. Without ``epsilons`` all statistics are fixed."""
    spatial = iter(depthwise)
    return [
        ConvParams(
            weight,
            scale,
            shift,
            abs(stride),
            next(spatial) if stride < 0 else None,
            None if eps < 0 else eps,
            group,
        )
        for weight, scale, shift, stride, eps in zip(
            weights, scales, shifts, strides, epsilons or [-1.0] * len(strides), strict=True
        )
    ]


def regroup(
    tensors: Sequence[Tensor], strides: list[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The four lists of tensors of :func:`flatten`, from all of them in one row."""
    n = len(strides)
    weights, scales, shifts = (list(tensors[i * n : (i + 1) * n]) for i in range(3))
    return weights, scales, shifts, list(tensors[3 * n :])


def wanted(needs: Sequence[bool], strides: list[int]) -> list[bool]:
    """For each layer, whether any of its tensors needs a gradient, in the order of flatten."""
    n = len(strides)
    found = [any(needs[i : 3 * n : n]) for i in range(n)]
    for i, need in zip([i for i in range(n) if strides[i] < 0], needs[3 * n :], strict=True):
        found[i] = found[i] or need
    return found
