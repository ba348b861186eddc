"""What page faults cost: time that the heap takes, and not who runs.

What a training step frees at the end of the heap goes back to the system, and comes again page by
page at the next. How much of it depends on what else a process holds: of one and the same step of
plain modules there were 0 or 12,000 faults, a fifth of its time.
"""

from __future__ import annotations

import functools
import time
from types import ModuleType

import torch

_BYTES, _TIMES = 16 << 20, 3


@functools.cache
def counter() -> ModuleType | None:
    """Who counts page faults, imported when they are first asked for; nobody on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource


def count() -> int:
    """Page faults of this process so far that no disk was read for; 0 where nobody counts."""
    found = counter()
    return 0 if found is None else found.getrusage(found.RUSAGE_SELF).ru_minflt


@functools.cache
def seconds() -> float:
    """Of one, as torch's threads meet it: of fresh memory that is written, less that of old."""
    import mmap

    found = []
    for _ in range(_TIMES):
        # A default device, or whatever else is the caller's, is not asked.
        with mmap.mmap(-1, _BYTES) as memory, torch._C.DisableTorchFunction():
            numbers = torch.frombuffer(memory, dtype=torch.float32)
            before, begin = count(), time.perf_counter()
            numbers.fill_(1)
            fresh, faults = time.perf_counter() - begin, count() - before
            begin = time.perf_counter()
            numbers.fill_(1)
            old = time.perf_counter() - begin
            del numbers  # Memory that is seen is not given back.
        found.append(max(0.0, fresh - old) / max(1, faults))
    return sorted(found)[_TIMES // 2]
