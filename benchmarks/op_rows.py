"""A row of an op: who does it, how fast, how near to the ceilings, and on which engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from vovnet_fast import backends, tuning
from vovnet_fast.backends._engines import ATEN
from vovnet_fast.backends.cpu import convolution
from vovnet_fast.tools.bench.stopwatch import Stopwatch, interleaved

from .ceilings import Ceilings
from .evidence.summary import form_of
from .ops import Case
from .timing import measure, warm_ms

EAGER, COMPILED = "eager", "compiled"
ENGINES = ALL, FORMS, HOPPER = "all", "forms", "conv-sm90"
"""Which engines of an op are measured: all of them, one of each form, or, beside what is taken
without measuring and cuDNN's, all candidates of the convolution for Hopper."""

SECONDS = 0.4
"""For the rounds of a row."""

MAX_DISTANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.004}
"""From eager, relative, in norms. On a GPU, torch may round fp32 to TF32: a thousandth more."""

_SETTINGS = {
    EAGER: "ATen on dense channels_last tensors, cuDNN may try its algorithms",
    COMPILED: "torch.compile of the same, mode max-autotune-no-cudagraphs, static shapes",
}


def providers() -> list[Any]:
    """Eager first, then every backend there is, then torch.compile, marked slow."""
    return [EAGER, *backends.NAMES, pytest.param(COMPILED, marks=pytest.mark.slow)]


def interpreted() -> bool:
    """Whether Triton's kernels would run in its interpreter, whose times say nothing."""
    return not torch.cuda.is_available() and backends.why_not("triton", torch.device("cpu")) is None


def skip_unless_usable(provider: str, device: torch.device) -> None:
    """Skip the test, and say why, where a provider is a backend that cannot be measured here."""
    reason = backends.why_not(provider, device) if provider in backends.NAMES else None
    if reason is None and provider == "triton" and interpreted():
        reason = "the time of Triton's interpreter says nothing"
    if reason is not None:
        pytest.skip(f"backend {provider}: {reason}")


def measure_op(
    case: Case,
    provider: str,
    dtype: torch.dtype,
    benchmark: Any,
    watch: Stopwatch,
    ceilings: Ceilings,
    *,
    quick: bool = False,
    which: str = ALL,
) -> None:
    """Measure a case by one provider, and fill its row.

    Args:
        case: the op.
        provider: one of :func:`providers`.
        dtype: of the activations.
        benchmark: pytest-benchmark's fixture.
        watch: of the device.
        ceilings: of the device.
        quick: next to no rounds, for Triton's interpreter.
        which: engines are measured, one of :data:`ENGINES`.
    """
    if provider == COMPILED and watch.device.type == "cpu":
        pytest.skip("max-autotune is for GPUs")
    # Tensors of inference mode count no changes: backends could not keep what they pack of them.
    with torch.inference_mode(False), torch.no_grad():
        work = case.make(dtype, watch.device)
    benchmark.group = case.name
    ours = provider in backends.NAMES
    benchmark.extra_info.update(
        kind=case.kind,
        name=case.name,
        provider=provider,
        backend=provider if ours else None,
        dtype=str(dtype).removeprefix("torch."),
        shape="x".join(map(str, case.shape)),
        flop=case.flop,
        bytes=work.moved,
        settings=_SETTINGS.get(provider, "slots of a wider buffer"),
    )
    benchmark.extra_info["pass"] = case.direction
    call = work.eager
    if provider == COMPILED:
        mode = "max-autotune-no-cudagraphs"
        call = torch.compile(work.eager, mode=mode, dynamic=False)
    elif ours:
        backend = backends._module(provider)
        call = functools.partial(work.ours, backend)
    found = None
    if ours:
        if provider == "cpu":
            found = cpu_engines(call, watch)
        else:
            found = engines(call, watch, quick=quick, which=which)
    with _choosing(found[1] if found else None):
        benchmark.extra_info["distance"] = check(call(), work.eager(), dtype)
        if found:
            benchmark.extra_info.update(engines=found[0], engine=found[1])
        measured = measure(benchmark, watch, call, work.eager, seconds=0 if quick else SECONDS)
        if not quick:
            benchmark.extra_info["warm_ms"] = warm_ms(watch, call, SECONDS / 4)
    seconds = measured.median_ms / 1e3
    benchmark.extra_info.update(ceilings.fractions(case.flop, work.moved, seconds, dtype))


