"""Training steps of whole networks, forward and backward, by several providers.

``pytest benchmarks/test_training.py --benchmark-only`` (``-m slow`` for torch.compile). On a GPU
bf16 by autocast over weights in fp32, ``channels_last``, batch norms with fixed statistics; on a
CPU one small network in fp32. A step makes four features, takes given gradients of them back,
and leaves gradients of all parameters. Every round runs a step of eager and one of the provider,
in turn. Each row has in its ``extra_info``:

* ``ratio_to_eager``: the device time of eager in the same rounds, over this one's,
* ``peak_mib``: the most that a step had allocated at a time, beyond weights and images,
* ``kept_mib``: what was allocated between forward and backward pass, beyond the same,
* ``peak_to_eager``: this peak over eager's,
* ``distance``: of all gradients from eager's, relative, in norms.
"""

import gc
import statistics
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from vovnet_fast import backends, use_backend

from .networks import (
    TRAINING_SHAPES,
    TRAINING_SMALL,
    TRAINING_SPECS,
    TrainingStep,
    build_training,
    fold_in_graph,
    text,
)
from .timing import ROUNDS, measure

TRAINS = True
"""conftest.py: not in inference mode."""

ON_GPU = torch.cuda.is_available()
CASES = [TRAINING_SMALL]
if ON_GPU:
    CASES = [(spec, shape) for shape in TRAINING_SHAPES for spec in TRAINING_SPECS]

MAX_DISTANCE = 0.3
"""A provider further from eager computes something else. bf16 alone makes about a tenth, as
roundings switch ReLUs."""


def eager(spec, device):
    return build_training(spec, device)


def checkpointed(spec, device):
    return build_training(spec, device, with_cp=True)


def folding(spec, device):
    return fold_in_graph(build_training(spec, device))


def compiled(spec, device):
    if not ON_GPU:
        pytest.skip("compiling for a CPU takes minutes and says nothing")
    return torch.compile(build_training(spec, device), dynamic=False)


class Provider(NamedTuple):
    """How to make a callable of a network, and the backend that it runs under."""

    build: Callable
    backend: str


PROVIDERS = {
    "eager": Provider(eager, "reference"),
    "checkpoint": Provider(checkpointed, "reference"),
    "folding": Provider(folding, "reference"),
    "fused": Provider(eager, "triton"),
    "fused, recompute": Provider(checkpointed, "triton"),
    "compiled": Provider(compiled, "reference"),
}


class Memory(NamedTuple):
    """Bytes beyond those before a step: at its peak, and between forward and backward pass."""

    peak: int
    kept: int


class Rival:
    """Eager on one case: what all others are compared with."""

    def __init__(self, spec, shape, device):
        self.step = TrainingStep(eager(spec, device), shape, device)
        with use_backend("reference"):
            self.memory = memory_of(self.step, device)
            self.gradients = [p.grad.clone() for p in self.step.parameters]

    def __call__(self):
        with use_backend("reference"):
            self.step()


@pytest.fixture(scope="module")
def rival_of(device):
    """Eager on a case; of the case before nothing stays."""
    found = {}

    def rival(spec, shape):
        if (spec, shape) not in found:
            found.clear()
            gc.collect()
            found[spec, shape] = Rival(spec, shape, device)
        return found[spec, shape]

    yield rival
    found.clear()


def memory_of(step, device):
    """Run two steps; the second one's memory, None on a CPU."""
    step()
    if device.type != "cuda":
        return None
    step.clear()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    features = step.forward()
    kept = torch.cuda.memory_allocated(device) - before
    step.backward(features)
    torch.cuda.synchronize(device)
    return Memory(torch.cuda.max_memory_allocated(device) - before, kept)


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
def test_training(spec, shape, provider, benchmark, watch, device, rival_of):
    build, backend = PROVIDERS[provider]
    reason = backends.why_not(backend, device)
    if reason is not None:
        pytest.skip(reason)
    if backend == "triton" and not ON_GPU:
        pytest.skip("the time of Triton's interpreter says nothing")
    benchmark.group = f"training {spec} {text(shape)}"
    benchmark.extra_info.update(spec=spec, shape=text(shape), provider=provider)
    rival, step = rival_of(spec, shape), TrainingStep(build(spec, device), shape, device)
    times = []

    def eager_first():
        watch.chill()
        times.append(watch.time(rival))
        watch.chill()

    with use_backend(backend):
        memory = memory_of(step, device)  # Compiles, and chooses engines.
        median = measure(benchmark, watch, step, eager_first)
    eager_ms = statistics.median(times[-ROUNDS:]) * 1e3
    distance = step.distance(rival.gradients)
    benchmark.extra_info.update(
        eager_ms=eager_ms, ratio_to_eager=eager_ms / median, distance=distance
    )
    assert distance < MAX_DISTANCE
    if memory is not None:
        benchmark.extra_info.update(
            peak_mib=memory.peak / 2**20,
            kept_mib=memory.kept / 2**20,
            peak_to_eager=memory.peak / rival.memory.peak,
        )
