"""Time calls on a device, several in turn, and say how sure their ratio is.

A cold call begins on an idle device whose L2 cache has just been overwritten. On a GPU the time
is between two events around the call: without the wait for it, but with whatever gaps the host
leaves between launches. On a CPU there are no events and no flush.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

Work = Callable[[], Any]

_FLUSH_BYTES = 256 * 2**20  # Several times the largest L2 cache there is.


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
        """Overwrite the L2 cache, and wait until the device is idle."""
        if self._flush is not None:
            self._flush.zero_()
        self.settle()

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
    """Time calls in turn: each round runs every one once, and begins with another one.

    What changes the speed of the whole machine for a while then meets all of them alike, and
    none always follows the same other one.

    Args:
        works: the calls by name.
        rounds: how many, at most.
        watch: times them.
        warm_up: rounds before, which do not count.
        cold: overwrite the L2 cache before every call. Otherwise each measured call follows one
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
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        over = seconds is not None and time.perf_counter() - begin > seconds
        if over and turn >= min(fewest, rounds):
            break
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if cold:
                watch.chill()
            else:
                works[name]()
                watch.settle()
            taken = watch.time(works[name])
            if turn >= 0:
                times[name].append(taken)
            each(name)
    return times


class Interval(NamedTuple):
    """A ratio of two times, and between what it lies."""

    ratio: float
    low: float
    high: float


def ratio_interval(
    baseline: Sequence[float],
    times: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 4000,
) -> Interval:
    """How many times as long the baseline takes, with a bootstrap interval over the pairs.

    The ratio is the median of the pairs' ratios, so that what slows both down does not count.

    Args:
        baseline: seconds of what is compared with; above 1 the other is faster.
        times: seconds of the other, measured in turn with it: equal indices make a pair.
        confidence: of the interval.
        resamples: draws of pairs with replacement, always the same ones.

    Raises:
        ValueError: no pairs, another number of times, or one that is not positive and finite.
    """
    if len(baseline) != len(times) or not times:
        raise ValueError(
            "a ratio needs as many times of one as of the other, measured in turn; got "
            f"{len(baseline)} and {len(times)}"
        )
    pairs = np.array([baseline, times], dtype=float)
    if not (np.isfinite(pairs) & (pairs > 0)).all():
        raise ValueError("times must be positive and finite")
    ratios = pairs[0] / pairs[1]
    draws = np.random.default_rng(0).integers(len(ratios), size=(resamples, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.median(ratios)), float(low), float(high))


def spread(times: Sequence[float], prefix: str = "device_ms") -> dict[str, float]:
    """Median, least and 10th and 90th percentile of seconds, as a row's fields in ms."""
    ms = np.asarray(times, dtype=float) * 1e3
    return {
        prefix: float(np.median(ms)),
        f"{prefix}_min": float(ms.min()),
        f"{prefix}_p10": float(np.quantile(ms, 0.1)),
        f"{prefix}_p90": float(np.quantile(ms, 0.9)),
    }
