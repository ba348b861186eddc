"""Training steps of whole networks, forward and backward, by several providers.

``pytest benchmarks/test_training.py --benchmark-only`` (``-m "slow or not slow"`` for
torch.compile as well). On a GPU bf16 by autocast over weights in fp32, batch norms with fixed
statistics; on a CPU two small networks in fp32. A step makes four features, takes given gradients
of them back, and leaves gradients of all parameters. Every round runs a step of eager and one of
the provider, in turn. Each row has in its ``extra_info``:

* ``ratio_to_eager``, ``ratio_low``, ``ratio_high``, ``ratio_confidence``: eager's time over this
  one's in the same rounds. Eager's own row compares two copies of it: the noise of the measurement,
* ``peak_mib``: the most that a step had allocated at a time, beyond weights and images,
* ``kept_mib``: what was allocated between forward and backward pass, beyond the same,
* ``peak_to_eager``: this peak over eager's,
* ``distance``: of all gradients from eager's, relative, in norms.
"""

import gc
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from vovnet_fast import backends, use_backend
from vovnet_fast.tools.bench.training import TrainingStep

from .networks import (
    HEADLINE,
    MORE_SPECS,
    MORE_TRAINING_SHAPES,
    SPECS,
    TRAINING_SHAPES,
    build_training,
    fold_in_graph,
    text,
)
from .op_rows import skip_unless_usable
from .peers import PEERS, Case, Missing
from .timing import measure

TRAINS = True
"""conftest.py: not in inference mode."""

ON_GPU = torch.cuda.is_available()
CASES = [("V-19-slim-dw-eSE", (1, 224, 224)), ("V-39-eSE", (1, 224, 224))]
if ON_GPU:
    shapes = TRAINING_SHAPES + MORE_TRAINING_SHAPES
    others = [(spec, shape) for shape in shapes for spec in SPECS + MORE_SPECS]
    CASES = list(dict.fromkeys([*HEADLINE, *others]))

MAX_DISTANCE = 0.3
"""A provider further from eager computes something else. bf16 alone makes about a tenth, as
roundings switch ReLUs."""


def eager(spec, device):
    return build_training(spec, device)


def contiguous(spec, device):
    return build_training(spec, device).to(memory_format=torch.contiguous_format)


def checkpointed(spec, device):
    return build_training(spec, device, with_cp=True)


def folding(spec, device):
    return fold_in_graph(build_training(spec, device))


def timm(spec, device):
    """Its norms have fixed statistics, as those of the others."""
    try:
        model = PEERS["timm"].build(Case(spec, (1, 224, 224), torch.float32, device)).train()
    except Missing as missing:
        pytest.skip(str(missing))
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
    return model


def compiling(build, mode="default"):
    def compiled(spec, device):
        if not ON_GPU:
            pytest.skip("compiling for a CPU takes minutes and says nothing")
        return torch.compile(build(spec, device), mode=mode, dynamic=False)

    return compiled


class Provider(NamedTuple):
    """How to make a callable of a network, the settings in words, and the backend it runs under.

    ``same``: it computes the same function of the same weights as eager.
    """

    name: str
    build: Callable
    settings: str
    backend: str = "reference"
    slow: bool = False
    same: bool = True


def _providers():
    """All of them by name, eager first."""
    yield "eager", Provider("eager", eager, "plain modules, channels_last")
    yield "eager-NCHW", Provider("eager NCHW", contiguous, "plain modules, contiguous")
    yield "checkpoint", Provider("checkpoint", checkpointed, "every OSA block checkpointed")
    yield "folding", Provider("folding", folding, "batch norms folded into weights in every step")
    settings = "timm's network of the same convolutions, channels_last, norms fixed"
    yield "timm", Provider("timm", timm, settings, same=False)
    if not ON_GPU:  # There it is one of those below.
        settings = "vovnet_fast, backend auto: ops, or plain modules where these are faster"
        yield "fused-auto", Provider("fused, auto", eager, settings, "auto")
    for backend in backends.NAMES:
        if backend != "reference":
            settings = f"vovnet_fast, backend {backend}"
            yield f"fused-{backend}", Provider("fused", eager, settings, backend)
            recompute = Provider("fused, recompute", checkpointed, f"{settings}, with_cp", backend)
            yield f"fused-recompute-{backend}", recompute
    for words, build in (("", eager), (", folding", folding)):
        settings = f"torch.compile, default mode{words}"
        provider = Provider(f"compiled{words}", compiling(build), settings, slow=True)
        yield provider.name.replace(", ", "-"), provider
    mode = "max-autotune-no-cudagraphs"
    yield "compiled-max-autotune", Provider(
        "compiled, max-autotune", compiling(folding, mode),
        "torch.compile, max-autotune, batch norms folded in every step", slow=True,
    )  # fmt: skip


PROVIDERS = dict(_providers())


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
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if p.slow else []) for n, p in PROVIDERS.items()],
)
@pytest.mark.parametrize(
    ("spec", "shape"), [pytest.param(*case, id=f"{case[0]}-{text(case[1])}") for case in CASES]
)
def test_training(spec, shape, name, benchmark, watch, device, rival_of):
    provider = PROVIDERS[name]
    skip_unless_usable(provider.backend, device)
    ours = provider.name.startswith("fused")
    rival = rival_of(spec, shape)
    step = TrainingStep(provider.build(spec, device), shape, device)
    benchmark.group = f"training {spec} {text(shape)}"
    benchmark.extra_info.update(
        kind="training",
        name=f"{spec} {text(shape)}",
        provider=provider.name,
        backend=provider.backend if ours else None,
        spec=spec,
        shape=text(shape),
        dtype="bfloat16" if ON_GPU else "float32",
        settings=provider.settings + (", autocast to bf16" if ON_GPU else ""),
    )
    benchmark.extra_info["pass"] = "step"
    with use_backend(provider.backend):
        memory = memory_of(step, device)  # Compiles, and chooses engines.
        if provider.same:
            distance = step.distance(rival.gradients)
            benchmark.extra_info["distance"] = distance
            assert distance < MAX_DISTANCE
        found = measure(benchmark, watch, step, rival)
    benchmark.extra_info["images_per_s"] = shape[0] / (found.median_ms / 1e3)
    if memory is not None:
        benchmark.extra_info.update(
            peak_mib=memory.peak / 2**20,
            kept_mib=memory.kept / 2**20,
            peak_to_eager=memory.peak / rival.memory.peak,
        )
