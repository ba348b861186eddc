"""Frozen networks on every backend, against the modules that they are made of.

In this folder, because the Triton backend runs in the interpreter here.
"""

import copy
import io
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import straight_line
from tests.tiny import FIRST, TINY
from vovnet_fast import VoVNet, backends, load_frozen
from vovnet_fast.compat import zip
from vovnet_fast.deploy import frozen as module
from vovnet_fast.deploy.freeze import KEPT_SHAPES, FrozenVoVNet, freeze
from vovnet_fast.ops.memory import Arena


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("on a GPU: tests/deploy/test_freeze_gpu.py")
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture
def fused(monkeypatch):
    """The fused path, arenas and all, on the reference backend: that is quick."""
    monkeypatch.setattr(backends, "fused", lambda *_: True)


class Poisoned(Arena):
    """Every tensor is NaN when it is handed out, and with it whatever shares its memory."""

    def scratch(self, role, like, *shape):
        return super().scratch(role, like, *shape).fill_(float("nan"))


def network(spec="detectron2", dtype=torch.float64, **options):
    torch.manual_seed(0)
    spec = TINY.get(spec, spec)
    return straight_line.randomise(VoVNet(spec, **options)).to(dtype).eval()


def image(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (1, 3, 40, 40)), dtype=dtype)


def eager(model, x):
    chosen = backends.fused
    backends.fused = lambda *_: False
    try:
        with torch.no_grad():
            return model.eval()(x)
    finally:
        backends.fused = chosen


def assert_equal(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def arenas(frozen):
    return [workspace.arena for _, workspace in frozen._caches.workspaces._spare]


@pytest.mark.parametrize("name", list(TINY))
def test_equals_eager(name, backend):
    model, x = network(name), image(1, 3, 37, 45)
    frozen = freeze(model)
    assert_equal(frozen(x), eager(model, x))
    assert frozen.feature_channels == model.feature_channels
    assert frozen.feature_strides == model.feature_strides
    assert frozen.out_features == model.out_features
    assert frozen.spec == model.spec


def test_a_published_architecture():
    model, x = network("V-19-slim-dw-eSE"), image(1, 3, 64, 96)
    assert_equal(freeze(model)(x), eager(model, x))


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize(
    "out_features",
    [("stem_2",), ("stem_2", "stem", "stage3"), ("stem", "stage5"), ("stage2", "stage3")],
)
def test_chosen_features(name, out_features, monkeypatch):
    """On plain PyTorch, and in an arena where every reuse of live memory would show."""
    model, x = network(name, out_features=out_features), image()
    frozen, expected = freeze(model), eager(model, x)
    assert_equal(frozen(x), expected)
    monkeypatch.setattr(backends, "fused", lambda *_: True)
    monkeypatch.setattr(module, "Arena", Poisoned)
    for _ in range(2):
        assert_equal(frozen(x), expected)


@pytest.mark.parametrize("original", ["fp32", "same dtype"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.versions), torch.float32],
)
def test_low_precision_is_no_worse_than_eager(dtype, original, backend):
    """Error against fp64 at most twice that of eager in the same dtype."""
    if backend == "triton" and original == "fp32":
        pytest.skip("slow in the interpreter, and the scales are the same")
    x = image()
    model = network(dtype=torch.float32 if original == "fp32" else dtype)
    expected = eager(copy.deepcopy(model).double(), x)
    in_eager = eager(copy.deepcopy(model).to(dtype), x.to(dtype))
    for ours, theirs, right in zip(freeze(model, dtype)(x), in_eager, expected, strict=True):
        assert ours.dtype == dtype
        error, allowed = ((f.double() - right).norm() for f in (ours, theirs))
        assert error <= 2 * allowed


@pytest.mark.parametrize("kind", ["BN", "SyncBN", "FrozenBN"])
def test_the_original_is_left_as_it_is(kind):
    model = network(norm_cfg=dict(type=kind), norm_eval=False, frozen_stages=1).train()
    model.stage2.requires_grad_(True)  # As nobody would; but it is theirs to do.
    model.first_weight.grad = torch.ones_like(model.first_weight)
    before = copy.deepcopy(model)
    frozen = freeze(model)
    x = image()
    with torch.inference_mode():
        frozen(x)
    for (name, a), (_, b) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert a.training == b.training, name
    for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, name
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    mine = {t.untyped_storage().data_ptr() for t in frozen.buffers()}
    assert mine.isdisjoint(t.untyped_storage().data_ptr() for t in model.state_dict().values())
    expected = eager(model, x)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert_equal(frozen(x), expected)


# --- Memory ---------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Shapes of new tensors."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        assert name in ("new_empty", "empty", "empty_like", "copy_") or func.is_view, name
        if "empty" in name:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: tests/deploy/test_freeze_gpu.py")
