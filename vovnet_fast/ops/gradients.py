"""Gradients of layers in a row, each as the tensor that it belongs to lies in memory.

Autograd takes them as they are then. Those of a parameter in another layout it would copy once
more, which for the weights of a deep network takes as long as a tenth of a step on small images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compat import zip
from .conv import ConvGrads


def flatten(
    grads: Sequence[ConvGrads | None], tensors: Sequence[Tensor], strides: list[int]
) -> list[Tensor | None]:
    """Gradients in the order of :func:`.flattening.flatten`, each as :func:`new` has it."""
    found: list[Tensor | None] = []
    for name in ("weight", "scale", "shift"):
        found += [None if g is None else getattr(g, name) for g in grads]
    found += [
        None if g is None else g.depthwise for g, s in zip(grads, strides, strict=True) if s < 0
    ]
    return [None if g is None else _as(t, g) for g, t in zip(found, tensors, strict=True)]


def new(tensor: Tensor) -> Tensor:
    """Memory for the gradient of a tensor: of its dtype, and, of a weight of full convolutions, of
    its strides where these leave no gaps; contiguous of anything else, which is small."""
    format = torch.preserve_format if tensor.ndim == 4 else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=format)


def _as(tensor: Tensor, g: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return g.to(tensor.dtype).contiguous()
    if g.dtype == tensor.dtype and _lie_alike(g, tensor):
        return g
    found = new(tensor)
    return g if g.dtype == tensor.dtype and _lie_alike(g, found) else found.copy_(g)


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    return all(
        size == 1 or step == other
        for size, step, other in zip(x.shape, x.stride(), y.stride(), strict=True)
    )
