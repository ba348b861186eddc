"""How the benchmarks time: eager and the other in turn, with a cold cache, by the device's events.

A round runs the baseline and what is measured, one right after the other, each on an idle
device whose L2 cache has just been overwritten; which of them comes first changes from round
to round. A ratio is that of the two times of a round, so that what slows the whole machine
down for a while does not count, and its interval is one of the median over the rounds, of at
least 95 % (:mod:`vovnet_fast.tools.bench.stopwatch`).

pytest-benchmark's own table shows what a caller who waits sees, launches and wait included.
``extra_info["device_ms"]`` is the median between two events around the call: without the wait,
but with whatever gaps the host leaves between launches. On a CPU there are no events and no
flush, and both are the same time; cold is then what the baseline's run leaves of the caches.
Whole networks are timed warm there, each call after one of itself: where a runtime with threads of
its own ran last, the system takes milliseconds to find a core for those of the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vovnet_fast.tools.bench.stopwatch import (
    Interval,
    Stopwatch,
    interleaved,
    ratio_interval,
    spread,
)

__all__ = ["Measured", "Stopwatch", "burst", "measure", "warm_ms"]

ROUNDS = 30
FEWEST = 9
WARM_UP = 2
SECONDS = 2.0
"""For the rounds of a row: no more of them than fit, no fewer than :data:`FEWEST`."""

Work = Callable[[], Any]


class Measured(NamedTuple):
    """Seconds, round by round.

    Attributes:
        times: of what was measured.
        baseline: of eager in the same rounds, empty where there was none.
    """

    times: list[float]
    baseline: list[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times) * 1e3

    @property
    def ratio(self) -> Interval:
        """How many times as long the baseline takes, and between what that lies."""
        return ratio_interval(self.baseline, self.times)


class _Turns:
    """Lets the baseline run once in every round, now before and now after the other.

    Args:
        watch: of the device.
        work: the other.
        baseline: the call, or None.
        warm: each call that is timed follows one of itself.
    """

    def __init__(self, watch: Stopwatch, work: Work, baseline: Work | None, *, warm: bool) -> None:
        self._watch, self._work, self._baseline, self._warm = watch, work, baseline, warm
        self._round, self._owed = 0, False
        self.times: list[float] = []

    def before(self) -> None:
        """What comes ahead of a round of the other; leaves the device idle, and cold or warm."""
        self.settle()
        self._owed = self._round % 2 == 1
        if not self._owed:
            self._run()
        self._round += 1
        self._prepare(self._work)

    def settle(self) -> None:
        """Run what the last round still owes."""
        if self._owed:
            self._owed = False
            self._run()

    def _run(self) -> None:
        if self._baseline is not None:
            self._prepare(self._baseline)
            self.times.append(self._watch.time(self._baseline))

    def _prepare(self, work: Work) -> None:
        if self._warm:
            self._watch.rest()
            work()
            self._watch.settle()
        else:
            self._watch.chill()


def measure(
    benchmark: Any,
    watch: Stopwatch,
    work: Work,
    baseline: Work | None = None,
    *,
    seconds: float = SECONDS,
    fewest: int = FEWEST,
    warm: bool = False,
) -> Measured:
    """Give ``work`` to pytest-benchmark, and its row the times.

    Args:
        benchmark: pytest-benchmark's fixture. Its ``extra_info`` gets ``device_ms`` with spread,
            and, where there is a baseline, ``eager_ms`` and ``ratio_to_eager`` with its interval.
        watch: of the device.
        work: what is measured.
        baseline: what it is compared with, in turn.
        seconds: for the rounds, as a goal.
        fewest: rounds that are done however long they take.
        warm: each call that is timed follows one of itself, not the other's or a cold cache.
    """
    turns, times = _Turns(watch, work, baseline, warm=warm), []
    for _ in range(WARM_UP):
        turns.before()
        begin = time.perf_counter()
        work()
        watch.settle()
        once = time.perf_counter() - begin
    turns.settle()
    once += turns.times[-1] if turns.times else 0.0
    once *= 2 if warm else 1
    rounds = max(fewest, min(ROUNDS, int(seconds / max(once, 1e-9))))
    del turns.times[:]
    benchmark.pedantic(lambda: times.append(watch.time(work)), setup=turns.before, rounds=rounds)
    turns.settle()
    found = Measured(times, turns.times)
    benchmark.extra_info.update(spread(times))
    if baseline is not None:
        eager_ms = statistics.median(found.baseline) * 1e3
        benchmark.extra_info.update(eager_ms=eager_ms, **found.ratio.fields())
    return found


def warm_ms(watch: Stopwatch, work: Work, seconds: float = 0.5) -> float:
    """Median milliseconds of a call that follows one of itself, its data still in the cache."""
    times = interleaved({"it": work}, ROUNDS, watch=watch, cold=False, seconds=seconds)["it"]
    return statistics.median(times) * 1e3


def burst(watch: Stopwatch, work: Work, calls: int = 10, rounds: int = 3) -> float:
    """Seconds a call of several that are queued without a wait between them, at best."""

    def several() -> None:
        for _ in range(calls):
            work()

    several()
    watch.settle()
    return min(watch.time(several) for _ in range(rounds)) / calls