@pytest.mark.parametrize("name", ["detectron2", "depthwise"])
def test_a_repeated_call_allocates_nothing_but_the_features(name, monkeypatch):
    """And, in the backend, the eSE pool's sums and the gates. Kernels are not run here."""
    frozen, x = freeze(network(name, torch.float32)), image(2, 3, 64, 64)
    monkeypatch.setattr("vovnet_fast.kernels._common.Launch.run", lambda *_: None)
    # The test's own mode is to see what happens without one.
    monkeypatch.setattr("vovnet_fast.deploy.frozen.watching", lambda *_, **options: None)
    monkeypatch.setattr("vovnet_fast.network.decision.watching", lambda *_, **options: None)
    with backends.use_backend("triton"):
        frozen(x)
        with Allocations() as record:
            features = frozen(x)
    maps = [shape for shape in record.shapes if len(shape) == 4]
    assert maps == [tuple(f.permute(0, 2, 3, 1).shape) for f in features]
    blocks = len(list(frozen.spec.blocks()))
    assert len(record.shapes) - len(maps) == 3 * blocks  # Sums, mean, gates.


class Counted(Arena):
    """What every tensor would need if none used the memory of another."""

    def __init__(self, *args):
        super().__init__(*args)
        self.nbytes = 0

    def scratch(self, role, like, *shape):
        tensor = super().scratch(role, like, *shape)
        self.nbytes += tensor.nbytes
        return tensor


@pytest.mark.parametrize("name", list(TINY))
def test_workspace_bytes(name, fused, monkeypatch):
    monkeypatch.setattr(module, "Arena", Counted)
    frozen, shape = freeze(network(name)), (2, 3, 64, 64)
    frozen(image(*shape))
    [arena] = arenas(frozen)
    held = sum(slab.nbytes for slab in arena._slabs.values())
    assert frozen.workspace_bytes(shape) == held < 0.7 * arena.nbytes


def test_results_are_never_overwritten(fused):
    """Whatever images and shapes come later, and however the two are interleaved."""
    model = network()
    frozen = freeze(model)
    kept = []
    for side in (40, 48, 40, 64, 48, 40):
        x = image(1, 3, side, side + 8)
        found = frozen(x)
        kept.append((x, found, [f.clone() for f in found]))
    workspace = {
        slab.untyped_storage().data_ptr()
        for arena in arenas(frozen)
        for slab in arena._slabs.values()
    }
    assert len(arenas(frozen)) == 3
    for x, found, copies in kept:
        assert all(map(torch.equal, found, copies))
        assert_equal(found, eager(model, x))
        owned = {f.untyped_storage().data_ptr() for f in found}
        assert len(owned) == len(found)
        assert owned.isdisjoint(workspace)


def test_few_shapes_are_kept(fused):
    frozen = freeze(network("timm", torch.float32, out_features=("stem_2",)))
    for side in range(40, 40 + 2 * KEPT_SHAPES):
        frozen(image(1, 3, side, side))
    first = arenas(frozen)[0]
    assert len(arenas(frozen)) == KEPT_SHAPES
    frozen(image(1, 3, 40 + KEPT_SHAPES, 40 + KEPT_SHAPES))
    assert arenas(frozen)[-1] is first