def check(found: Tensor, expected: Tensor, dtype: torch.dtype, *, times: float = 1.0) -> float:
    """Relative distance of a result from eager's, in norms.

    Args:
        found: of a provider.
        expected: of eager.
        dtype: in which both were computed.
        times: as much as usual is allowed: several layers round more often than one does.

    Raises:
        AssertionError: it is so large that something else was computed.
    """
    found, expected = found.double(), expected.double()
    distance = ((found - expected).norm() / expected.norm()).item()
    allowed = MAX_DISTANCE[dtype] + (1e-3 if found.is_cuda and dtype == torch.float32 else 0)
    allowed *= times
    assert distance <= allowed, f"{distance:.3g} from eager, at most {allowed:.3g} is allowed"
    return distance


# --------------------------------------------------------------------------------------
# Engines
# --------------------------------------------------------------------------------------


def engines(
    call: Callable[[], Any], watch: Stopwatch, *, quick: bool = False, which: str = ALL
) -> tuple[dict[str, dict[str, Any]], str] | None:
    """Every engine that a backend can choose for a call, or one of each form.

    Each must first pass the trial that choosing by measurement asks for, and those that do are
    timed in turn.

    Returns:
        ``ms``, or the ``error``, by engine, and the name of the fastest. None where the backend
        chooses nothing.
    """
    asked: list[tuple[list[str], Callable[[str], None], Callable[[], tuning.Trial] | None]] = []

    def spy(device, problem, candidates, static, run, timer=None, prepare=None):
        asked.append((chosen(list(candidates), static, which), run, prepare))
        return static

    with mock.patch.object(tuning, "choose", spy):
        call()
    if not asked:
        return None
    [candidates, run, prepare], *_ = asked
    return _timed(candidates, run, prepare() if prepare is not None else None, watch, quick=quick)


def chosen(candidates: list[str], static: str, which: str) -> list[str]:
    """Those of the candidates that are measured: ``which`` is one of :data:`ENGINES`."""
    if which == FORMS:
        return one_of_each_form(candidates, static)
    if which == HOPPER:
        return [name for name in candidates if name in (static, ATEN) or form_of(name) == HOPPER]
    return candidates


def one_of_each_form(candidates: Sequence[str], static: str) -> list[str]:
    """The static choice, and of each other form of engine that with the same tile, or the first."""
    found: dict[str, str] = {form_of(static): static} if static in candidates else {}
    tile = static.split("-")[1:2]
    for name in candidates:
        form = form_of(name)
        same = name.split("-")[1:2] == tile
        if form not in found or (same and found[form].split("-")[1:2] != tile):
            found[form] = name
    return list(found.values())


def cpu_engines(
    call: Callable[[], Any], watch: Stopwatch
) -> tuple[dict[str, dict[str, Any]], str] | None:
    """The same for the ``cpu`` backend, which has a fixed choice: that is what is returned."""
    asked: list[torch.dtype] = []
    choose = convolution.choose_engine

    def spy(dtype: torch.dtype) -> str:
        asked.append(dtype)
        return choose(dtype)

    with mock.patch.object(convolution, "choose_engine", spy):
        call()
    if not asked:
        return None

    def run(engine: str) -> None:
        with mock.patch.object(convolution, "choose_engine", return_value=engine):
            call()

    [dtype, *_] = asked
    own = [name for name in convolution.PREFERRED.get(dtype, ()) if name in convolution.engines()]
    return _timed([*own, convolution.ATEN], run, None, watch)[0], choose(dtype)


def _timed(
    candidates: list[str],
    run: Callable[[str], None],
    trial: tuning.Trial | None,
    watch: Stopwatch,
    *,
    quick: bool = False,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Time those that run and are right in turn; returns all, and the fastest."""
    found = dict(_tried(candidates, run, trial))
    works = {name: functools.partial(run, name) for name in candidates if not found[name]}
    if not works:
        raise RuntimeError(f"no engine runs: {found}")
    times = interleaved(works, 1 if quick else 7, watch=watch, warm_up=1, seconds=SECONDS, fewest=1)
    for name, seconds in times.items():
        found[name] = {"ms": sorted(seconds)[len(seconds) // 2] * 1e3}
    return found, min(times, key=lambda name: found[name]["ms"])


def _tried(
    candidates: list[str], run: Callable[[str], None], trial: tuning.Trial | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """An ``error`` for what does not run or is wrong, nothing for the others."""
    for name in candidates:
        try:
            wrong = trial(name) if trial is not None else None
            if wrong is None:
                run(name)
        except Exception as error:
            if "illegal" in str(error):  # Nothing runs on the device after that.
                raise
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        yield name, {} if wrong is None else {"error": wrong}


@contextmanager
def _choosing(engine: str | None) -> Iterator[None]:
    """Let the backend choose this engine wherever it can; with None as it would."""
    if engine is None:
        yield
        return

    def choose(device, problem, candidates, static, run, timer=None, prepare=None):
        return engine if engine in candidates else static

    with mock.patch.object(tuning, "choose", choose):
        yield
