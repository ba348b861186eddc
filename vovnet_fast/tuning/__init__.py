"""Choices by measurement: which engine and which tiles are fastest for a layer, remembered.

A choice is made once for a problem (an op, its shapes and its dtype) on a machine (the
device, its driver and the versions of what compiles for it), and kept in a file:

* ``VOVNET_FAST_TUNE=0`` measures nothing and takes what is known, or a static choice. By
  default the likeliest candidates are measured, with ``all`` every one.
* ``VOVNET_FAST_CACHE`` is the folder of the file, by default ``~/.cache/vovnet_fast``.
* ``VOVNET_FAST_TUNING_TABLE`` is another file of the same format, made by
  ``vovnet-fast tuning export``: it is asked for what the first does not know, and never
  written.

Nothing is measured while a CUDA graph is being captured: a measurement synchronises,
which would break the capture. What computes wrong numbers is not timed, however fast.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from .. import _optional
from .tables import Choice, Choices, Table, export, load, merge, read

__all__ = ["Choice", "Choices", "Table", "choose", "export", "load", "merge", "read", "table"]

ENVIRONMENT = "VOVNET_FAST_TUNE"
ALL = "all"
CACHE_ENVIRONMENT = "VOVNET_FAST_CACHE"
TABLE_ENVIRONMENT = "VOVNET_FAST_TUNING_TABLE"

_log = logging.getLogger("vovnet_fast.tuning")

Timer = Callable[[Callable[[], None]], float]
"""Takes what to run, returns seconds."""

Trial = Callable[[str], Optional[str]]
"""Takes a candidate's name, runs it, returns what is wrong with its numbers, or None."""


@dataclass(frozen=True)
class Candidates(Mapping[str, float]):
    """Ways to solve a problem, by name, with the seconds that are predicted for each.

    Attributes:
        predicted: those seconds.
        likely: which of them are worth measuring.
        layer: what it is predicted for, as JSON can hold it.
    """

    predicted: Mapping[str, float]
    likely: tuple[str, ...]
    layer: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.predicted[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.predicted)

    def __len__(self) -> int:
        return len(self.predicted)


_static_only: ContextVar[bool] = ContextVar("static_only", default=False)


class Planning(NamedTuple):
    """For whom choices are made where work is planned, and not done.

    Attributes:
        machine: as :func:`machine` calls the one where it will be done; None if that is not known.
        measured: unknown problems will be measured there.
    """

    machine: str | None = None
    measured: bool = True


_planning: ContextVar[tuple[Planning, set[str]] | None] = ContextVar("planning", default=None)
"""What :func:`planning` was given, and the problems that have been met in it."""


@contextlib.contextmanager
def planning(plan: Planning) -> Iterator[None]:
    """Inside, in this thread, :func:`choose` runs what it would measure elsewhere, and times none.

    On meta tensors the launches can be recorded.
    """
    token = _planning.set((plan, set()))
    try:
        yield
    finally:
        _planning.reset(token)


@contextlib.contextmanager
def static_choices() -> Iterator[None]:
    """Inside, in this thread, every choice is the static one, whatever is known."""
    token = _static_only.set(True)
    try:
        yield
    finally:
        _static_only.reset(token)


def only_static() -> bool:
    """Whether this thread is inside :func:`static_choices`."""
    return _static_only.get()


def tf32_allowed() -> bool:
    """Whether torch lets convolutions of fp32 round their operands to TF32."""
    # Since torch 2.9 each operator says it for itself, and to ask for all may be an error.
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:
        return torch.backends.cudnn.allow_tf32
    return conv.fp32_precision == "tf32"


def _setting() -> str:
    value = os.environ.get(ENVIRONMENT, "1")
    if value not in ("0", "1", ALL):
        raise ValueError(f"{ENVIRONMENT} must be 0, 1 or {ALL}, got {value!r}")
    return value


def enabled() -> bool:
    """Whether unknown problems are measured.

    Raises:
        ValueError: ``VOVNET_FAST_TUNE`` is neither 0 nor 1 nor all.
    """
    return _setting() != "0"


def measured(candidates: Sequence[str] | Candidates) -> list[str]:
    """Which candidates would be measured: the likely ones, or all if all are wanted.

    Raises:
        ValueError: as :func:`enabled`.
    """
    if isinstance(candidates, Candidates) and _setting() != ALL:
        return list(candidates.likely)
    return list(candidates)


def cache_file() -> Path:
    """Where choices are kept.

    Raises:
        OSError: there is no home folder, and the environment names no other.
    """
    folder = os.environ.get(CACHE_ENVIRONMENT)
    if folder:
        return Path(folder) / "tuning.json"
    try:
        home = Path.home()
    except RuntimeError as error:  # Neither HOME nor an entry in the table of passwords.
        raise OSError(f"no home folder to keep a cache in: set {CACHE_ENVIRONMENT}") from error
    return home / ".cache" / "vovnet_fast" / "tuning.json"


@functools.cache
def _say_that_nothing_is_kept(error: str) -> None:
    _log.warning("what is found out is kept in memory alone: %s", error)


def kept_in(name: str) -> Path | None:
    """A file of the cache; None, said once, where there can be none."""
    try:
        return cache_file().with_name(name)
    except OSError as error:
        _say_that_nothing_is_kept(str(error))
        return None


@functools.cache
def machine(device: torch.device) -> str:
    """What a measurement depends on besides the problem."""
    if device.type != "cuda":
        return f"{device.type}; torch {torch.__version__}"
    without = _optional.why_not("triton")
    properties = torch.cuda.get_device_properties(device)
    return "; ".join(
        (
            f"{properties.name} sm_{properties.major}{properties.minor}",
            f"driver {_driver_version()}",
            f"torch {torch.__version__}",
            _triton_version() if without is None else "no triton",
            f"cudnn {torch.backends.cudnn.version()}",
        )
    )