def test_threads_share_no_arena(fused, monkeypatch):
    model = network()
    frozen = freeze(model)
    used, together = [], threading.Barrier(2, timeout=600)
    run = module.run

    def meet(backend, view, params, out_features, memory):
        used.append(memory)
        together.wait()
        found = run(backend, view, params, out_features, memory)
        together.wait()
        return found

    monkeypatch.setattr(module, "run", meet)
    images = [image() for _ in range(2)]
    found = [None, None]

    def work(i):
        for _ in range(3):
            found[i] = frozen(images[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(used) == 6
    assert all(a is not b for a, b in zip(used[::2], used[1::2], strict=True))
    for x, features in zip(images, found, strict=True):
        assert_equal(features, eager(model, x))


def test_an_arena_of_inference_mode_serves_outside_it(fused):
    model = network(out_features=("stem", "stage2"))  # A stem that is returned is copied.
    frozen, x = freeze(model, torch.float32), image()
    with torch.inference_mode():
        frozen(x)
    with torch.no_grad():
        frozen(x)
    assert_equal(frozen(x), eager(model.float(), x.float()), 1e-5)


def test_an_arena_whose_call_failed_is_dropped(fused, monkeypatch):
    frozen, x = freeze(network()), image()
    frozen(x)
    with monkeypatch.context() as patch:
        patch.setattr(module, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            frozen(x)
    assert arenas(frozen) == []
    frozen(x)


# --- What modules can do --------------------------------------------------------------


def test_dtypes_and_layouts(backend):
    model, x = network(dtype=torch.float32), image()
    expected = [f.double() for f in eager(model, x.float())]
    frozen = freeze(model, torch.bfloat16, torch.contiguous_format, out_dtype=torch.float32)
    found = frozen(x.to(memory_format=torch.channels_last))
    assert all(f.dtype == torch.float32 and f.is_contiguous() for f in found)
    assert_equal([f.double() for f in found], expected, 0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        found = freeze(model)(x)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in found)
    assert_equal([f.double() for f in found], expected, 1e-5)


def test_sliced_and_empty_inputs(backend):
    model = network("seed")
    frozen = freeze(model)
    x = image(2, 5, 29, 62)[:, 1:4, :, ::2]
    assert_equal(frozen(x), eager(model, x))
    x = image(0, 3, 40, 40)
    assert [f.shape for f in frozen(x)] == [f.shape for f in eager(model, x)]


def test_copies_state_dicts_and_pickles(fused):
    model, x = network("depthwise"), image()
    frozen = freeze(model)
    expected = frozen(x)
    stream = io.BytesIO()
    torch.save(frozen, stream)
    stream.seek(0)
    other = freeze(straight_line.randomise(VoVNet(TINY["depthwise"]).double()))
    other(x)
    other.load_state_dict(frozen.state_dict(), assign=True)
    loaded = torch.load(stream, weights_only=False)
    replica = frozen._replicate_for_data_parallel()
    for twin in (copy.deepcopy(frozen), loaded, other, replica):
        assert arenas(twin) == []
        assert_equal(twin(x), expected)
    assert len(arenas(frozen)) == 1
    assert not list(frozen.parameters())


def test_moves_but_keeps_its_dtype():
    model, x = network(dtype=torch.float32), image()
    frozen = freeze(model, torch.float16)
    expected = frozen(x)
    for convert in (
        lambda: frozen.to("cpu"),
        lambda: frozen.half(),  # The dtype that it has; its shifts stay in fp32.
        lambda: frozen.to(memory_format=torch.channels_last),
        lambda: frozen.train(),
        lambda: frozen.requires_grad_(),
    ):
        assert convert() is frozen
        assert frozen.shift.dtype == torch.float32
        assert all(buffer.is_contiguous() for buffer in frozen.buffers())
        assert not any(m.training for m in frozen.modules())
        assert_equal(frozen(x), expected, 0)
    for convert in (frozen.float, frozen.bfloat16, lambda: frozen.to(torch.float64)):
        with pytest.raises(TypeError, match="freeze the original again, with dtype=torch"):
            convert()
    assert frozen.to("meta").shift.device.type == "meta"


def test_what_cannot_be_done_is_said():
    model, x = network(), image()
    frozen = freeze(model)
    group = VoVNet(TINY["detectron2"], norm_cfg=dict(type="GN", num_groups=4))
    for call, error, message in (
        (lambda: frozen(x.clone().requires_grad_()), RuntimeError, "has no backward pass"),
        (lambda: frozen(x[0]), ValueError, r"must be \[N, C, H, W\]"),
        (lambda: frozen(x[:, :2]), ValueError, "must have 3 channels"),
        (lambda: frozen(x.byte()), TypeError, "float16, bfloat16"),
        (lambda: frozen(x[..., :28]), ValueError, "40x28 is too small: stage5"),
        (lambda: frozen(x.to("meta")), ValueError, "image is on meta and the frozen VoVNet on cpu"),
        (lambda: freeze(model, graph=True)(x), RuntimeError, "captures CUDA graphs"),
        (lambda: freeze(model, torch.int8), TypeError, "dtype must be float16"),
        (lambda: freeze(model, out_dtype=torch.int8), TypeError, "out_dtype must be float16"),
        (lambda: freeze(model, memory_format=torch.preserve_format), ValueError, "memory_format"),
        (lambda: freeze(frozen), TypeError, "takes a vovnet_fast.VoVNet, got FrozenVoVNet"),
        (lambda: freeze(group), backends.BackendError, "not GroupNorm"),
    ):
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad():
        frozen(x.clone().requires_grad_())


def test_compiles_without_a_graph_break(backend):
    model, x = network("depthwise", torch.float32, out_features=FIRST), image()
    frozen = freeze(model, torch.float64)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x), eager(model.double(), x))
    assert arenas(frozen) == []


def test_exports():
    model, x = network("depthwise"), image()
    program = torch.export.export(freeze(model), (x,))
    assert_equal(program.module()(x), eager(model, x))
    assert isinstance(freeze(model), FrozenVoVNet)


def test_one_from_a_file_is_the_same_bit_for_bit(backend, tmp_path):
    frozen = freeze(network("depthwise", out_features=("stem", "stage2")), torch.float16)
    frozen.save(tmp_path / "network.safetensors")
    loaded, x = load_frozen(tmp_path / "network.safetensors"), image(1, 3, 16, 19)
    assert all(map(torch.equal, loaded(x), frozen(x)))
