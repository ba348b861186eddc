"""Frozen networks on the ``cpu`` backend, against plain modules."""

import concurrent.futures
import copy
import io

import pytest
import torch
from torch import nn

from tests import straight_line
from tests.backends.test_cpu_backend import threads
from tests.extension_cases import require
from tests.features import HALF
from tests.fused import needs_traces
from tests.tiny import FIRST, TINY
from vovnet_fast import VoVNet, backends, freeze
from vovnet_fast.backends import _extension
from vovnet_fast.backends.cpu import convolution, packing, winograd
from vovnet_fast.compat import zip

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF])
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
    if convolution.choose_engine(dtype) == "aten":
        pytest.skip("convolutions are oneDNN's here, which are others on other numbers of threads")
    frozen, x = freeze(network("V-19-slim-eSE"), dtype), torch.randn(1, 3, 96, 64)
    with threads(1):
        alone = run(frozen, x)
    with threads(3):
        together = run(frozen, x)
    assert all(map(torch.equal, alone, together))


def test_engines_chosen_for_a_number_of_threads_are_not_taken_where_bits_count(monkeypatch):
    """What was measured may differ by the number of threads, and engines by the last bits."""
    frozen, x = freeze(network("V-19-slim-eSE")), torch.randn(1, 3, 128, 96)
    if "winograd4" not in winograd.engines(torch.ones(96, 3, 3, 96), 1, x.dtype, "fma"):
        pytest.skip("no such engine here")
    monkeypatch.setattr(
        winograd, "fastest", lambda layer, names, *_: names[0 if layer.threads == 1 else -1]
    )

    def found(number):
        with threads(number):
            return run(frozen, x)

    assert not all(map(torch.equal, found(1), found(3)))
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, found(1), found(3)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("prepare", [freeze, nn.Module.eval], ids=["frozen", "kept"])
def test_what_is_recorded_follows_a_switch_to_deterministic_algorithms(prepare, monkeypatch):
    """As what runs from the beginning under it: by rules, which say something else here."""
    net, x = network("V-19-slim-eSE"), torch.randn(1, 3, 128, 96)
    if "winograd4" not in winograd.engines(torch.ones(96, 3, 3, 96), 1, x.dtype, "fma"):
        pytest.skip("no such engine here")
    monkeypatch.setattr(winograd, "fastest", lambda layer, names, *_: names[-1])

    def settled(module):
        return [run(module, x) for _ in range(5)][-1]

    module = prepare(net)
    measured = settled(module)
    torch.use_deterministic_algorithms(True)
    try:
        found, expected = settled(module), settled(prepare(copy.deepcopy(net)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, expected))
    assert not all(map(torch.equal, found, measured))
    assert all(map(torch.equal, settled(module), measured))


def test_weights_are_packed_once(monkeypatch):
    """And by a copy, or after loading others, again: with those."""
    packed, pack = [], packing.pack

    def note(engine, weight):
        packed.append(weight.shape)
        return pack(engine, weight)

    monkeypatch.setattr(packing, "pack", note)
    frozen, x = freeze(network("detectron2")), torch.randn(1, 3, 40, 40)
    layers = len(frozen._widths) if convolution.choose_engine(torch.float32) != "aten" else 0
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


