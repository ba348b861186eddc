"""Passes of training steps that are made again by their recorded calls."""

import copy
import threading

import pytest
import torch

from tests.extension_cases import require
from tests.tiny import TINY
from vovnet_fast import VoVNet, backends, use_backend
from vovnet_fast.backends import _extension
from vovnet_fast.backends.cpu import convolution, repeats, scratch

OPTIONS = {
    "fixed norms": dict(spec="detectron2"),
    "depthwise": dict(spec="depthwise"),
    "no gate": dict(spec="torchhub"),
    "reductions": dict(spec="seed"),
    "norms of the batch": dict(spec="timm", norm_eval=False),
    "depthwise, norms of the batch": dict(spec="depthwise", norm_eval=False),
    "checkpointed": dict(spec="detectron2", with_cp=True),
    "frozen stages": dict(spec="detectron2", frozen_stages=2),
    "features of the stem": dict(spec="detectron2", out_features=("stem_2", "stem", "stage3")),
}


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    require("cpu")
    if convolution.choose_engine(torch.float32) == convolution.ATEN:
        pytest.skip("no engines here: convolutions are ATen's, which is not recorded")
    torch.manual_seed(0)
    repeats.forget()
    yield
    repeats.forget()


def without(monkeypatch):
    monkeypatch.setattr(backends, "_cpu_repeats", lambda: False)


def network(spec, **options):
    model = VoVNet(TINY[spec], **options).train()
    for name, each in model.state_dict().items():
        if "running_mean" in name or name.endswith("norm.bias"):
            each.normal_()
        elif "running_var" in name:
            each.uniform_(0.5, 2)
    return model


def steps(model, images, dtype=None):
    """Features, gradients and buffers of a few steps, each with other images and weights."""
    found = []
    for number, x in enumerate(images):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_(number % 2 == 0)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            features = model(x)
        sum((f.float() * torch.linspace(-1, 1, f.shape[3])).sum() for f in features).backward()
        found += [f.detach().clone() for f in features]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found += [b.clone() for b in model.buffers()]
        found += [] if x.grad is None else [x.grad.clone()]
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 1e-3 * p.grad.sign()
        model.zero_grad(set_to_none=True)
    return found


def recordings():
    return [p for known in repeats._known.values() for p in known.spare or ()]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


