"""Memory that a call of the ``cpu`` backend fills, reads and forgets: a thread's own, used again.

A step of training packs every weight twice, and has the sums of its gradient before these lie as
the weight does: for V-39 that is 300 MB, of which a layer needs 9 at most. In memory that is new to
each layer they would be written to main memory and read from there; in that of the layer before
they mostly stay in a cache.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ... import _pages as pages

MOST = 16 << 20
"""Bytes that a thread keeps of a role; what is larger gets memory of its own."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.by_role: dict[str, tuple[int, Tensor]] = {}
        self.lends = True


_kept = _Kept()


@contextlib.contextmanager
def none_lent() -> Iterator[None]:
    """Inside, all memory that is asked for is new: calls are being recorded."""
    before, _kept.lends = _kept.lends, False
    try:
        yield
    finally:
        _kept.lends = before


def lend(role: str, size: int) -> Tensor:
    """Memory of ``size`` bytes, uint8, aligned to 64 bytes, with anything in it.

    It is the same memory at the next call of the thread with this role, which must find nobody
    who still needs it: it is not for what is returned or kept.
    """
    if not _kept.lends:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    found = _kept.by_role.get(role)
    if found is not None and size <= found[0]:  # Hundreds of times in a step.
        return found[1][:size]
    with torch.inference_mode(False):
        if size > MOST:
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        _kept.by_role.pop(role, None)  # Given back before more is taken.
        memory = pages.aligned(size)
    _kept.by_role[role] = size, memory
    return memory
