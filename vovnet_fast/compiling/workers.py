"""Processes that compile side by side, beside the one that asks.

The asking process starts one fresh interpreter (:mod:`.._processes`), which imports Triton once and
forks as often as there are workers.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .. import _processes
from ..kernels._compile_log import ENVIRONMENT as LOG_ENVIRONMENT
from ..kernels._triton import AHEAD, cache_folder
from . import launchers
from .jobs import Job

ENVIRONMENT = "VOVNET_FAST_COMPILE_WORKERS"
"""How many processes compile at first use; 0 for none."""

_SHOWN = 2000  # Characters of what a process printed, in a message.


class Result(NamedTuple):
    """What became of one job. Units: seconds.

    Attributes:
        key, name: as in :class:`.jobs.Job`; of a launcher, its name alone.
        seconds: that it took.
        problem: why there is no kernel, or nothing.
    """

    key: str
    name: str
    seconds: float
    problem: str = ""


class WorkersError(RuntimeError):
    """The processes could not be started, or ended early."""


def count() -> int:
    """How many processes compile: ``VOVNET_FAST_COMPILE_WORKERS``, or as many as there are cores.

    None before Triton 3.6, whose cache's names they know, nor where processes are not forked, as on
    Windows: a kernel is compiled when it is met.

    Raises:
        ValueError: the variable is no number from 0 on.
    """
    given = os.environ.get(ENVIRONMENT)
    possible = AHEAD and hasattr(os, "fork")
    if given is None:
        if not possible:
            return 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cores or 1
    if not given.isdecimal():
        raise ValueError(f"{ENVIRONMENT} must be a number of processes, 0 for none, got {given!r}")
    return int(given) if possible else 0


def compile_all(jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Compile into Triton's cache, in so many processes; a result for each job, as they come.

    Modules of C that Triton compiles when it first launches a kernel are made as well, and
    have results without a key.

    Raises:
        ValueError: no worker.
        WorkersError: the processes could not be started, or ended early. Results that came
            before hold.
    """
    if workers < 1:
        raise ValueError(f"at least one worker is needed, got {workers}")
    if not jobs:
        return
    with tempfile.TemporaryFile() as printed, _started(printed) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        missing = len(jobs)
        try:
            with process.stdin:
                pickle.dump((list(jobs), min(workers, len(jobs))), process.stdin)
            for line in process.stdout:
                result = Result(*json.loads(line))
                missing -= bool(result.key)
                yield result
        except BrokenPipeError:
            pass  # It has ended: said below.
        if missing or process.wait() != 0:
            printed.seek(0)
            text = printed.read().decode(errors="replace").strip()[-_SHOWN:]
            raise WorkersError(
                f"the process that compiles ended early, status {process.wait()}: {text}"
            )


@contextlib.contextmanager
def _started(printed: Any) -> Iterator[subprocess.Popen]:
    """A fresh interpreter in :func:`serve`, which ends with the ``with`` statement."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(cache_folder()),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("TRITON_INTERPRET", LOG_ENVIRONMENT):  # What is logged are surprises.
        environment.pop(name, None)
    try:
        process = subprocess.Popen(
            _processes.command(__name__, "serve"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            env=environment,
        )
    except OSError as error:
        raise WorkersError(f"no process could be started: {error}") from error
    try:
        yield process
    finally:
        process.kill()  # Its children follow.
        with contextlib.suppress(BrokenPipeError):  # What it has not read.
            process.__exit__(None, None, None)


# --------------------------------------------------------------------------------------
# In the process that compiles
# --------------------------------------------------------------------------------------


def serve() -> None:
    """Read jobs from stdin, and write a line for each result to stdout."""
    _processes.begin()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Compilers print.
    jobs, workers = pickle.load(sys.stdin.buffer)
    for result in _results(jobs, workers):
        answers.write(json.dumps(result) + "\n")
        answers.flush()


def _results(jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Of kernels, and of the modules that launch them, each once."""
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_processes.end_with_parent
    ) as pool:
        launching = {launchers.utilities()}
        pending = {pool.submit(_module, *module) for module in launching}
        pending |= {pool.submit(_compile, job) for job in jobs}
        while pending:
            done, pending = concurrent.futures.wait(
                pending, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                result, module = future.result()
                yield result
                if module is not None and module not in launching:
                    launching.add(module)
                    pending.add(pool.submit(_module, *module))


def _timed(key: str, name: str, work: Callable[[], Any]) -> tuple[Result, Any]:
    begin = time.perf_counter()
    try:
        found, problem = work(), ""
    except Exception as error:  # Of one kernel: the others are worth having.
        found, problem = None, f"{type(error).__name__}: {error}"
    return Result(key, name, time.perf_counter() - begin, problem), found


def _compile(job: Job) -> tuple[Result, launchers.Module | None]:
    return _timed(job.key, job.name, lambda: launchers.of(job.compile()))


def _module(name: str, source: str) -> tuple[Result, launchers.Module | None]:
    return _timed("", name, lambda: launchers.build(launchers.Module(name, source)))
