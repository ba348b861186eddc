"""The C library's heap while something is timed: what is freed stays, and is given again.

By default glibc returns large blocks to the system when they are freed, or does not, depending on
what else lies on the heap: a network of plain PyTorch, which allocates every activation anew, then
spends some calls on page faults and others not. The depthwise V-19 took 12 or 30 ms for eight
128x128 images so, on two cores of a Zen 5. Kept, as allocators for servers do (jemalloc, tcmalloc),
its times are its best ones, and the same in every process.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1  # As an unsigned number, the largest.


def keep() -> str:
    """Let this process keep what it frees, from now on; says in words what was done.

    Where the C library is not glibc nothing changes. An allocator in its place (``LD_PRELOAD``) is
    not told, and does as it does.
    """
    mallopt = None
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "the system's"
    # Without blocks of their own in the system's memory, large ones lie on the heap as well.
    if mallopt(_M_MMAP_MAX, 0) != 1 or mallopt(_M_TRIM_THRESHOLD, _NEVER) != 1:
        return "the system's"
    return "told to keep what is freed (mallopt)"
