"""Convolutions of few pixels on a CPU by weights as they are, and when they are chosen."""

import pytest
import torch

from tests import extension_cases
from tests.backends.cpu_engines import instruction_set
from tests.backends.test_cpu_backend import threads
from tests.extension_cases import Tensors, require
from tests.features import compared
from tests.tiny import TINY
from vovnet_fast import VoVNet, tuning, use_backend
from vovnet_fast.backends import _extension, _steps, cpu, reference
from vovnet_fast.backends.cpu import convolution, packing, unpacked, weight_grad
from vovnet_fast.selfcheck import calls, cases
from vovnet_fast.tuning import processor

CPU = torch.device("cpu")
DTYPES = unpacked.DTYPES_TAKEN
LAYERS = [
    calls.Layer(1, 1, 1, (1, 1, 1)),
    calls.Layer(1, 33, 24, (2, 3, 5)),
    calls.Layer(1, 64, 97, (1, 4, 4)),
    calls.Layer(1, 40, 18, (3, 5, 4), 2),
    calls.Layer(3, 3, 5, (1, 1, 1)),
    calls.Layer(3, 5, 17, (2, 1, 9)),
    calls.Layer(3, 4, 16, (2, 9, 1), 2),
    calls.Layer(3, 40, 80, (2, 6, 5)),
    calls.Layer(3, 33, 50, (1, 7, 4), 2),
    calls.Layer(3, 32, 70, (2, 2, 2)),
    calls.Layer(3, 20, 13, (1, 4, 61)),
]


def instruction_sets():
    """Those that have it."""
    if _extension.why_not("cpu") is not None:
        return ["baseline"]  # For tests that then skip.
    extension, found = _extension.load("cpu"), []
    for isa in extension.isas():
        with instruction_set(isa):
            found += [isa] * extension.conv_unpacked_runs()
    return found


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


