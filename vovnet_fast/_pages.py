"""Memory in huge pages, for what is large and read again and again.

A network's packed weights and buffers are tens of megabytes: in pages of 4 KiB the processor looks
up thousands of addresses for each image, which in a virtual machine takes longer than reading what
is there. Where Linux has transparent huge pages for who asks (``madvise``), this asks; elsewhere
memory is what it always is.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

HUGE = 2 << 20
"""Bytes of a huge page."""

_LEAST = 2 * HUGE
"""Bytes of a tensor that is sure to have a whole huge page in it, and mostly has."""

_SLAB = 2 * HUGE
"""Bytes of the memory that small tensors share: the last of them keeps all of it."""

_ALIGNMENT = 64
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The function of the C library, or None."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        function.restype = ctypes.c_int
    return function


def advise(tensor: Tensor) -> Tensor:
    """Ask for huge pages where a dense CPU tensor is, if it is large; returns the tensor.

    What is in it stays. What has been written to already gets them when the system has time.
    """
    size = tensor.numel() * tensor.itemsize
    madvise = _madvise()
    if size >= _LEAST and tensor.device.type == "cpu" and madvise is not None:
        address = tensor.data_ptr()
        first, last = -(-address // HUGE) * HUGE, (address + size) // HUGE * HUGE
        madvise(first, last - first, _MADV_HUGEPAGE)  # A system without them refuses: so be it.
    return tensor


def aligned(size: int) -> Tensor:
    """New memory of ``size`` bytes, uint8, that begins with a huge page if it could fill one."""
    if size < HUGE or _madvise() is None:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    whole = advise(torch.empty(size + HUGE, dtype=torch.uint8, device="cpu"))
    first = -whole.data_ptr() % HUGE
    return whole[first : first + size]


class _Slab:
    """Memory that several tensors share; it lives as long as the last of them."""

    def __init__(self) -> None:
        self._memory, self._used = aligned(_SLAB), 0

    def take(self, size: int) -> Tensor | None:
        end = self._used + -(-size // _ALIGNMENT) * _ALIGNMENT
        if end > _SLAB:
            return None
        part = self._memory[self._used : self._used + size]
        self._used = end
        part._slab = self  # type: ignore[attr-defined]
        return part


_lock = threading.Lock()
_current: weakref.ref[_Slab] | None = None


def together(size: int) -> Tensor:
    """New memory of ``size`` bytes, uint8, side by side with what else was asked for of late.

    Small tensors that are used one after the other, such as a network's packed weights, lie in
    huge pages so, which none of them would fill.
    """
    global _current
    if size > _SLAB // 2 or _madvise() is None:
        return aligned(size)
    with _lock:
        slab = None if _current is None else _current()
        part = None if slab is None else slab.take(size)
        if part is None:
            slab = _Slab()
            part = slab.take(size)
            _current = weakref.ref(slab)
    assert part is not None
    return part


@torch.inference_mode(False)
def kept(tensor: Tensor) -> Tensor:
    """A copy of a contiguous CPU tensor, :func:`together` with others that are kept.

    No op of PyTorch copies it: who watches them would think that something was computed; nor does
    one allocate it there: it is nobody else's.
    """
    size = tensor.numel() * tensor.itemsize
    with _disable_current_modes():
        memory = together(size)
    ctypes.memmove(memory.data_ptr(), tensor.data_ptr(), size)
    found = memory.view(tensor.dtype).view(tensor.shape)
    found._slab = getattr(memory, "_slab", None)  # type: ignore[attr-defined]
    return found