def _triton_version() -> str:
    import triton

    return f"triton {triton.__version__}"


def _driver_version() -> str:
    """Of the NVIDIA driver, as the kernel module says; the CUDA version elsewhere."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        words = text.split("Kernel Module", 1)[-1].split()
        numbers = [w for w in words if w[0].isdigit() and "." in w]
        if numbers:
            return numbers[0]
    return f"for CUDA {torch.version.cuda}"


@functools.cache
def _table(folder: str | None, beneath: str | None) -> Table:
    """By the values of the two environment variables: it is asked for at every launch."""
    path = kept_in("tuning.json")
    if beneath is None:
        return Table(path)
    try:
        return Table(path, load(Path(beneath)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{TABLE_ENVIRONMENT}={beneath} cannot be read: {error}. Name a file that "
            "vovnet-fast tuning export wrote, or unset it"
        ) from error


def table() -> Table:
    """The table of this process.

    Raises:
        ValueError: ``VOVNET_FAST_TUNING_TABLE`` names no table of choices.
    """
    return _table(os.environ.get(CACHE_ENVIRONMENT), os.environ.get(TABLE_ENVIRONMENT) or None)


def may_measure(device: torch.device) -> bool:
    """Whether a measurement is possible on ``device`` just now, and wanted."""
    return enabled() and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


@functools.cache
def _announce() -> None:
    """Say once why the first steps are slow."""
    _log.warning(
        "measuring which engines are fastest for layers not seen before on this machine; this "
        "compiles many kernels, takes minutes, and is remembered in %s (%s=0 does without)",
        table().path or "memory",
        ENVIRONMENT,
    )


def choose(
    device: torch.device,
    problem: str,
    candidates: Sequence[str] | Candidates,
    static: str,
    run: Callable[[str], None],
    timer: Timer | None = None,
    prepare: Callable[[], Trial] | None = None,
) -> str:
    """The fastest of several ways to solve a problem.

    Args:
        device: where it runs.
        problem: names the op, every size and the dtype.
        candidates: names of the ways. With predictions, the likely ones alone are measured.
        static: the one to take when nothing is known and nothing may be measured.
        run: runs one of them on the real tensors; any of them leaves the right result.
        timer: measures on the device by default.
        prepare: called once before anything is timed, makes the trial that a candidate
            must pass to be timed. It must leave the tensors of ``run`` alone.

    Returns:
        a name out of ``candidates``.

    Raises:
        RuntimeError: none of the candidates runs and passes its trial.
    """
    if _static_only.get():
        return static
    rehearsed = _planning.get()
    if rehearsed is not None:
        return _rehearse(*rehearsed, problem, candidates, static, run)
    known = table().get(machine(device), problem)
    if known is not None:  # It may be one that cannot take these very tensors.
        return known if known in candidates else static
    if not may_measure(device):
        return static
    _announce()
    with torch.autocast(device.type, enabled=False):  # It would round what must be exact.
        trial = prepare() if prepare is not None else None
    wanted = measured(candidates)
    times: dict[str, float] = {}
    # The others have their turn where none of the likely ones runs and is right.
    for names in (wanted, [name for name in candidates if name not in wanted]):
        if not times:
            sound = names if trial is None else _sound(device, problem, names, trial)
            times = dict(_measure(sound, run, timer or _device_timer(device)))
    if not times:
        raise RuntimeError(
            f"none of the candidates runs and is right for {problem}: {', '.join(candidates)}; "
            "VOVNET_FAST_BACKEND=reference does without them"
        )
    best = min(times, key=lambda name: times[name])
    _log.info("%s: %s, %.1f us", problem, best, times[best] * 1e6)
    layer = candidates.layer if isinstance(candidates, Candidates) else {}
    table().put(machine(device), problem, Choice(best, times, layer))
    return best


def _rehearse(
    plan: Planning,
    met: set[str],
    problem: str,
    candidates: Sequence[str] | Candidates,
    static: str,
    run: Callable[[str], None],
) -> str:
    """:func:`choose` under :func:`planning`."""
    known = None if plan.machine is None else table().get(plan.machine, problem)
    if known is not None:
        return known if known in candidates else static
    if plan.measured and problem not in met:  # Whatever is measured is remembered.
        met.add(problem)
        for name in measured(candidates):
            run(name)
    return static


def _sound(
    device: torch.device, problem: str, candidates: Sequence[str], trial: Trial
) -> list[str]:
    """The candidates that run and pass their trial."""
    found = []
    for name in candidates:
        try:
            with torch.autocast(device.type, enabled=False):
                wrong = trial(name)
        except Exception as error:
            _leave_out(name, error)
            continue
        if wrong is None:
            found.append(name)
        else:
            _log.warning("candidate %s is wrong and is left out, %s: %s", name, problem, wrong)
    return found


def _leave_out(name: str, error: Exception) -> None:
    # A form that a driver or compiler refuses is no reason to stop: it is slow, not wrong.
    _log.warning("candidate %s does not run and is left out: %s", name, error)


def _measure(
    candidates: Sequence[str], run: Callable[[str], None], timer: Timer
) -> Iterator[tuple[str, float]]:
    for name in candidates:
        try:
            yield name, timer(lambda name=name: run(name))  # type: ignore[misc]
        except Exception as error:
            _leave_out(name, error)


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
            import statistics  # Which imports fractions and decimals.

            return statistics.median(b.elapsed_time(e) for b, e in spans) / 1e3

    return timer
