"""A log of the kernels that a process found compiled in Triton's cache, and of those it compiled.

``VOVNET_FAST_COMPILE_LOG=FILE``: each gets a line of JSON there, ``[name, found, seconds]``.
:func:`vovnet_fast.compiling.cache.log` adds them up.
"""

from __future__ import annotations

import json
import os
from typing import Any

ENVIRONMENT = "VOVNET_FAST_COMPILE_LOG"


def start() -> None:
    """Log from now on, if the environment says where."""
    path = os.environ.get(ENVIRONMENT)
    if not path:
        return
    import triton

    if not hasattr(triton, "knobs"):  # Triton 3.3
        raise RuntimeError(f"{ENVIRONMENT}: Triton {triton.__version__} tells nobody; 3.4 does")
    before = triton.knobs.compilation.listener

    def note(*, src: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        line = json.dumps([src.name, cache_hit, times.total / 1e6])
        # In one write, so that processes can share the file.
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        if before is not None:
            before(src=src, times=times, cache_hit=cache_hit, **rest)

    triton.knobs.compilation.listener = note
