"""Choices by measurement: which engine and which tiles are fastest for a layer, remembered.

A choice is made once for a problem (an op, its shapes and its dtype) on a machine (the
device, its driver and the versions of what compiles for it), and kept in a file:

* ``VOVNET_FAST_TUNE=0`` measures nothing and takes what is known, or a static choice.
* ``VOVNET_FAST_CACHE`` is the folder of the file, by default ``~/.cache/vovnet_fast``.

Nothing is measured while a CUDA graph is being captured: a measurement synchronises,
which would break the capture.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ._files import replacing

ENVIRONMENT = "VOVNET_FAST_TUNE"
CACHE_ENVIRONMENT = "VOVNET_FAST_CACHE"
FORMAT = 1

_log = logging.getLogger("vovnet_fast.tuning")

Timer = Callable[[Callable[[], None]], float]
"""Takes what to run, returns seconds."""


def enabled() -> bool:
    """Whether unknown problems are measured.

    Raises:
        ValueError: ``VOVNET_FAST_TUNE`` is neither 0 nor 1.
    """
    value = os.environ.get(ENVIRONMENT, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1, got {value!r}")
    return value == "1"


def cache_file() -> Path:
    """Where choices are kept."""
    folder = os.environ.get(CACHE_ENVIRONMENT)
    base = Path(folder) if folder else Path.home() / ".cache" / "vovnet_fast"
    return base / "tuning.json"


@functools.cache
def machine(device: torch.device) -> str:
    """What a measurement depends on besides the problem."""
    if device.type != "cuda":
        return f"{device.type}; torch {torch.__version__}"
    import triton

    properties = torch.cuda.get_device_properties(device)
    return "; ".join(
        (
            f"{properties.name} sm_{properties.major}{properties.minor}",
            f"driver {_driver_version()}",
            f"torch {torch.__version__}",
            f"triton {triton.__version__}",
            f"cudnn {torch.backends.cudnn.version()}",
        )
    )


def _driver_version() -> str:
    """Of the NVIDIA driver, as the kernel module says; the CUDA version elsewhere."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        words = text.split("Kernel Module", 1)[-1].split()
        numbers = [w for w in words if w[0].isdigit() and "." in w]
        if numbers:
            return numbers[0]
    return f"for CUDA {torch.version.cuda}"


class Table:
    """Choices by machine and problem, in memory and in a file.

    Args:
        path: the file. It is read on first use, and written after each new choice; a
            process that writes at the same time loses nothing but this one choice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._choices: dict[str, dict[str, str]] | None = None

    def get(self, machine: str, problem: str) -> str | None:
        """The choice for a problem, or None."""
        with self._lock:
            return self._loaded().get(machine, {}).get(problem)

    def put(self, machine: str, problem: str, choice: str) -> None:
        """Remember a choice, and write the file."""
        with self._lock:
            self._choices = _merge(read(self.path), self._loaded())
            self._choices.setdefault(machine, {})[problem] = choice
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                export(self._choices, self.path)
            except OSError as error:
                _log.warning("cannot keep tuning choices in %s: %s", self.path, error)

    def choices(self) -> dict[str, dict[str, str]]:
        """A copy of everything known."""
        with self._lock:
            return {machine: dict(found) for machine, found in self._loaded().items()}

    def add(self, choices: dict[str, dict[str, str]]) -> None:
        """Take over choices, a shipped table's say; known ones stay."""
        with self._lock:
            self._choices = _merge(choices, self._loaded())

    def _loaded(self) -> dict[str, dict[str, str]]:
        if self._choices is None:
            self._choices = read(self.path)
        return self._choices


def _merge(
    first: dict[str, dict[str, str]], second: dict[str, dict[str, str]]
) -> dict[str, dict[str, str]]:
    """Both, and the second where both know a problem."""
    merged = {machine: dict(found) for machine, found in first.items()}
    for machine, found in second.items():
        merged.setdefault(machine, {}).update(found)
    return merged


def read(path: Path) -> dict[str, dict[str, str]]:
    """Choices from a file; none, and a warning, where it is damaged or of another format."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        choices: dict[str, dict[str, str]] = content["choices"]
        if not all(isinstance(v, str) for found in choices.values() for v in found.values()):
            raise ValueError("a choice is no text")
        return choices
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("ignoring the tuning file %s: %s", path, error)
        return {}


def export(choices: dict[str, dict[str, str]], path: Path) -> None:
    """Write choices to a file that :func:`read` understands, all of it or nothing.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    with replacing(path) as temporary:
        content = {"format": FORMAT, "choices": choices}
        Path(temporary).write_text(json.dumps(content, indent=1, sort_keys=True))


@functools.cache
def _table(path: Path) -> Table:
    return Table(path)


def table() -> Table:
    """The table of this process."""
    return _table(cache_file())


def may_measure(device: torch.device) -> bool:
    """Whether a measurement is possible on ``device`` just now, and wanted."""
    return enabled() and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def choose(
    device: torch.device,
    problem: str,
    candidates: Sequence[str],
    static: str,
    run: Callable[[str], None],
    timer: Timer | None = None,
) -> str:
    """The fastest of several ways to solve a problem.

    Args:
        device: where it runs.
        problem: names the op, every size and the dtype.
        candidates: names of the ways.
        static: the one to take when nothing is known and nothing may be measured.
        run: runs one of them on the real tensors; any of them leaves the right result.
        timer: measures on the device by default.

    Returns:
        a name out of ``candidates``.
    """
    known = table().get(machine(device), problem)
    if known is not None and known in candidates:
        return known
    if not may_measure(device):
        return static
    times = dict(_measure(candidates, run, timer or _device_timer(device)))
    if not times:
        raise RuntimeError(f"none of the candidates runs for {problem}: {', '.join(candidates)}")
    best = min(times, key=lambda name: times[name])
    _log.info("%s: %s, %.1f us", problem, best, times[best] * 1e6)
    table().put(machine(device), problem, best)
    return best


def _measure(
    candidates: Sequence[str], run: Callable[[str], None], timer: Timer
) -> Iterator[tuple[str, float]]:
    for name in candidates:
        try:
            yield name, timer(lambda name=name: run(name))  # type: ignore[misc]
        except Exception as error:
            # A form that a driver or compiler refuses is no reason to stop: it is slow, not wrong.
            _log.warning("candidate %s does not run and is left out: %s", name, error)


def _device_timer(device: torch.device) -> Timer:
    """Median time of a few runs with a cold L2 cache, by the device's events."""

    def timer(work: Callable[[], None]) -> float:
        with torch.cuda.device(device):
            flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device)
            for _ in range(2):
                work()
            spans = []
            for _ in range(7):
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                work()
                end.record()
                spans.append((begin, end))
            torch.cuda.synchronize(device)
            return statistics.median(b.elapsed_time(e) for b, e in spans) / 1e3

    return timer
