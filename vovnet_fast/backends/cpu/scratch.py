"""Memory that a call of the ``cpu`` backend fills, reads and forgets: a thread's own, used again.

A step of training packs every weight twice, and has the sums of its gradient before these lie as
the weight does: for V-39 that is 300 MB, of which a layer needs 9 at most. In memory that is new to
each layer they would be written to main memory and read from there; in that of the layer before
they mostly stay in a cache.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ... import _pages as pages

MOST = 16 << 20
"""Bytes that a thread keeps of a role; what is larger gets memory of its own."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.by_role: dict[str, Tensor] = {}


_kept = _Kept()


@torch.inference_mode(False)
def lend(role: str, size: int) -> Tensor:
    """Memory of ``size`` bytes, uint8, aligned to 64 bytes, with anything in it.

    It is the same memory at the next call of the thread with this role, which must find nobody
    who still needs it: it is not for what is returned, kept, or recorded.
    """
    if size > MOST:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    found = _kept.by_role.get(role)
    if found is None or len(found) < size:
        _kept.by_role.pop(role, None)  # Given back before more is taken.
        found = _kept.by_role[role] = pages.aligned(size)
    return found[:size]
