"""Time calls on a device, several in turn, and say how sure their ratio is.

A cold call begins on an idle device whose L2 cache has just been overwritten. On a GPU the time
is between two events around the call: without the wait for it, but with whatever gaps the host
leaves between launches. On a CPU there are no events and no flush, but a call waits as well:
threads of ONNX Runtime, OpenVINO and OpenMP spin for milliseconds after a call, and who came next
took up to three times as long on the cores that were left (two of a Zen 4).
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

Work = Callable[[], Any]

_FLUSH_BYTES = 256 * 2**20  # Several times the largest L2 cache there is.

_NAP, _MOST_NAPS = 0.002, 50
"""Seconds in which a process that is idle uses next to none of its own, and how often they are
waited for: some threads never rest."""


class Stopwatch:
    """Times calls on one device.

    Args:
        device: a CUDA device or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def settle(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def chill(self) -> None:
        """Overwrite the L2 cache of a GPU, and wait until the device is idle."""
        if self._flush is not None:
            self._flush.zero_()
        self.settle()
        self.rest()

    def rest(self) -> None:
        """On a CPU, wait until no thread of this process works, or spins while it waits."""
        for _ in range(_MOST_NAPS if self.device.type == "cpu" else 0):
            begin = time.process_time()
            time.sleep(_NAP)
            if time.process_time() - begin < _NAP / 4:
                return

    def time(self, work: Work) -> float:
        """Run ``work`` and wait for it; returns seconds."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def median(self, work: Work, rounds: int = 5, warm_up: int = 2, *, cold: bool = True) -> float:
        """Median seconds of a few rounds of one call."""
        return statistics.median(
            interleaved({"it": work}, rounds, watch=self, warm_up=warm_up, cold=cold)["it"]
        )


def interleaved(
    works: Mapping[str, Work],
    rounds: int,
    *,
    watch: Stopwatch,
    warm_up: int = 2,
    cold: bool = True,
    seconds: float | None = None,
    fewest: int = 5,
    each: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Time calls in turn: each round runs every one once, begins with another one, and is shuffled.

    What changes the speed of the whole machine for a while then meets all of them alike, and
    none always follows the same other one, with what that leaves in caches.

    Args:
        works: the calls by name.
        rounds: how many, at most.
        watch: times them.
        warm_up: rounds before, which do not count.
        cold: :meth:`Stopwatch.chill` before every call. Otherwise each measured call follows one
            of itself, which leaves its own data in the cache.
        seconds: begin no further round after so many, warm-up included.
        fewest: rounds that are done even so.
        each: is told whose call has just ended, those of the warm-up too.

    Returns:
        seconds by name, in the order of the rounds: the times at one index are neighbours.

    Raises:
        ValueError: no call, or less than one round.
    """
    if not works or min(rounds, fewest) < 1:
        raise ValueError(
            f"measuring needs a call and a round, got {len(works)} calls, {rounds} rounds "
            f"and {fewest} of them at least"
        )
    begin = time.perf_counter()
    names, chance = list(works), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        over = seconds is not None and time.perf_counter() - begin > seconds
        if over and turn >= min(fewest, rounds):
            break
        start = turn % len(names)
        others = names[:start] + names[start + 1 :]
        for name in (names[start], *chance.sample(others, len(others))):
            if cold:
                watch.chill()
            else:
                watch.rest()
                works[name]()
                watch.settle()
            taken = watch.time(works[name])
            if turn >= 0:
                times[name].append(taken)
            each(name)
    return times


CONFIDENCE = 0.95
"""Of an interval, wherever there are enough pairs for it, which takes six."""


class Interval(NamedTuple):
    """A ratio of two times, and between what it lies.

    Attributes:
        ratio: one time over the other.
        low, high: the ends.
        confidence: the share of such intervals that hold the truth, as a lower bound; None where
            that is not known.
    """

    ratio: float
    low: float
    high: float
    confidence: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Interval:
        """Of a row with :meth:`fields`."""
        ratio, low, high = (row[f"ratio_{name}"] for name in ("to_eager", "low", "high"))
        return cls(ratio, low, high, row.get("ratio_confidence"))

    def doubt(self, promised: float = CONFIDENCE) -> str:
        """``, 93 %`` where the confidence is less than promised, and nothing elsewhere."""
        sure = 1.0 if self.confidence is None else self.confidence
        return f", {math.floor(100 * sure)} %" if sure < promised else ""

    def text(self, promised: float = CONFIDENCE) -> str:
        """``1.25 (1.20 to 1.31)``, within the brackets :meth:`doubt`."""
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f}{self.doubt(promised)})"

    def fields(self) -> dict[str, float]:
        """As a row has them, where the ratio is eager's time over the row's."""
        found = dict(ratio_to_eager=self.ratio, ratio_low=self.low, ratio_high=self.high)
        return found if self.confidence is None else found | {"ratio_confidence": self.confidence}


