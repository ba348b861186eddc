"""Choices by measurement on a CPU: seconds at first use, remembered like a GPU's."""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import tuning
from .._version import __version__
from .tables import Choice

ROUNDS, MOST_ROUNDS, SECONDS = 2, 8, 1.0
"""In which each candidate has its turn, beside one that warms it up: more of them, up to so many,
while so much time has not passed. The median of the turns counts: a virtual machine's processor is
a third faster for moments, and the least time would be that of who met one."""

_log = logging.getLogger("vovnet_fast.tuning")


def choose(
    problem: str,
    candidates: Sequence[str],
    static: str,
    prepare: Callable[[], Callable[[str], None]],
    *,
    steps: bool = False,
) -> str:
    """The fastest of several ways to solve a problem.

    Args:
        problem: names all that the times depend on, beside the processor and torch's threads.
        candidates: names of the ways; of two that are equally fast the first is taken.
        static: the one to take where nothing is known and nothing may be measured.
        prepare: called once before anything is timed, returns what runs one of them, in a thread
            of its own: modes are the caller's. Context variables, as the backend that was chosen,
            are there.
        steps: each runs a training step, so that it takes long, which is said. They run in the
            caller's thread, and it is theirs to be seen by nobody there: beside a second set of
            OpenMP threads, with a heap that is new, steps took twice as long, and their order was
            another one.

    Returns:
        a name out of ``candidates``, or ``static``.
    """
    if tuning.only_static():
        return static
    table, machine = tuning.table(), processor(torch.get_num_threads())
    known = table.get(machine, problem)
    if known is not None:
        return known if known in candidates else static
    if not tuning.enabled():
        return static
    if steps:
        _announce(len(candidates))
    try:
        run = prepare()
    except Exception as error:  # What cannot be tried can still be run.
        _log.warning("not measured, and %s is taken: %s (%s)", static, error, problem)
        return static
    times = _measure(candidates, run) if steps else _measure_apart(candidates, run)
    if not times:
        return static
    best = min(times, key=lambda name: times[name])
    _log.info("%s: %s, %s", problem, best, {name: f"{t * 1e3:.1f} ms" for name, t in times.items()})
    table.put(machine, problem, Choice(best, times))
    return best


@functools.cache
def _announce(candidates: int) -> None:
    """Say once why the first step is slow."""
    _log.warning(
        "measuring in which way a training step is fastest on this processor: the first step of a "
        "kind takes as long as %d do, or a second, and what is found is remembered in %s "
        "(%s=0 does without)",
        candidates * (ROUNDS + 1) + 1,
        tuning.table().path or "memory",
        tuning.ENVIRONMENT,
    )


def _measure_apart(candidates: Sequence[str], run: Callable[[str], None]) -> dict[str, float]:
    """:func:`_measure` in one thread for all: each has OpenMP threads to start."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        context = contextvars.copy_context()
        return executor.submit(context.run, _measure, candidates, run).result()


def _measure(candidates: Sequence[str], run: Callable[[str], None]) -> dict[str, float]:
    """Median seconds by candidate, of those that run, in turn: what else runs here meets all."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    refused: dict[str, Exception] = {}
    started = time.perf_counter()
    for number in range(MOST_ROUNDS + 1):
        if number > ROUNDS and time.perf_counter() - started > SECONDS:
            break
        for name in candidates:
            if name in refused:
                continue
            begin = time.perf_counter()
            try:
                run(name)
            except Exception as error:  # No reason to stop: it is not taken.
                refused[name] = error
                times.pop(name, None)
                continue
            if number > 0:
                times[name].append(time.perf_counter() - begin)
    for name, reason in refused.items() if times else ():  # The caller meets what all refuse.
        _log.warning("candidate %s does not run and is left out: %s", name, reason)
    return {name: _median(turns) for name, turns in times.items() if turns}


def _median(turns: Sequence[float]) -> float:
    ordered, half = sorted(turns), len(turns) // 2
    return (ordered[half] + ordered[~half]) / 2


@functools.cache
def processor(threads: int) -> str:
    """What a measurement on this machine's processor depends on."""
    isa = os.environ.get("VOVNET_FAST_CPU_ISA") or "any"
    return (
        f"{_model()}, {os.cpu_count()} cores; {threads} threads; instruction set {isa}; "
        f"torch {torch.__version__}; vovnet_fast {__version__}"
    )


def _model() -> str:
    """The processor's name, or the architecture where it has none to tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} {torch.backends.cpu.get_cpu_capability()}"
    except OSError:
        pass
    return platform.processor() or platform.machine()