@pytest.mark.versions
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_what_they_are_without(monkeypatch, options, last):
    """To the last bit, in memory that held NaN before, whatever addresses are."""
    format = torch.channels_last if last else torch.contiguous_format
    model = network(**options).to(memory_format=format)
    other = copy.deepcopy(model)
    images = [torch.randn(2, 3, 64, 48).contiguous(memory_format=format) for _ in range(7)]
    ran = []
    make, lend, run = repeats._New.make, scratch.lend, repeats._Pass.run

    def lent(role, size):
        found = lend(role, size)
        return found.fill_(255) if scratch._kept.lends else found

    def new(self, tensors):
        found = make(self, tensors)
        flat = torch.empty(found.untyped_storage().nbytes(), dtype=torch.uint8)
        flat.set_(found.untyped_storage()).fill_(255)
        return found

    monkeypatch.setattr(repeats._New, "make", new)
    monkeypatch.setattr(scratch, "lend", lent)
    monkeypatch.setattr(repeats._Pass, "run", lambda *a: (ran.append(a[0]), run(*a))[1])
    with use_backend("cpu"):
        found = steps(model, images)
        monkeypatch.undo()
        without(monkeypatch)
        expected = steps(other, images)
    assert_same(found, expected)
    parts = 1 + len([b for b in model.modules() if type(b).__name__ == "OSABlock"])
    assert len(ran) > 2 * parts, "hardly anything was repeated"
    # The gradient of a strided convolution's input is oneDNN's.
    left = {key[0][1][0] for key, known in repeats._known.items() if known.spare is None}
    assert left <= {"conv_chain_backward"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(monkeypatch, dtype):
    if convolution.choose_engine(dtype) == convolution.ATEN:
        pytest.skip("no engine for it here")
    model = network("depthwise")
    other = copy.deepcopy(model)
    images = [torch.randn(1, 3, 32, 32) for _ in range(5)]
    with use_backend("cpu"):
        found = steps(model, images, dtype)
        assert recordings()
        without(monkeypatch)
        assert_same(found, steps(other, images, dtype))


def test_other_shapes_threads_and_instruction_sets_are_other_passes(monkeypatch):
    model, threads = network("detectron2"), torch.get_num_threads()
    other = copy.deepcopy(model)
    cpu = _extension.load("cpu")
    isa = cpu.isa()

    def mixed(model):
        found = []
        for number, size in enumerate([32, 40, 32, 64, 40, 32, 32, 40, 64, 32, 32, 64]):
            torch.set_num_threads(1 + number % 2)
            cpu.use_isa(cpu.isas()[number // 2 % len(cpu.isas())])
            torch.manual_seed(number)
            found += steps(model, [torch.randn(1, 3, size, 32)])
        return found

    try:
        with use_backend("cpu"):
            found = mixed(model)
            without(monkeypatch)
            expected = mixed(other)
    finally:
        torch.set_num_threads(threads)
        cpu.use_isa(isa)
    assert_same(found, expected)


def test_threads_at_the_same_time(monkeypatch):
    """Who finds the recording in use computes without it."""
    model = network("detectron2")
    models = [copy.deepcopy(model) for _ in range(3)]
    images = [torch.randn(1, 3, 32, 32) for _ in range(12)]
    results = {}

    def work(number):
        with use_backend("cpu"):
            results[number] = steps(models[number], images)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    without(monkeypatch)
    with use_backend("cpu"):
        expected = steps(model, images)
    for number in range(3):
        assert_same(results[number], expected)


def test_two_graphs_at_the_same_time(monkeypatch):
    """What one forward pass keeps is not the next one's."""
    model = network("detectron2")
    images = [torch.randn(1, 3, 32, 32) for _ in range(4)]

    def grads():
        sums = [sum(f.square().sum() for f in model(x)) for x in images]
        return [torch.autograd.grad(s, list(model.parameters())) for s in reversed(sums)]

    with use_backend("cpu"):
        for _ in range(2):
            grads()
        found = grads()
        without(monkeypatch)
        expected = grads()
    for a, b in zip(found, expected):
        assert_same(a, b)


# --------------------------------------------------------------------------------------
# What is not recorded
# --------------------------------------------------------------------------------------


def copied(x, out):
    """A pass of one call: ``out = x``; the results are a view of what was given, and none."""
    backends._module("cpu").copy(x, out)
    return [out[..., :1], None]


def four(*shape):
    return torch.randn(*shape)


def test_results_may_be_views_of_what_is_given():
    for _ in range(4):
        x, out = four(1, 2, 2, 8), four(1, 2, 2, 8)
        view, none = repeats.repeat("views", [x, out], lambda x=x, out=out: copied(x, out))
        assert torch.equal(out, x)
        assert view.data_ptr() == out.data_ptr()
        assert torch.equal(view, x[..., :1])
        assert none is None
    assert len(recordings()) == 1


@pytest.mark.parametrize(
    "why", ["computed", "overlapping", "elsewhere", "large", "large between", "empty", "shared"]
)
def test_what_cannot_be_repeated_is_computed_every_time(monkeypatch, why):
    kept = four(1, 2, 2, 8)
    if why == "large":
        monkeypatch.setattr(repeats, "MOST_BYTES", 64)
    if why == "large between":
        monkeypatch.setattr(scratch, "MOST", 64)
    for number in range(4):
        both = four(1, 2, 2, 16)
        x, out = both[..., :8], both[..., 8:]
        if why != "overlapping":  # They lie in one another's gaps.
            x, out = x.contiguous(), out.contiguous()
        if why == "empty":
            x, out = x[:0], out[:0]
        ran = []

        def work(x=x, out=out, ran=ran):
            ran.append(1)
            if why == "computed":
                x = x + 0
            if why == "large between":
                between = torch.empty_like(x)
                backends._module("cpu").copy(x, between)
                x = between
            backends._module("cpu").copy(kept if why == "elsewhere" else x, out)
            if why == "shared":
                new = torch.empty(2, 2, 2, 8)
                for half in new.unbind():
                    backends._module("cpu").copy(x, half[None])
                return [new[0], new[1]]
            return [out]

        kept.fill_(number)
        found = repeats.repeat(why, [x, out], work)
        assert ran
        for each in found:
            assert torch.equal(each.flatten(), (kept if why == "elsewhere" else x).flatten())
    assert not recordings()


def test_results_in_memory_that_two_share_are_computed_every_time():
    """The next ones need not lie side by side."""
    for number in range(4):
        both, x = torch.zeros(2, 2, 2, 8), four(1, 2, 2, 8)
        first, second = (both[:1], both[1:]) if number < 2 else four(2, 1, 2, 2, 8)

        def work(x=x, first=first, second=second):
            for each in (first, second):
                backends._module("cpu").copy(x, each)
            return [second]

        [found] = repeats.repeat("both", [x, first, second], work)
        assert found.data_ptr() == second.data_ptr()
        assert torch.equal(found, x)
    assert not recordings()


def test_the_number_of_recordings_is_bounded(monkeypatch):
    monkeypatch.setattr(repeats, "KEPT_PASSES", 8)
    for number in range(40):
        x, out = four(1, 2, 2, 8), four(1, 2, 2, 8)
        for _ in range(2):
            repeats.repeat(number, [x, out], lambda x=x, out=out: copied(x, out))
            repeats.repeat("often", [x, out], lambda x=x, out=out: copied(x, out))
        assert len(repeats._known) <= 8
    assert sum(key[0] == "often" for key in repeats._known) == 1


def test_an_error_leaves_nothing_behind():
    def fail():
        raise ZeroDivisionError

    x, out = four(1, 2, 2, 8), four(1, 2, 2, 8)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            repeats.repeat("fails", [x, out], fail)
    repeats.repeat("fails", [x, out], lambda: copied(x, out))
    with pytest.raises(ZeroDivisionError):  # While it is recorded.
        repeats.repeat("fails", [x, out], fail)
    assert not recordings()
    for _ in range(3):
        repeats.repeat("fails", [x, out], lambda: copied(x, out))
        assert torch.equal(x, out)
    assert len(recordings()) == 1
    assert torch._C._len_torch_dispatch_stack() == 0
