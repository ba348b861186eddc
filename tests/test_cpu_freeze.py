"""Frozen networks on the ``cpu`` backend, against plain modules."""

import copy
import io

import pytest
import torch

from vovnet_fast import VoVNet, backends, freeze
from vovnet_fast.backends import cpu_conv

from . import straight_line
from .extension_cases import require
from .test_cpu_backend import threads
from .tiny import TINY

PUBLISHED = ["V-19-slim-dw-eSE", "V-19-slim-eSE", "ese_vovnet19b_dw", "vovnet-19-slim"]


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


def network(spec, **options):
    return straight_line.randomise(VoVNet(TINY.get(spec, spec), **options)).eval()


@torch.no_grad()
def run(module, x, backend="cpu"):
    with backends.use_backend(backend):
        return module(x)


def errors(found, exact):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [*TINY, *PUBLISHED])
def test_no_worse_than_eager(spec, dtype):
    """Errors against fp64 at most twice eager's in the same dtype, whatever the image's size."""
    model = network(spec)
    exact_model, eager_model = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    frozen = freeze(model, dtype)
    for size in ((1, 3, 33, 47), (2, 3, 64, 96)):
        x = torch.randn(size, dtype=dtype)
        found, eager = run(frozen, x), run(eager_model, x, "reference")
        exact = run(exact_model, x.double(), "reference")
        for ours, theirs in zip(errors(found, exact), errors(eager, exact), strict=True):
            assert ours <= 2 * theirs
        assert all(f.dtype == dtype for f in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    frozen, x = freeze(network("V-19-slim-eSE"), dtype), torch.randn(1, 3, 96, 64)
    with threads(1):
        alone = run(frozen, x)
    with threads(3):
        together = run(frozen, x)
    assert all(map(torch.equal, alone, together))


def test_weights_are_packed_once(monkeypatch):
    """And by a copy, or after loading others, again: with those."""
    packed, pack = [], cpu_conv._pack

    def note(engine, weight):
        packed.append(weight.shape)
        return pack(engine, weight)

    monkeypatch.setattr(cpu_conv, "_pack", note)
    frozen, x = freeze(network("detectron2")), torch.randn(1, 3, 40, 40)
    layers = len(frozen._widths) if cpu_conv.choose_engine(torch.float32) != "aten" else 0
    first = run(frozen, x)
    with torch.inference_mode():
        again = run(frozen, x)
    assert len(packed) == layers
    assert all(map(torch.equal, first, again))
    twin = copy.deepcopy(frozen)
    assert all(map(torch.equal, first, run(twin, x)))
    assert len(packed) == 2 * layers
    other = freeze(network("detectron2"))
    expected = run(other, x)
    assert not torch.equal(first[0], expected[0])
    twin.load_state_dict(other.state_dict())
    assert all(map(torch.equal, expected, run(twin, x)))
    assert all(map(torch.equal, first, run(frozen, x)))


def test_pickles_have_no_packed_weights():
    frozen, x = freeze(network("detectron2")), torch.randn(1, 3, 40, 40)
    sizes = []
    for _ in range(2):
        stream = io.BytesIO()
        torch.save(frozen, stream)
        sizes.append(stream.tell())
        run(frozen, x)
    assert sizes[0] == sizes[1]


def test_results_do_not_share_memory_with_later_calls():
    frozen = freeze(network("detectron2"), torch.bfloat16)
    x = torch.randn(1, 3, 48, 40)
    first = run(frozen, x)
    kept = [f.clone() for f in first]
    run(frozen, -x)
    assert all(map(torch.equal, first, kept))


def test_what_is_not_finite_stays_so():
    model, x = network("detectron2"), torch.randn(2, 3, 64, 64)
    x[0, 1, 30, 31] = torch.nan
    for found, expected in zip(run(freeze(model), x), run(model, x, "reference"), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert found[0].isnan().any()
        assert found[1].isfinite().all()


def test_compiles_without_a_graph_break():
    frozen, x = freeze(network("depthwise")), torch.randn(1, 3, 40, 40)
    expected = run(frozen, x)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    found = run(compiled, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
