"""Choices by measurement on a CPU: seconds at first use, remembered like a GPU's."""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import logging
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .. import tuning
from .._version import __version__
from ..compat import zip
from . import faults
from .tables import Choice

ROUNDS, MOST_ROUNDS, SECONDS = 2, 8, 1.0
"""In which each candidate has its turn, beside one that warms it up: more of them, up to so many,
while so much time has not passed. The median of the turns counts: a virtual machine's processor is
a third faster for moments, and the least time would be that of who met one."""

LEAST_STEP_ROUNDS, STEP_ROUNDS, STEP_SECONDS = 5, 40, 20.0
"""The same of training steps, between which there is less to choose, and of which more follow. Of
two turns, one that was disturbed makes the median wrong, and of three two that were: steps of more
than a second met both."""

STEP_PATIENCE = 60.0
"""Seconds that these rounds may take for each step to follow one of its own, as in a training: ops
of V-99, that were 15 % faster there, were behind where they followed others."""

HOPELESS = 1.3
"""Who takes so many times as long as the fastest has no further turns once all have had the fewest
of them, and is not taken: there are more rounds for the others."""

MARGIN = 0.95
"""Of the favourite's time: who takes more of it is not taken in its place. Two networks of one
process that run the very same modules differ by so much, for as long as it lives: 0.95 to 1.06 in
nine of ten."""

_log = logging.getLogger("vovnet_fast.tuning")


def choose(
    problem: str,
    candidates: Sequence[str],
    static: str,
    prepare: Callable[[], Callable[[str], None]],
    *,
    steps: bool = False,
    favourite: str | None = None,
    unless: Callable[[], bool] | None = None,
) -> str:
    """The fastest of several ways to solve a problem.

    Args:
        problem: names all that the times depend on, beside the processor and torch's threads.
        candidates: names of the ways; of two that are equally fast the first is taken.
        static: the one to take where nothing is known and nothing may be measured.
        prepare: called once before anything is timed, returns what runs one of them, both in a
            thread of its own: modes are the caller's, who may be recording what he computes.
            Context variables, as the backend that was chosen, are there.
        steps: each runs a training step, so that it takes long, which is said. All of this is in
            the caller's thread, and it is theirs to be seen by nobody there: beside a second set of
            OpenMP threads, with a heap that is new, steps took twice as long, and their order was
            another one.
        favourite: the candidate to take unless another is faster by more than turns differ by
            themselves (:data:`MARGIN`).
        unless: whether nothing may be tried; asked where nothing is known.

    Returns:
        a name out of ``candidates``, or ``static``.
    """
    if tuning.only_static():
        return static
    table, machine = tuning.table(), processor(torch.get_num_threads())
    known = table.get(machine, problem)
    if known is not None:
        return known if known in candidates else static
    if not tuning.enabled() or (unless is not None and unless()):
        return static
    if steps:
        _announce()
    try:
        if steps:
            turns = _measure_steps(candidates, _prepared(prepare))
        else:
            turns = _measure_apart(candidates, prepare)
    except _NotPrepared as error:  # What cannot be tried can still be run.
        _log.warning("not measured, and %s is taken: %s (%s)", static, error.__cause__, problem)
        return static
    if not turns:
        return static
    times = {name: _median(found) for name, found in turns.items()}
    best = _best(turns, favourite)
    _log.info("%s: %s, %s", problem, best, {name: f"{t * 1e3:.1f} ms" for name, t in times.items()})
    table.put(machine, problem, Choice(best, times))
    return best


@functools.cache
def _announce() -> None:
    """Say once why the first step is slow."""
    _log.warning(
        "measuring in which way a training step is fastest on this processor: the first step of a "
        "kind takes as long as 24 to 44 do, or %d seconds, and what is found is remembered in %s "
        "(%s=0 does without)",
        STEP_SECONDS,
        tuning.table().path or "memory",
        tuning.ENVIRONMENT,
    )


