"""Slot 0 without a copy, across autograd Functions.

In training every OSA block is a Function of its own, and yet its input can be where it
is needed: its producer allocates the block's whole concat buffer, fills slot 0, and
returns that slot as an ordinary tensor. The block then takes the room around the slot.
Only one taker gets it: whoever comes later, with a tensor of any other origin, or
inside torch.compile, which does not track such things, copies.
"""

from __future__ import annotations

import threading

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_lock = threading.Lock()
_free: set[StorageWeakRef] = set()


def new(like: Tensor, n: int, h: int, w: int, c: int, width: int) -> Tensor:
    """An uninitialised ``[N, H, W, C]`` tensor, slot 0 of a buffer of ``width`` channels."""
    buffer = like.new_empty(n, h, w, width)
    if width > c:
        with _lock:
            _free.difference_update([room for room in _free if room.expired()])
            _free.add(StorageWeakRef(buffer.untyped_storage()))
    return buffer[..., :c]


def take(x: Tensor, width: int) -> Tensor | None:
    """The buffer of ``width`` channels around ``x`` of ``[N, H, W, C]``, if it is there to take.

    The buffer has a version counter of its own: what is written around ``x`` does not
    make ``x`` look modified to autograd.
    """
    n, h, w, _ = x.shape
    shape, strides = (n, h, w, width), (h * w * width, w * width, width, 1)
    storage = x.untyped_storage()
    fits = x.storage_offset() == 0 and x.stride() == strides
    if not fits or storage.nbytes() != n * h * w * width * x.itemsize:
        return None
    room = StorageWeakRef(storage)
    with _lock:
        if room not in _free:
            return None
        _free.remove(room)
    return x.new_empty(0).set_(storage, 0, shape, strides)


def owned(x: Tensor) -> Tensor:
    """The same memory, and to autograd no view: its user may modify it in place."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