@pytest.fixture(params=instruction_sets())
def isa(request, monkeypatch):
    """An instruction set, on which nothing else is chosen, and nothing packed."""
    monkeypatch.setattr(unpacked, "faster", lambda layer, engine, run: True)
    monkeypatch.setattr(_steps, "training", lambda: True)
    monkeypatch.setattr(packing, "pack", None)
    monkeypatch.setattr(weight_grad, "sums", None)
    with instruction_set(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (calls.conv, {"pool": False}),
        (calls.conv, {"pool": True}),
        (calls.conv_statistics, {}),
        (calls.conv_input_grad, {"scaled": False, "added": False}),
        (calls.conv_input_grad, {"scaled": True, "added": True}),
        (calls.conv_input_grad, {"scaled": False, "added": True, "master": True}),
        (calls.conv_weight_grad, {"scaled": False}),
        (calls.conv_weight_grad, {"scaled": True}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@torch.no_grad()
def test_against_fp64(isa, call, options):
    """In slots surrounded by NaN, from and into crops, and at odd offsets and strides."""
    for case in cases.of_layers(call, *LAYERS, **options):
        for dtype in compared(DTYPES):
            for layout in Tensors.LAYOUTS:
                wrong = extension_cases.check(case, cpu, dtype, CPU, layout)
                assert wrong is None, f"{case.words}, {dtype}, {layout}: {wrong}"


@pytest.mark.parametrize("channels", [1, 15, 33, 48])
@torch.no_grad()
def test_gradients_of_the_concat(isa, channels):
    """What is added and what is masked begin and end anywhere, also within a vector."""
    layer = calls.Layer(1, 48, channels, (2, 3, 5))
    for added in (False, True):
        for masked in {1, 7, channels, 48}:
            options = dict(added=added, masked=masked)
            for case in cases.of_layers(calls.concat_input_grad, layer, **options):
                for dtype in compared(DTYPES):
                    wrong = extension_cases.check(case, cpu, dtype, CPU)
                    assert wrong is None, f"{case.words}, {dtype}: {wrong}"


def weights(c_out, kernel, c_in):
    """As nn.Conv2d has them in both layouts; of half precision; a slice; every other channel."""
    plain = torch.randn(c_out, c_in, kernel, kernel) / (c_in * kernel**2) ** 0.5
    last = plain.to(memory_format=torch.channels_last)
    wide = torch.randn(c_out, 2 * c_in, kernel, kernel)
    given = [plain, last, last.to(torch.bfloat16), plain.half(), wide[:, :c_in], wide[:, ::2]]
    wide = wide.to(memory_format=torch.channels_last)
    return [w.permute(0, 2, 3, 1) for w in (*given, wide[:, c_in:], plain.double())]


def passes(x, g, weight, scale, stride):
    """What all three give."""
    out, dx = g.new_full(g.shape, torch.nan), x.new_full(x.shape, torch.nan)
    unpacked.conv(x, weight, scale, scale, out, stride=stride, relu=True)
    unpacked.input_grad(g, weight, scale, dx, stride=stride)
    found = [out, dx]
    if unpacked.can_hold_gradient(weight):
        found += unpacked.weight_grad(x, g, weight, scale, stride=stride)
    return found


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
@torch.no_grad()
def test_weights_of_any_strides(isa, kernel, stride):
    x, scale = torch.randn(2, 6, 5, 24), torch.rand(21) + 0.5
    g = torch.randn(2, -(-6 // stride), -(-5 // stride), 21)
    held = 0
    for weight in weights(21, kernel, 24):
        found = passes(x, g, weight, scale, stride)
        exact = [t.double() for t in (x, g, weight, scale)]
        out, dx = torch.empty_like(exact[1]), torch.empty_like(exact[0])
        reference.conv(exact[0], exact[2], exact[3], exact[3], out, stride=stride)
        reference.conv_input_grad(exact[1], exact[2], exact[3], dx, stride=stride)
        grads = reference.conv_weight_grad(*exact[:2], exact[2], exact[3], stride=stride)
        for a, b in zip(found, (out, dx, *grads), strict=False):
            assert (a - b).abs().max() < 2e-6 * b.abs().max()
        if len(found) > 2:
            held += 1
            assert found[2].stride() == weight.stride()
    assert held >= 5


@torch.no_grad()
def test_the_number_of_threads_does_not_change_a_bit(isa):
    for kernel, c_in, c_out, size in ((3, 64, 72, 6), (1, 300, 112, 9), (3, 64, 200, 2)):
        x, g, scale = torch.randn(2, size, size, c_in), torch.randn(2, size, size, c_out), None
        scale = torch.rand(c_out)
        for weight in weights(c_out, kernel, c_in)[:2]:
            with threads(1):
                alone = passes(x, g, weight, scale, 1)
            for number in (2, 3, 7):
                with threads(number):
                    together = passes(x, g, weight, scale, 1)
                assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_large_gradients_written_past_the_caches_are_complete(isa):
    """In memory that was something else before."""
    x, weight = torch.randn(1, 2, 2, 600), torch.randn(512, 600, 1, 1).permute(0, 2, 3, 1)
    g, scale = torch.randn(1, 2, 2, 512), torch.rand(512)
    for _ in range(3):
        found, dscale, _ = unpacked.weight_grad(x, g, weight, scale, stride=1)
        sums = torch.einsum("nhwo,nhwi->oi", g.double(), x.double())[:, None, None]
        assert (found - sums * scale[:, None, None, None]).abs().max() < 1e-4
        assert (dscale - (sums * weight).sum((1, 2, 3))).abs().max() < 1e-3
        found.fill_(torch.nan)


# --------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Choices are measured, by a clock that has no other hands: its list of one number."""
    if not instruction_sets():
        pytest.skip("no instruction set here has it")
    now = [0.0]
    monkeypatch.setenv("VOVNET_FAST_TUNE", "1")
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now[0])
    tuning._table.cache_clear()
    unpacked._faster.cache_clear()
    yield now
    tuning._table.cache_clear()
    unpacked._faster.cache_clear()


@pytest.mark.parametrize("slow", ["fma", unpacked.NAME])
def test_a_slow_engine_is_avoided(measuring, slow):
    weight = torch.randn(24, 16, 3, 3).permute(0, 2, 3, 1)
    layer = unpacked.layer_of("convolution of", torch.empty(1, 5, 5, 24), weight, 1, torch.float32)
    seen = []

    def run(engine, x, given, out):
        seen.append((engine, x.shape, given.stride(), out.shape))
        measuring[0] += 1 + (engine == slow)

    assert unpacked.faster(layer, "fma", run) == (slow == "fma")
    assert {each[0] for each in seen} == {"fma", unpacked.NAME}
    assert {each[1:] for each in seen} == {((1, 5, 5, 16), weight.stride(), (1, 5, 5, 24))}
    number = len(seen)
    unpacked._faster.cache_clear()
    tuning._table.cache_clear()  # As the next process finds it.
    assert unpacked.faster(layer, "fma", run) == (slow == "fma")
    assert len(seen) == number


def test_what_is_asked_and_what_not(measuring, monkeypatch):
    weight = torch.randn(8, 4, 3, 3).permute(0, 2, 3, 1)

    def asked(pixels, dtype=torch.float32):
        found = []
        layer = unpacked.layer_of("", torch.empty(1, 1, pixels, 8), weight, 1, dtype)
        chosen = unpacked.faster(layer, "fma", lambda *given: found.append(given))
        return bool(found), chosen

    assert asked(unpacked.MOST_PIXELS)[0]
    assert asked(unpacked.MOST_PIXELS + 1) == (False, False)
    assert asked(4, torch.float64) == (False, False)
    torch.use_deterministic_algorithms(True)
    try:
        assert asked(unpacked.STATIC_PIXELS) == (False, True)
        assert asked(unpacked.STATIC_PIXELS + 1) == (False, False)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    assert asked(unpacked.STATIC_PIXELS - 1) == (False, True)
    assert asked(unpacked.STATIC_PIXELS + 2) == (False, False)


def test_engines_are_timed_by_what_they_do():
    engine = convolution.choose_engine(torch.float32)
    if engine == "aten":
        pytest.skip("no engines here")
    for module, trial in (
        (convolution, convolution.unpacked_trial),
        (convolution, convolution._unpacked_grad_trial),
        (weight_grad, weight_grad._unpacked_trial),
    ):
        for stride in (1, 2):
            for order in (torch.contiguous_format, torch.channels_last):
                weight = torch.randn(8, 16, 3, 3).to(memory_format=order).permute(0, 2, 3, 1)
                out = torch.empty(1, 3, 4, 8)
                layer = unpacked.layer_of("", out, weight, stride, torch.float32)
                run = unpacked._prepare(layer, trial)
                for name in (unpacked.NAME, module.choose_engine(torch.float32)):
                    run(name)


def test_training_steps_of_small_images_pack_less(monkeypatch):
    engine = convolution.choose_engine(torch.float32)
    if engine == "aten":
        pytest.skip("no engines here")
    made = []
    pack = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *a, **k: (made.append(1), pack(*a, **k))[1])
    model = VoVNet(TINY["detectron2"]).eval()
    x = torch.randn(1, 3, 32, 32)
    with use_backend("cpu"):
        sum(f.sum() for f in model(x)).backward()
        packed = len(made)
        monkeypatch.setattr(unpacked, "faster", lambda layer, engine, run: False)
        sum(f.sum() for f in model(x)).backward()
        assert len(made) - packed > packed
        monkeypatch.setattr(unpacked, "faster", lambda layer, engine, run: True)
        made.clear()
        features = model(x)
        assert not made, "the forward pass of a step packs weights"
        sum(f.sum() for f in features).backward()
    assert not made


@torch.no_grad()
def test_without_gradients_all_calls_are_on_one_engine(monkeypatch):
    """Features do not change in the last bits when a network's weights have been packed."""
    if convolution.choose_engine(torch.float32) == "aten":
        pytest.skip("no engines here")
    monkeypatch.setattr(unpacked, "conv", None)
    model = VoVNet(TINY["detectron2"]).eval()
    x = torch.randn(1, 3, 32, 32)
    with use_backend("cpu"):
        first, second, third = (model(x) for _ in range(3))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
