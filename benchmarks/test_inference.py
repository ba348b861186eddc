"""Inference of whole networks, from images to four features, by this library and its peers.

``pytest benchmarks/test_inference.py --benchmark-only`` (``-m "slow or not slow"`` for
torch.compile as well). bf16 on a GPU; on a CPU a few small networks, in fp32, and in bf16 where
the processor multiplies that. :mod:`benchmarks.timing` says what is timed, and
:mod:`benchmarks.peers` who takes part with which settings. Each row has in its ``extra_info``:

* ``ratio_to_eager``, ``ratio_low``, ``ratio_high``, ``ratio_confidence``: eager's time over this
  one's in the same rounds. Eager's own row compares two copies of it: the noise of the measurement,
* ``images_per_s``: of calls that are queued without a wait between them,
* ``peak_mib``: memory that the provider took from the driver, weights and results included
  (reserved, so that the pools of CUDA graphs count; without what choosing engines took),
* ``distance``: of the last feature from eager's, relative, in norms,
* ``flop``, ``bytes``: counted, not measured (:mod:`vovnet_fast.tools.plan`),
* ``launches``: counted too (:meth:`benchmarks.peers.Peer.launches`), or ``launches_why`` not.
"""

import contextlib
import gc

import pytest
import torch

from vovnet_fast import use_backend

from .ceilings import multiplies_bf16
from .networks import MORE_SHAPES, MORE_SPECS, SHAPES, SPECS, TIMM, counted, text
from .peers import EAGER, PEERS, Case, Missing
from .timing import burst, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cases():
    if DEVICE.type == "cuda":
        networks = [(s, shape) for shape in SHAPES + MORE_SHAPES for s in SPECS + MORE_SPECS]
        return [Case(*network, torch.bfloat16, DEVICE) for network in networks]
    small, wide = ("V-19-slim-dw-eSE", (1, 128, 128)), ("V-39-eSE", (1, 224, 224))
    batch = ("V-19-slim-dw-eSE", (8, 128, 128))
    found = [Case(*network, torch.float32, DEVICE) for network in (small, batch, wide)]
    return [*found, Case(*wide, torch.bfloat16, DEVICE)] if multiplies_bf16() else found


MAX_DISTANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""A provider further from eager computes something else. bf16 alone makes about a hundredth."""


class Eager:
    """Eager on one case: what all others are compared with in turn."""

    def __init__(self, case):
        self._model, self._images = EAGER.ready(case), case.images()
        self.feature = self()[-1].float().cpu()

    def __call__(self):
        with use_backend("reference"):
            return self._model(self._images)


@pytest.fixture(scope="module")
def eager_of():
    """Eager on a case; of the case before nothing stays."""
    found = {}

    def eager(case):
        if case not in found:
            found.clear()
            gc.collect()
            found[case] = Eager(case)
        return found[case]

    yield eager
    found.clear()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if p.slow else []) for n, p in PEERS.items()]
)
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in _cases()])
def test_inference(case, name, benchmark, watch, eager_of):
    peer = PEERS[name]
    baseline = eager_of(case)
    images = peer.images(case.images())
    with contextlib.ExitStack() as stack:
        settled = stack.enter_context(_memory(benchmark))
        try:
            model = peer.ready(case)
        except Missing as missing:
            pytest.skip(str(missing))
        stack.enter_context(use_backend(peer.backend))
        # Compiles and chooses engines, and so does a capture. What comes of it may be overwritten.
        feature = model(images)[-1].float().cpu()
        settled()
        model(images)
    describe(benchmark, case, peer, model)
    assert feature.isfinite().all(), "the features are not finite"
    if peer.same:
        distance = ((feature - baseline.feature).norm() / baseline.feature.norm()).item()
        benchmark.extra_info["distance"] = distance
        assert distance < (peer.apart or MAX_DISTANCE[case.dtype])

    def work():
        with use_backend(peer.backend):
            return model(images)

    found = measure(benchmark, watch, work, baseline, warm=DEVICE.type == "cpu")
    queued = burst(watch, work) if DEVICE.type == "cuda" else found.median_ms / 1e3
    benchmark.extra_info["images_per_s"] = case.shape[0] / queued


def describe(benchmark, case, peer, model):
    """What a row says about its case and its provider."""
    dtype = str(case.dtype).removeprefix("torch.")
    benchmark.group = str(case)
    benchmark.extra_info.update(
        kind="inference",
        name=f"{case.spec} {text(case.shape)}",
        provider=peer.provider,
        backend=peer.ours,
        spec=case.spec,
        shape=text(case.shape),
        dtype=dtype,
        settings=peer.settings,
    )
    benchmark.extra_info["pass"] = "forward"
    if peer.provider == "timm":
        benchmark.extra_info["timm"] = TIMM[case.spec]
    found = dict(counted(case.spec, case.shape, {"bfloat16": "bf16", "float32": "fp32"}[dtype]))
    found.pop("launches", None)
    benchmark.extra_info.update(found)
    try:
        benchmark.extra_info["launches"] = peer.launches(case, model)
    except Missing as reason:
        benchmark.extra_info["launches_why"] = str(reason)


@contextlib.contextmanager
def _memory(benchmark):
    """Note the memory that what is made inside takes; ``settled`` ends its preparations."""
    if DEVICE.type != "cuda":
        yield lambda: None
        return

    def settled():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    settled()
    before = torch.cuda.memory_reserved()
    yield settled
    taken = torch.cuda.max_memory_reserved() - before
    benchmark.extra_info["peak_mib"] = taken / 2**20