def ratio_interval(
    baseline: Sequence[float], times: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval:
    """How many times as long the baseline takes, with an interval over the pairs.

    The ratio is the median of the pairs' ratios, so that what slows both down does not count. The
    interval lies between two of the sorted ratios, the k-th from either end. It misses the true
    median only if fewer than k pairs fall on one side of that, which is as likely as fewer than k
    heads in as many tosses of a coin: for any number of pairs, and however the ratios are
    distributed. Between neighbouring ratios nothing is interpolated, as Hettmansperger and
    Sheather (1986) do: with 7 pairs of skewed ratios that covers 94 %.

    Args:
        baseline: seconds of what is compared with; above 1 the other is faster.
        times: seconds of the other, measured in turn with it: equal indices make a pair.
        confidence: of the interval, at least. Where the pairs are too few for it, the interval
            reaches from the least ratio to the greatest, and says how little that is.

    Raises:
        ValueError: no pairs, another number of times, or one that is not positive and finite; a
            confidence that is not between 0 and 1.
    """
    if len(baseline) != len(times) or not times:
        raise ValueError(
            "a ratio needs as many times of one as of the other, measured in turn; got "
            f"{len(baseline)} and {len(times)}"
        )
    pairs = np.array([baseline, times], dtype=float)
    if not (np.isfinite(pairs) & (pairs > 0)).all():
        raise ValueError("times must be positive and finite")
    return median_interval((pairs[0] / pairs[1]).tolist(), confidence=confidence)


def median_interval(ratios: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The median of ratios that were found independently, with :func:`ratio_interval`'s interval.

    Raises:
        ValueError: no ratios, or a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if not ratios:
        raise ValueError("an interval needs a ratio, got none")
    found = sorted(ratios)
    rank, reached = _rank(len(found), confidence)
    return Interval(statistics.median(found), found[rank - 1], found[-rank], reached)


@functools.cache
def _rank(pairs: int, confidence: float) -> tuple[int, float]:
    """The highest rank whose interval is sure enough, or 1; and how sure the interval is."""
    rank, below = 1, 1  # ``below``: outcomes, of 2**pairs, with fewer than ``rank`` on one side.
    while rank < pairs // 2:
        more = below + math.comb(pairs, rank)
        if 1 - 2 * more / 2**pairs < confidence:
            break
        rank, below = rank + 1, more
    return rank, 1 - 2 * below / 2**pairs


def spread(times: Sequence[float], prefix: str = "device_ms") -> dict[str, float]:
    """Median, least and 10th and 90th percentile of seconds, as a row's fields in ms."""
    ms = np.asarray(times, dtype=float) * 1e3
    return {
        prefix: float(np.median(ms)),
        f"{prefix}_min": float(ms.min()),
        f"{prefix}_p10": float(np.quantile(ms, 0.1)),
        f"{prefix}_p90": float(np.quantile(ms, 0.9)),
    }
