"""Where the time of one OSA block goes, before and after: milliseconds by kind of work.

Before are ATen's operations in eager, after the functions of a backend. Each is timed by itself,
by events around it. On a GPU work is queued ahead of them, so that they are not those of the
host's launches: the parts add up to less than the block takes where it waits for the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vovnet_fast.tools.bench.stopwatch import Stopwatch

ROUNDS = 5
_HEAD_START = 40  # Overwrites of the L2 cache: some milliseconds.


class Spans:
    """Times pieces of work by kind.

    Args:
        watch: of the device.
    """

    def __init__(self, watch: Stopwatch) -> None:
        self._watch, self._cuda = watch, watch.device.type == "cuda"
        self._open: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Time what is inside as a piece of this kind."""
        first = self._now()
        yield
        self._open.append((kind, first, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """Milliseconds by kind since the last time."""
        self._watch.settle()
        found: dict[str, float] = {}
        for kind, first, last in self._open:
            ms = first.elapsed_time(last) if self._cuda else (last - first) * 1e3
            found[kind] = found.get(kind, 0.0) + ms
        self._open.clear()
        return found


class _Aten(TorchDispatchMode):
    """Times every ATen operation that computes something."""

    def __init__(self, spans: Spans) -> None:
        super().__init__()
        self._spans = spans

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(("empty", "new_empty", "detach")):
            return func(*args, **(kwargs or {}))
        with self._spans.span(_kind(name, args)):
            return func(*args, **(kwargs or {}))


_KINDS = {
    "batch_norm": "batch norm",
    "relu": "ReLU",
    "threshold_backward": "ReLU",
    "cat": "cat",
    "slice_backward": "cat",
    "copy": "cat",
    "mean": "eSE pool + FC",
    "avg_pool": "eSE pool + FC",
    "hardtanh": "eSE pool + FC",
}


def _kind(name: str, args: tuple[Any, ...]) -> str:
    if "convolution" in name:
        backward = name.endswith("backward")
        weight = args[2 if backward else 1]
        if (backward and args[1].shape[2:].numel() == 1) or args[0].shape[2:].numel() == 1:
            return "eSE pool + FC"
        return f"conv {weight.shape[2]}x{weight.shape[3]}"
    for part, kind in _KINDS.items():
        if part in name:
            return kind
    return "gate + identity"


_FUNCTIONS = {
    "normalize": "batch norm",
    "depthwise": "depthwise 3x3",
    "depthwise_conv": "depthwise 3x3 and 1x1",
    "depthwise_conv_statistics": "depthwise 3x3 and 1x1",
    "depthwise_input_grad": "depthwise 3x3",
    "depthwise_weight_grad": "depthwise 3x3",
    "gates": "eSE pool + FC",
    "gate_sums": "eSE pool + FC",
    "gates_backward": "eSE pool + FC",
}


class Listening:
    """A backend that works as another one and times its functions."""

    def __init__(self, backend: Any, spans: Spans) -> None:
        self._backend, self._spans = backend, spans

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._backend, name)

        def timed(*args: Any, **options: Any) -> Any:
            kind = _FUNCTIONS.get(name, "gate + identity")
            if name.startswith("conv"):
                weight = args[2] if name == "conv_weight_grad" else args[1]
                kind = f"conv {weight.shape[1]}x{weight.shape[2]}"
            with self._spans.span(kind):
                return function(*args, **options)

        return timed


def of_eager(watch: Stopwatch, work: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds by kind of the ATen operations of a call."""
    spans = Spans(watch)

    def listened() -> None:
        with _Aten(spans):
            work()

    return _medians(watch, spans, listened)


def of_backend(watch: Stopwatch, work: Callable[[Any], Any], backend: Any) -> dict[str, float]:
    """Median milliseconds by kind of a backend's functions, in a call that is given it."""
    spans = Spans(watch)
    return _medians(watch, spans, lambda: work(Listening(backend, spans)))


def _medians(watch: Stopwatch, spans: Spans, work: Callable[[], Any]) -> dict[str, float]:
    rounds = []
    for turn in range(ROUNDS + 1):
        watch.chill()
        if watch.device.type == "cuda":
            head_start(watch)
        work()
        found = spans.take()
        if turn:
            rounds.append(found)
    return {kind: statistics.median(r[kind] for r in rounds) for kind in rounds[0]}


def head_start(watch: Stopwatch) -> None:
    """Give the device something to do, so that the host gets ahead of it."""
    busy = torch.empty(2**28, dtype=torch.uint8, device=watch.device)
    for _ in range(_HEAD_START):
        busy.zero_()