@pytest.mark.versions
def test_what_is_not_finite_stays_so():
    model, x = network("detectron2"), torch.randn(2, 3, 64, 64)
    x[0, 1, 30, 31] = torch.nan
    for found, expected in zip(run(freeze(model), x), run(model, x, "reference"), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert found[0].isnan().any()
        assert found[1].isfinite().all()


def test_images_that_stand_for_their_negative():
    frozen = freeze(network("depthwise"))
    x = torch.randn(1, 3, 40, 40).contiguous(memory_format=torch.channels_last)
    expected = run(frozen, x)
    for _ in range(4):
        assert all(map(torch.equal, run(frozen, torch._neg_view(-x)), expected))


@pytest.mark.versions
@needs_traces
def test_compiles_without_a_graph_break():
    frozen = freeze(network("depthwise", out_features=FIRST))
    x = torch.randn(1, 3, 40, 40)
    expected = run(frozen, x)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    found = run(compiled, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------
# Recorded calls, from the third on
# --------------------------------------------------------------------------------------


def replays(frozen):
    return [workspace.replay for _, workspace in frozen._caches.workspaces._spare]


def repeated(frozen):
    return [replay.calls for replay in replays(frozen)]


def require_engine(dtype):
    if convolution.choose_engine(dtype) == "aten":
        pytest.skip(f"no engine of the extension takes {dtype} on this processor")


@pytest.fixture
def no_ops(monkeypatch):
    """Calling it makes every op that Python calls from then on fail."""

    def forbid():
        def fail(*_, **__):
            raise AssertionError("an op was called from Python")

        for name in ("conv", "max_pool", "apply_gates", "gates", "depthwise"):
            monkeypatch.setattr(backends.cpu, name, fail)

    return forbid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", TINY)
def test_later_calls_repeat_recorded_ones(spec, dtype, no_ops):
    require_engine(dtype)
    model = network(spec)
    frozen, other = freeze(model, dtype), freeze(model, dtype)
    images = [torch.randn(2, 3, 40, 56, dtype=dtype) for _ in range(4)]
    expected = [run(freeze(model, dtype), x) for x in images]
    found = [run(frozen, x) for x in images[:2]]
    run(other, images[0])
    assert repeated(other) == [0]
    assert min(repeated(frozen)) > 10
    no_ops()
    found += [run(frozen, x) for x in images[2:]]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
    with pytest.raises(AssertionError, match="from Python"):
        run(other, images[0])


@pytest.mark.parametrize("out_features", [("stem_2",), ("stem", "stage2"), ("stage3", "stage5")])
def test_any_features_are_repeated(out_features):
    """All but those of a stem that is a feature and the first block's input: ATen copies that."""
    for spec in TINY:
        if not {*out_features} <= {*VoVNet(TINY[spec]).spec.feature_channels()}:
            continue
        frozen = freeze(network(spec, out_features=out_features))
        x = torch.randn(1, 3, 64, 48)
        first = run(frozen, x)
        for _ in range(3):
            assert all(map(torch.equal, run(frozen, x), first))


def test_repeated_calls_read_the_image_that_they_are_given():
    """Of other strides too: a part of a larger one, and then a dense one again."""
    require_engine(torch.float32)
    model = network("timm")
    frozen = freeze(model)
    large = torch.randn(2, 80, 90, 3).permute(0, 3, 1, 2)
    for _ in range(2):
        for _ in range(4):
            x = large[:, :, 7:55, 9:73]
            assert all(map(torch.equal, run(frozen, x), run(freeze(model), x)))
        large = large.flip(2).contiguous(memory_format=torch.channels_last)
        assert repeated(frozen)[0] > 0
    for _ in range(3):
        dense = torch.randn(2, 3, 48, 64).contiguous(memory_format=torch.channels_last)
        assert all(map(torch.equal, run(frozen, dense), run(freeze(model), dense)))
    assert len(repeated(frozen)) == 1
    assert repeated(frozen)[0] > 0


def test_weights_that_are_written_to_are_noticed():
    frozen, x = freeze(network("detectron2")), torch.randn(1, 3, 40, 40)
    for name in ("weight_3", "shift", "fc_0"):
        for _ in range(3):
            before = run(frozen, x)
        with torch.no_grad():
            getattr(frozen, name).mul_(-1.5)
        found = run(frozen, x)
        assert not torch.equal(found[-1], before[-1])
        assert all(map(torch.equal, found, run(copy.deepcopy(frozen), x)))


def test_what_is_repeated_leaves_earlier_features_alone():
    require_engine(torch.bfloat16)
    frozen = freeze(network("detectron2"), torch.bfloat16)
    kept, copies = [], []
    for _ in range(6):
        kept.append(run(frozen, torch.randn(1, 3, 64, 48)))
        copies.append([f.clone() for f in kept[-1]])
    assert repeated(frozen)[0] > 0
    for ours, theirs in zip(kept, copies, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_what_is_not_finite_stays_so_when_repeated():
    frozen, x = freeze(network("detectron2")), torch.randn(1, 3, 64, 64)
    clean = [run(frozen, x) for _ in range(3)][-1]
    x[0, 1, 30, 31] = torch.nan
    assert all(f.isnan().any() for f in run(frozen, x))
    x[0, 1, 30, 31] = 0
    assert all(f.isfinite().all() for f in run(frozen, x))
    assert all(f.isfinite().all() for f in clean)


def test_each_thread_repeats_calls_of_its_own():
    require_engine(torch.float32)
    frozen = freeze(network("detectron2"))
    images = [torch.randn(1, 3, 64, 48) for _ in range(4)]
    expected = [run(frozen, x) for x in images]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            found = list(pool.map(lambda x: run(frozen, x), images))
            for ours, theirs in zip(found, expected, strict=True):
                assert all(map(torch.equal, ours, theirs))
    assert max(repeated(frozen)) > 0


def test_what_aten_computes_is_not_recorded():
    frozen, x = freeze(network("detectron2"), torch.float64), torch.randn(1, 3, 40, 40)
    first = run(frozen, x)
    assert all(map(torch.equal, first, run(frozen, x)))
    assert all(map(torch.equal, first, run(frozen, x)))
    assert repeated(frozen) == [0]


def test_another_instruction_set_is_noticed():
    cpu = _extension.load("cpu")
    model, x, used = network("detectron2"), torch.randn(1, 3, 40, 40), cpu.isa()
    frozen = freeze(model)
    try:
        for isa in [*cpu.isas(), *reversed(cpu.isas())]:
            cpu.use_isa(isa)
            expected = run(freeze(model), x)
            for _ in range(3):
                assert all(map(torch.equal, run(frozen, x), expected))
    finally:
        cpu.use_isa(used)


def test_recordings_refuse_what_they_cannot_do():
    cpu = _extension.load("cpu")
    x, y = torch.randn(1, 4, 4, 8), torch.empty(1, 4, 4, 8)
    with cpu.Recording() as calls:
        backends.cpu.apply_gates(x, None, None, y)
        with pytest.raises(RuntimeError, match="records already"):
            cpu.Recording().__enter__()
    backends.cpu.apply_gates(x, None, None, y)
    assert len(calls) == 1
    calls.move([(t.data_ptr(), t.nbytes) for t in (x, y)])
    with pytest.raises(ValueError, match="2 pieces of memory, got 1"):
        calls.run(1, [x.data_ptr()])
    other, out = torch.randn_like(x), torch.full_like(y, torch.nan)
    calls.run(1, [other.data_ptr(), out.data_ptr()])
    assert torch.equal(out, other)
    assert torch.equal(y, x)
