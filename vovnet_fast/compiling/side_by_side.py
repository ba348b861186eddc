"""Compiling what is about to be launched, on all cores.

It is an optimisation: whatever goes wrong is said once, and Triton compiles each kernel when
it meets it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..kernels._common import Launch

FEW = 4
"""So many kernels are compiled as they are met: processes take seconds to start."""

_log = logging.getLogger("vovnet_fast.compiling")


def compile_launches(launches: Iterable[Launch], capability: tuple[int, int]) -> dict[str, str]:
    """Compile the kernels of these launches side by side, unless they are few.

    Args:
        launches: what will be launched.
        capability: compute capability of the GPU.

    Returns:
        those that are compiled now, names by key.

    Raises:
        WorkersError, OSError, ValueError: as :func:`.filling.fill`.
    """
    from ..kernels._triton import cache_folder
    from .filling import fill
    from .jobs import arch_of, compiled, different, missing
    from .workers import count

    jobs = different(launches, arch_of(capability))
    wanted = missing(jobs, cache_folder())
    processes = count()
    if len(wanted) > FEW and processes > 0:
        _log.info("compiling %d kernels in %d processes", len(wanted), processes)
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # One of torchrun's processes shows it.
        outcome = fill(wanted, processes, progress=first)
        if outcome.failed:
            _log.warning("%s", outcome)
    return compiled(jobs)


@functools.cache
def say_once(problem: str) -> None:
    """Once in a process."""
    _log.warning("kernels could not be compiled ahead, and will be one by one: %s", problem)
