"""Work of the ``cpu`` backend, recorded: its calls of the extension, and the memory they use.

What is asked of the extension is the same for every tensor of a shape, but for addresses: calls
are recorded once (``csrc/cpu/recording.h``), and then made by a single one. That holds for work
which computes by calls of the extension alone; ops of PyTorch may allocate, and make views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...compat import zip
from .. import _extension
from .._extension.fields import pointer
from . import scratch

Result = TypeVar("Result")

_ALLOCATING = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}
"""Ops that compute nothing. Beside them there are only views."""


class Recorded(NamedTuple):
    """What was recorded of some work.

    Attributes:
        calls: the extension's ``Recording``.
        allocated: new tensors that ATen made meanwhile, all of them still there.
        complete: whether all of the work was the extension's: ATen's convolutions, for dtypes or
            processors without an engine, cannot be repeated so.
    """

    calls: Any
    allocated: list[Tensor]
    complete: bool


def record(work: Callable[[], Result], *, packs: bool = False) -> tuple[Result, Recorded]:
    """Do some work, and record it.

    Args:
        work: to do.
        packs: weights are packed again whenever the calls are made, and not for good.
    """
    calls = _extension.load("cpu").Recording(packs)
    with scratch.none_lent(), _Watch() as watch, calls:
        result = work()
    return result, Recorded(calls, watch.allocated, not watch.computed)


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor, and the bytes from there to its end."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return pointer("what a recording moves", tensor), (last + 1) * tensor.itemsize


def overlap(extents: Iterable[tuple[int, int]]) -> bool:
    """Whether any two pieces of memory have bytes in common."""
    end = 0
    for first, size in sorted(extents):
        if size and first < end:
            return True
        end = max(end, first + size)
    return False


class _Watch(TorchDispatchMode):
    """Keeps what ATen allocates, and notes whether it computes.

    Attributes:
        allocated: new tensors.
        computed: whether there was an op that is neither an allocation nor a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATING:
            self.allocated.append(out)
        elif not func.is_view:
            self.computed = True
        return out
