"""Where the tensors of a network come from: new memory, or an arena planned beforehand.

Liveness in a VoVNet is simple. The image goes through a chain of tensors (stem layers,
concat buffers, stages' outputs), each of which is read only until the next one is filled:
two slabs that take turns hold them all. Beside the chain there are a few tensors that live
between two convolutions: one slab a role. What is returned is never part of an arena.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from .. import _pages as pages


def copy(backend: ModuleType, x: Tensor, out: Tensor) -> None:
    """out = x, ``[N, H, W, C]`` views of one dtype, by a backend that copies, or by PyTorch."""
    if hasattr(backend, "copy") and x.numel():
        backend.copy(x, out)
    else:
        out.copy_(x)


class Memory:
    """New memory for every tensor. All shapes are ``[N, H, W, C]``."""

    def begin(self) -> None:
        """The next chained tensor is the first of a network."""

    def feature(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor that is returned: the caller's own."""
        return like.new_empty(shape)

    def chained(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor that is dead once the next chained one, or a feature, has been filled."""
        return like.new_empty(shape)

    def scratch(self, role: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor that is dead when the next one of its role is asked for."""
        return like.new_empty(shape)


class _Slabs(Memory):
    """The chain as scratch of two roles that take turns."""

    _turn = 0

    def begin(self) -> None:
        self._turn = 0

    def feature(self, like: Tensor, *shape: int) -> Tensor:
        self._turn = 0  # Whoever fills a feature is the last reader of the chain so far.
        return super().feature(like, *shape)

    def chained(self, like: Tensor, *shape: int) -> Tensor:
        role, self._turn = f"chained_{self._turn}", 1 - self._turn
        return self.scratch(role, like, *shape)


class Plan(_Slabs):
    """Finds what an arena needs: run a network on meta tensors with it.

    Attributes:
        sizes: elements that each role needs.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def scratch(self, role: str, like: Tensor, *shape: int) -> Tensor:
        self.sizes[role] = max(self.sizes.get(role, 0), math.prod(shape))
        return like.new_empty(shape)


class Arena(_Slabs):
    """Memory that is allocated once, and reused within a call and by the next one.

    For one call at a time. A call that did not return features leaves it unusable.

    Args:
        sizes: elements that each role needs, from a :class:`Plan` of the same shapes.
        dtype: of the activations.
        device: of the activations.
    """

    def __init__(self, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
        # A tensor made in inference mode could not be written outside it, by later calls.
        with torch.inference_mode(False):
            self._slabs = {role: _slab(size, dtype, device) for role, size in sizes.items()}

    def scratch(self, role: str, like: Tensor, *shape: int) -> Tensor:
        return self._slabs[role][: math.prod(shape)].view(shape)


def _slab(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return pages.aligned(size * dtype.itemsize).view(dtype)
    return torch.empty(size, dtype=dtype, device=device)
