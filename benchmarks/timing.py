"""How the benchmarks time: rounds with a cold L2 cache, by the device's own events.

A measured call is begun on an idle device whose L2 cache has just been overwritten, and is
waited for. pytest-benchmark's own table therefore shows what a caller who waits sees, launches
and wait included. ``extra_info["device_ms"]`` is the median between two events around the
call: without the wait, but with whatever gaps the host leaves between launches. On a CPU there
are no events and no flush, and both are the same time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS = 10
WARM_UP = 3
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

    def chill(self) -> None:
        """Overwrite the L2 cache, and wait until the device is idle."""
        if self._flush is not None:
            self._flush.zero_()
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], Any]) -> float:
        """Run ``work`` and wait for it; returns seconds."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def median(self, work: Callable[[], Any], rounds: int = 5, warm_up: int = 2) -> float:
        """Median seconds of a few rounds, outside pytest-benchmark."""
        for _ in range(warm_up):
            work()
        seconds = []
        for _ in range(rounds):
            self.chill()
            seconds.append(self.time(work))
        return statistics.median(seconds)


def measure(
    benchmark: Any,
    watch: Stopwatch,
    work: Callable[[], Any],
    before: Callable[[], None] | None = None,
) -> float:
    """Give ``work`` to pytest-benchmark; returns the median in ms, which extra_info has too.

    ``before`` runs ahead of every round; it should leave the device idle, and its cache cold.
    """
    seconds: list[float] = []
    benchmark.pedantic(
        lambda: seconds.append(watch.time(work)),
        setup=before or watch.chill,
        rounds=ROUNDS,
        warmup_rounds=WARM_UP,
    )
    last = seconds[-ROUNDS:]
    median = statistics.median(last) * 1e3
    benchmark.extra_info.update(device_ms=median, device_ms_min=min(last) * 1e3)
    return median