def _best(turns: Mapping[str, Sequence[float]], favourite: str | None) -> str:
    """The fastest; against the favourite it is rounds that are compared, what slowed one of which
    down slowed down both. Who was far behind had fewer of them, and does not count any more."""
    most = max(len(found) for found in turns.values())
    turns = {name: found for name, found in turns.items() if len(found) == most}
    if favourite is None or favourite not in turns:
        return min(turns, key=lambda name: _median(turns[name]))
    ratios = {name: _ratio(found, turns[favourite]) for name, found in turns.items()}
    best = min(ratios, key=lambda name: ratios[name])
    return best if ratios[best] < MARGIN else favourite


def _ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Of times to those of the same rounds, in the median."""
    tick = 1e-9
    return _median([(a + tick) / (b + tick) for a, b in zip(times, base, strict=True)])


class _NotPrepared(Exception):
    """Nothing can be tried, because of this exception's cause."""


def _prepared(prepare: Callable[[], Callable[[str], None]]) -> Callable[[str], None]:
    try:
        return prepare()
    except Exception as error:
        raise _NotPrepared from error


def _measure_steps(candidates: Sequence[str], run: Callable[[str], None]) -> dict[str, list[float]]:
    limits = LEAST_STEP_ROUNDS, STEP_ROUNDS, STEP_SECONDS
    return _measure(candidates, run, *limits, after_themselves=STEP_PATIENCE, without_faults=True)


def _measure_apart(
    candidates: Sequence[str], prepare: Callable[[], Callable[[str], None]]
) -> dict[str, list[float]]:
    """:func:`_measure` in one thread for all: each has OpenMP threads to start."""

    def measure() -> dict[str, list[float]]:
        return _measure(candidates, _prepared(prepare), ROUNDS, MOST_ROUNDS, SECONDS)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(contextvars.copy_context().run, measure).result()


def _measure(
    candidates: Sequence[str],
    run: Callable[[str], None],
    least_rounds: int,
    most_rounds: int,
    seconds: float,
    *,
    after_themselves: float = 0.0,
    without_faults: bool = False,
) -> dict[str, list[float]]:
    """Seconds by candidate, of those that run: by rounds, each of which begins with another one and
    is shuffled, so that what else runs here meets all, and none always follows the same other one.

    ``after_themselves``: as steps do where they train, with the memory that the last one has left:
    what counts is the second of two runs, where the fewest rounds take less than so many seconds.
    ``without_faults``: less what page faults cost (:mod:`.faults`), which are the heap's.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    refused: dict[str, Exception] = {}
    names, started, chance = list(candidates), time.perf_counter(), random.Random(0)
    fault = faults.seconds() if without_faults else 0.0
    in_pairs = False
    for number in range(most_rounds + 1):
        passed = time.perf_counter() - started
        if number == 1:
            in_pairs = 2 * least_rounds * passed < after_themselves
        if number > least_rounds:
            if passed > seconds:
                break
            fastest = min(names, key=lambda name: _median(times[name]), default="")
            names = [name for name in names if not _hopeless(times[name], times[fastest])]
        first = max(number - 1, 0) % max(len(names), 1)
        others = names[:first] + names[first + 1 :]
        for name in (*names[first : first + 1], *chance.sample(others, len(others))):
            try:
                if in_pairs:
                    run(name)
                before, begin = faults.count(), time.perf_counter()
                run(name)
            except Exception as error:  # No reason to stop: it is not taken.
                refused[name] = error
                times.pop(name)
                continue
            if number > 0:
                taken = time.perf_counter() - begin
                heap = (faults.count() - before) * fault
                times[name].append(max(taken - heap, taken / 2))
        names = [name for name in names if name not in refused]
    for name, reason in refused.items() if times else ():  # The caller meets what all refuse.
        _log.warning("candidate %s does not run and is left out: %s", name, reason)
    return {name: turns for name, turns in times.items() if turns}


def _hopeless(times: Sequence[float], fastest: Sequence[float]) -> bool:
    """By the medians, and by the rounds: few of either can be wrong."""
    medians = _median(times) > HOPELESS * _median(fastest)
    return medians and _ratio(times, fastest) > HOPELESS


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
