"""A frozen network follows what happens to its buffers, or says that it could not see it."""

import multiprocessing

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from tests.fused import fused
from tests.tiny import TINY
from vovnet_fast import VoVNet, freeze, use_backend
from vovnet_fast.backends import _extension
from vovnet_fast.compat import zip

needs_extension = pytest.mark.skipif(
    _extension.why_not("cpu") is not None, reason="the extension's CPU half is not built"
)
BACKENDS = ["auto", "reference", pytest.param("cpu", marks=needs_extension)]


@pytest.fixture
def frozen():
    torch.manual_seed(0)
    return freeze(VoVNet(TINY["detectron2"]))


@pytest.fixture
def x():
    return torch.randn(1, 3, 48, 48)


def expected(frozen, x):
    with use_backend("reference"):
        frozen.refresh()
        return frozen(x)


def assert_close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


CHANGES = {
    "in place": lambda f: f.weight_3.mul_(2),
    "in place, a shift": lambda f: f.shift.add_(0.1),
    "an attribute": lambda f: setattr(f, "weight_3", f.weight_3 * 2),
    "register_buffer": lambda f: f.register_buffer("weight_3", f.weight_3 * 2),
    "a state dict": lambda f: f.load_state_dict(
        {k: v * 2 if k == "weight_3" else v for k, v in f.state_dict().items()}
    ),
    "a state dict that is assigned": lambda f: f.load_state_dict(
        {k: v * 2 if k == "weight_3" else v for k, v in f.state_dict().items()}, assign=True
    ),
    "_apply": lambda f: f.share_memory(),
}

UNSEEN = {
    "data": lambda f: f.weight_3.data.mul_(2),
    "numpy": lambda f: f.weight_3.numpy().__imul__(2),
    "dlpack": lambda f: torch.from_dlpack(f.weight_3.__dlpack__()).mul_(2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_can_be_seen_is_followed(frozen, x, backend, change):
    with use_backend(backend):
        for _ in range(4):  # Calls are recorded at the third.
            before = frozen(x)
        change(frozen)
        for _ in range(4):
            after = frozen(x)
    assert_close(after, expected(frozen, x))
    if change is not CHANGES["_apply"]:
        assert not torch.allclose(after[-1], before[-1], rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
def test_what_cannot_be_seen_is_there_after_refresh(frozen, x, backend, change):
    with use_backend(backend):
        for _ in range(4):
            frozen(x)
        change(frozen)
        frozen.refresh()
        after = frozen(x)
    assert_close(after, expected(frozen, x))


def _double(frozen):
    frozen.weight_3.mul_(2)


def test_another_process_writes_to_shared_memory(frozen, x):
    frozen.share_memory()
    with use_backend("auto"):
        for _ in range(4):
            frozen(x)
        process = multiprocessing.get_context("fork").Process(target=_double, args=(frozen,))
        process.start()
        process.join()
        frozen.refresh()
        after = frozen(x)
    assert_close(after, expected(frozen, x))


@needs_extension
@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
def test_a_debug_check_finds_what_cannot_be_seen(frozen, x, change, monkeypatch):
    monkeypatch.setenv("VOVNET_FAST_CHECK", "1")
    with use_backend("cpu"):
        for _ in range(4):
            frozen(x)
        change(frozen)
        with pytest.raises(RuntimeError, match=r"a weight of \[.*does not\s+count.*refresh\(\)"):
            frozen(x)
        frozen.refresh()
        frozen(x)
        monkeypatch.setenv("VOVNET_FAST_CHECK", "yes")
        with pytest.raises(ValueError, match="VOVNET_FAST_CHECK must be one of 0, 1, got 'yes'"):
            frozen(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_functional_call_takes_its_own_and_leaves_them(frozen, x, backend):
    other = {name: buffer * 2 for name, buffer in frozen.named_buffers() if name == "weight_3"}
    with use_backend(backend):
        before = [frozen(x) for _ in range(4)][-1]
        called = functional_call(frozen, other, (x,))
        after = frozen(x)
    assert_close(after, before)
    frozen.weight_3.mul_(2)
    assert_close(called, expected(frozen, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_buffer_that_does_not_fit_is_refused(frozen, x, backend):
    good = frozen.weight_3
    with use_backend(backend):
        before = frozen(x)
        for wrong in (good[:, :1], good.double(), None):
            frozen.weight_3 = wrong
            with pytest.raises(ValueError, match=r"the buffer weight_3 must be \[.*freeze the"):
                frozen(x)
        frozen.weight_3 = good
        assert_close(frozen(x), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constants_are_constants(frozen, x, backend):
    """Scales are in the weights in fp32, and not looked at by PyTorch's convolutions."""
    with use_backend(backend):
        before = frozen(x)
        for name, value in (("scale", 1), ("ones", 1), ("zeros", 0)):
            getattr(frozen, name).add_(0.5)
            with pytest.raises(ValueError, match=f"buffer {name} must be {value} throughout"):
                frozen(x)
            getattr(frozen, name).fill_(value)
            assert_close(frozen(x), before)


def test_shapes_alone_do_not_reach_a_kernel(frozen, x):
    expected = [y.shape for y in frozen(x)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for backend in ("auto", "reference"):
        with use_backend(backend), mode:
            found = frozen(mode.from_tensor(x))
        assert [y.shape for y in found] == expected
    with fused(), mode:
        assert [y.shape for y in frozen(mode.from_tensor(x))] == expected


@needs_extension
def test_shapes_alone_do_not_reach_a_kernel_that_was_asked_for(frozen, x):
    expected = [y.shape for y in frozen(x)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with use_backend("cpu"), mode:
        assert [y.shape for y in frozen(mode.from_tensor(x))] == expected
    with use_backend("cpu"), torch.device("meta"):
        assert_close(frozen(x), frozen(x))
