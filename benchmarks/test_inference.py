"""Inference of whole networks, from images to four features, by several providers.

``pytest benchmarks/test_inference.py --benchmark-only`` (``-m slow`` for torch.compile).
bf16 on a GPU, one small network in fp32 on a CPU; :mod:`benchmarks.timing` says what is timed.
Each row has in its ``extra_info``:

* ``ratio_to_eager``: eager's device time over this one's, both of this run,
* ``peak_mib``: memory that the provider took from the driver, weights and results included
  (reserved, so that the pools of CUDA graphs count; without what choosing engines took),
* ``distance``: of the last feature from eager's, relative, in norms,
* ``floor_ms`` and what it is made of: counted, not measured (:mod:`vovnet_fast.plan`).
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vovnet_fast import backends, freeze, use_backend

from .networks import SHAPES, SMALL, SPECS, TIMM, build, build_timm, counted, image, text
from .timing import measure

ON_GPU = torch.cuda.is_available()
CASES = [(spec, shape) for shape in SHAPES for spec in SPECS] if ON_GPU else [SMALL]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

MAX_DISTANCE = 0.1
"""A provider further from eager computes something else. bf16 alone makes about a hundredth."""


def eager(spec, device):
    return build(spec, DTYPE, device)


def folded(spec, device):
    """The original goes: a frozen network has weights of its own."""
    return freeze(build(spec, DTYPE, device))


def compiled(spec, device):
    if not ON_GPU:
        pytest.skip("max-autotune is for GPUs")
    return torch.compile(folded(spec, device), mode="max-autotune-no-cudagraphs", dynamic=False)


def graphed(spec, device):
    if not ON_GPU:
        pytest.skip("CUDA graphs need a GPU")
    return freeze(build(spec, DTYPE, device), graph=True)


def timm(spec, device):
    try:
        return build_timm(spec, DTYPE, device)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")


class Provider(NamedTuple):
    """How to make a callable of a network, and the backend that it runs under."""

    build: Callable
    backend: str
    ours: bool = True  # Computes the same function with the same weights.


PROVIDERS = {
    # Eager first: the others are compared with it.
    "eager": Provider(eager, "reference"),
    "folded": Provider(folded, "reference"),
    "fused": Provider(folded, "triton"),
    "fused, graph": Provider(graphed, "triton"),
    "folded, graph": Provider(graphed, "reference"),
    "timm": Provider(timm, "reference", ours=False),
    "compiled": Provider(compiled, "reference"),
}


class Eager(NamedTuple):
    """What eager made of a case: its time, and its last feature on the CPU."""

    device_ms: float
    feature: Tensor


@pytest.fixture(scope="module")
def eagers():
    return {}


@pytest.mark.parametrize(
    "provider",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "compiled" else [])
        for name in PROVIDERS
    ],
)
@pytest.mark.parametrize(
    ("spec", "shape"), [pytest.param(*case, id=f"{case[0]}-{text(case[1])}") for case in CASES]
)
def test_inference(spec, shape, provider, benchmark, watch, device, eagers):
    builder, backend, ours = PROVIDERS[provider]
    reason = backends.why_not(backend, device)
    if reason is not None:
        pytest.skip(reason)
    if backend == "triton" and not ON_GPU:
        pytest.skip("the time of Triton's interpreter says nothing")
    benchmark.group = f"{spec} {text(shape)}"
    benchmark.extra_info.update(spec=spec, shape=text(shape), provider=provider, dtype=str(DTYPE))
    if provider == "timm":
        benchmark.extra_info["timm"] = TIMM[spec]
    x = image(shape, DTYPE, device)
    with use_backend(backend):
        with _memory_of_provider(benchmark, device) as settled:
            model = builder(spec, device)
            feature = model(x)[-1]  # Compiles and chooses engines, and so does a capture.
            settled()
            model(x)
        median = measure(benchmark, watch, lambda: model(x))
    feature = feature.float().cpu()
    if provider == "eager":
        eagers[spec, shape] = Eager(median, feature)
    _compare(benchmark, eagers.get((spec, shape)), median, feature, ours)
    if ON_GPU:
        benchmark.extra_info.update(counted(spec, shape))


def _compare(benchmark, baseline, median, feature, ours):
    """Note the ratio to eager, and the distance where both compute the same function."""
    assert feature.isfinite().all(), "the features are not finite"
    if baseline is None:
        return
    benchmark.extra_info["ratio_to_eager"] = baseline.device_ms / median
    if ours:
        distance = (feature - baseline.feature).norm() / baseline.feature.norm()
        benchmark.extra_info["distance"] = distance.item()
        assert distance < MAX_DISTANCE


@contextlib.contextmanager
def _memory_of_provider(benchmark, device):
    """Note the memory that what is made inside takes; ``settled`` ends its preparations."""
    if device.type != "cuda":
        yield lambda: None
        return

    def settled():
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    settled()
    before = torch.cuda.memory_reserved(device)
    yield settled
    taken = torch.cuda.max_memory_reserved(device) - before
    benchmark.extra_info["peak_mib"] = taken / 2**20
