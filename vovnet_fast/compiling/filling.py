"""Filling Triton's cache, with a bar; processes that want the same wait for one of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from .._files import locked
from ..kernels._triton import cache_folder
from .jobs import Job, missing
from .workers import Result, compile_all


class Outcome(NamedTuple):
    """What became of jobs. Units: seconds.

    Attributes:
        found: how many were in the cache already.
        compiled: how many were compiled now.
        failed: what could not be made.
        seconds: that all of it took.
    """

    found: int
    compiled: int
    failed: tuple[Result, ...]
    seconds: float

    def __str__(self) -> str:
        text = (
            f"{self.compiled} kernels compiled in {self.seconds:.1f} s, {self.found} were in "
            "the cache"
        )
        if not self.failed:
            return text
        first = self.failed[0]
        return f"{text}, {len(self.failed)} failed, the first of them {first.name}: {first.problem}"


_LOCK_SECONDS = 600.0
"""What fills the cache of a whole network on few cores takes minutes."""


def fill(jobs: Sequence[Job], workers: int, *, progress: bool = False) -> Outcome:
    """Compile what Triton's cache lacks, in so many processes.

    Args:
        jobs: each kernel once.
        workers: processes, at least one.
        progress: show a bar on stderr.

    Raises:
        ValueError, WorkersError: as :func:`.workers.compile_all`.
        OSError: the cache cannot be written.
        TimeoutError: another process has been filling it for ten minutes, or is stopped.
    """
    from rich.console import Console
    from rich.progress import Progress

    begin, folder = time.perf_counter(), cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, _LOCK_SECONDS):  # Whoever waited here may find everything done.
        wanted = missing(jobs, folder)
        results = []
        with Progress(console=Console(stderr=True), disable=not progress or not wanted) as bar:
            task = bar.add_task("vovnet_fast compiles its kernels", total=len(wanted))
            for result in compile_all(wanted, workers):
                results.append(result)
                bar.advance(task, bool(result.key))
    failed = tuple(result for result in results if result.problem)
    compiled = sum(bool(result.key) and not result.problem for result in results)
    return Outcome(len(jobs) - len(wanted), compiled, failed, time.perf_counter() - begin)
