"""The extension's own convolutions on a CPU, engine by engine, and their packed weights."""

import gc
import math
import types

import pytest
import torch

from tests import extension_cases
from tests.backends.cpu_engines import DTYPES, engine_combinations, instruction_set
from tests.backends.test_cpu_backend import threads
from tests.extension_cases import Tensors, require
from tests.features import compared
from vovnet_fast import tuning
from vovnet_fast.backends import _extension, cpu, reference
from vovnet_fast.backends.cpu import convolution, packing, unpacked, weight_grad
from vovnet_fast.selfcheck import calls, cases
from vovnet_fast.tuning import processor

CPU = torch.device("cpu")
LAYERS = [
    calls.Layer(3, 3, 5, (1, 1, 1)),
    calls.Layer(3, 5, 17, (2, 1, 9)),
    calls.Layer(3, 4, 16, (2, 9, 1), 2),
    calls.Layer(3, 3, 64, (1, 33, 47), 2),
    calls.Layer(3, 3, 24, (2, 14, 6)),
    calls.Layer(3, 1, 40, (2, 7, 9)),
    calls.Layer(3, 2, 20, (1, 8, 30), 2),
    calls.Layer(3, 40, 80, (2, 13, 11), 2),
    calls.Layer(3, 33, 50, (1, 1, 64), 2),
    calls.Layer(3, 70, 112, (1, 33, 47)),
    calls.Layer(3, 256, 160, (1, 9, 20)),  # A part of the channels in each of several groups.
    calls.Layer(3, 512, 224, (1, 20, 20)),  # Weights that do not stay in a cache.
    calls.Layer(3, 64, 48, (1, 61, 50)),  # Several strips, the last one smaller.
    calls.Layer(1, 1, 1, (1, 1, 1)),
    calls.Layer(1, 33, 24, (2, 17, 31)),
    calls.Layer(1, 64, 96, (2, 4, 8)),  # Just one block of pixels, read where they lie.
    calls.Layer(1, 64, 80, (2, 3, 11)),
    calls.Layer(1, 768, 64, (1, 40, 24)),
    calls.Layer(1, 32, 24, (1, 9, 12), 2),
]


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


@pytest.fixture(params=engine_combinations("conv_engines"), ids="-".join)
def engine(request):
    """An engine by name, on one of the instruction sets that it runs on."""
    name, isa = request.param
    with instruction_set(isa):
        yield name


def backend_of(engine):
    """What cases call: a convolution on this engine."""

    def conv(*tensors, stride=1, relu=True, pool=False):
        return convolution.run_engine(engine, *tensors, stride=stride, relu=relu, pool=pool)

    return types.SimpleNamespace(conv=conv)


def run(engine, x, weight, scale, shift, *, stride=1, relu=True, pool=False):
    """The output in memory of its own, and its sums."""
    n, h, w, _ = x.shape
    out = x.new_full((n, (h - 1) // stride + 1, (w - 1) // stride + 1, weight.shape[0]), torch.nan)
    options = dict(stride=stride, relu=relu, pool=pool)
    return out, convolution.run_engine(engine, x, weight, scale, shift, out, **options)


def parameters(dtype, *shape):
    weight = torch.randn(shape).div_(math.prod(shape[1:]) ** 0.5).to(dtype)
    return weight, *torch.randn(2, shape[0])


@pytest.mark.parametrize("pool", [False, True])
@torch.no_grad()
def test_against_fp64(engine, pool):
    """In slots surrounded by NaN, from and into crops, and at odd offsets and strides."""
    backend = backend_of(engine)
    for case in cases.of_layers(calls.conv, *LAYERS, pool=pool):
        for dtype in compared(DTYPES[engine]):
            for layout in Tensors.LAYOUTS:
                wrong = extension_cases.check(case, backend, dtype, CPU, layout)
                assert wrong is None, f"{case.words}, {dtype}, {layout}: {wrong}"


@pytest.fixture
def chosen(monkeypatch, engine):
    """The engine, which is what the backend's functions choose."""
    monkeypatch.setattr(convolution, "choose_engine", lambda dtype: engine)
    monkeypatch.setattr(unpacked, "faster", lambda layer, engine, run: False)
    return engine


FEW = [
    calls.Layer(3, 3, 5, (1, 1, 1)),
    calls.Layer(3, 40, 72, (2, 13, 11)),
    calls.Layer(3, 160, 33, (1, 9, 20)),  # A part of the channels in each of several groups.
    calls.Layer(3, 48, 64, (1, 61, 20)),  # Several strips, the last one smaller.
    calls.Layer(1, 33, 24, (2, 17, 31)),
]
GRADIENTS = [
    {"scaled": False, "added": False},
    {"scaled": True, "added": True},
    {"scaled": False, "added": True, "master": True},
]


@pytest.mark.parametrize("options", GRADIENTS, ids=str)
@torch.no_grad()
def test_gradients_of_inputs(chosen, options):
    """Added to what is in the slot, in place, and masked; of scaled, and of fp32 weights."""
    for case in cases.of_layers(calls.conv_input_grad, *FEW, **options):
        for dtype in compared(DTYPES[chosen]):
            wrong = extension_cases.check(case, cpu, dtype, CPU)
            assert wrong is None, f"{case.words}, {dtype}: {wrong}"


@pytest.mark.parametrize("channels", [1, 8, 15, 33, 48])
@torch.no_grad()
def test_gradients_of_the_concat(chosen, channels):
    """What is added and what is masked begin and end anywhere, also within a vector."""
    layer = calls.Layer(1, 48, channels, (2, 7, 9))
    for added in (False, True):
        for masked in {1, 7, channels, 48}:
            options = dict(added=added, masked=masked)
            for case in cases.of_layers(calls.concat_input_grad, layer, **options):
                for dtype in compared(DTYPES[chosen]):
                    for layout in Tensors.LAYOUTS:
                        wrong = extension_cases.check(case, cpu, dtype, CPU, layout)
                        assert wrong is None, f"{case.words}, {dtype}, {layout}: {wrong}"


@torch.no_grad()
def test_outputs_with_statistics(chosen):
    strided = calls.Layer(3, 40, 80, (2, 13, 11), 2)
    for case in cases.of_layers(calls.conv_statistics, strided, *FEW):
        for dtype in compared(DTYPES[chosen]):
            wrong = extension_cases.check(case, cpu, dtype, CPU)
            assert wrong is None, f"{case.words}, {dtype}: {wrong}"


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("c_in", [2, 20, 32, 150])
def test_a_weight_of_any_strides_is_packed_as_its_copy_is(engine, kernel, c_in):
    """As nn.Conv2d has it, in channels_last, a slice of channels; scaled, and transposed."""
    c_out = 24 if c_in < 100 else 71
    like_modules = torch.randn(c_out, c_in + 3, kernel, kernel).permute(0, 2, 3, 1)
    for weight in (like_modules[..., 3:], like_modules.contiguous()[..., :c_in]):
        for dtype in DTYPES[engine]:
            scale = torch.rand(c_out)
            for transposed in (False, True):
                exact = weight * scale[:, None, None, None]
                if transposed:
                    exact = exact.flip(1, 2).permute(3, 1, 2, 0)
                copied = packing.pack(engine, exact.to(dtype).contiguous())
                options = dict(dtype=dtype, transposed=transposed)
                assert torch.equal(packing.pack(engine, weight, scale, **options), copied)


def test_a_weight_of_any_dtype_is_packed_as_it_is_rounded(engine):
    for dtype in DTYPES[engine]:
        for given in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for last in (False, True):
                weight = torch.randn(20, 70, 3, 3).to(given).permute(0, 2, 3, 1)
                weight = weight.contiguous() if last else weight
                rounded = packing.pack(engine, weight.to(dtype).contiguous())
                assert torch.equal(packing.pack(engine, weight, dtype=dtype), rounded)


def test_wide_weights_are_packed_transposed(engine):
    """Blocks are wider where there is work for all threads; what they make is the same."""
    for dtype in DTYPES[engine]:
        weight, scale = torch.randn(300, 3, 3, 333).to(dtype), torch.rand(300)
        expected = (weight.float() * scale[:, None, None, None]).to(dtype)
        expected = packing.pack(engine, expected.flip(1, 2).permute(3, 1, 2, 0).contiguous())
        by_taps = weight.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        for number in (1, 2, 7):
            with threads(number):
                for given in (weight, by_taps):
                    found = packing.pack(engine, given, scale, transposed=True)
                    assert torch.equal(found, expected)


@pytest.mark.parametrize("function", ["conv", "conv_statistics"])
def test_a_weight_is_taken_as_it_is(chosen, function):
    """In another dtype than the activations and by taps, as modules have it under autocast."""
    dtype = DTYPES[chosen][0]
    x, out = torch.randn(2, 7, 6, 33).to(dtype), torch.empty(2, 7, 6, 18, dtype=dtype)
    weight = torch.randn(18, 33, 3, 3).permute(0, 2, 3, 1)
    found = []
    for given in (weight, weight.to(dtype).contiguous()):
        vectors = (torch.ones(18), torch.zeros(18)) if function == "conv" else ()
        getattr(cpu, function)(x, given, *vectors, out.fill_(float("nan")))
        found.append(out.clone())
    assert torch.equal(*found)
    assert not found[0].isnan().any()


@pytest.mark.parametrize("channels", [33, 64, 300])
def test_pixels_may_lie_anywhere(engine, channels):
    """Those 4 KiB apart, for which caches have no room, are read otherwise, to the same bits."""
    values = torch.randn(2, 9, 11, channels)
    weight = torch.randn(40, 1, 1, channels)
    scale, shift = torch.rand(40) + 0.5, torch.randn(40)
    found = []
    for pitch in (channels, 1008, 1024, 2048):
        for dtype in DTYPES[engine]:
            slot = values.new_full((2, 9, 11, pitch), float("nan"), dtype=dtype)
            x, out = slot[..., :channels].copy_(values), slot.new_empty(2, 9, 11, 40)
            options = dict(stride=1, relu=True, pool=False)
            convolution.run_engine(engine, x, weight.to(dtype), scale, shift, out, **options)
            found.append(out)
    for alike in (found[i :: len(DTYPES[engine])] for i in range(len(DTYPES[engine]))):
        assert all(torch.equal(alike[0], other) for other in alike[1:])


def test_without_a_relu(engine):
    for dtype in DTYPES[engine]:
        x = torch.randn(1, 7, 9, 48).to(dtype)
        tensors = parameters(dtype, 80, 3, 3, 48)
        found, sums = run(engine, x, *tensors, relu=False, pool=True)
        exact = torch.empty_like(found, dtype=torch.float64)
        exact_sums = reference.conv(
            *(t.double() for t in (x, *tensors)), exact, relu=False, pool=True
        )
        assert exact.min() < -1
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=20 * tolerance)
        torch.testing.assert_close(sums.sum(1).double(), exact_sums.sum(1), rtol=1e-4, atol=1e-2)


def test_the_number_of_threads_does_not_change_a_bit(engine):
    for dtype in DTYPES[engine]:
        for kernel, c_in, c_out, size in ((3, 64, 96, (2, 40, 40)), (1, 512, 224, (1, 20, 20))):
            x = torch.randn(*size, c_in).to(dtype)
            tensors = parameters(dtype, c_out, kernel, kernel, c_in)
            with threads(1):
                alone = run(engine, x, *tensors, pool=True)
            for number in (2, 3, 7):
                with threads(number):
                    together = run(engine, x, *tensors, pool=True)
                assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_what_it_should(engine, kernel, value):
    """One pixel's neighbours, as in torch; nothing in the row's padding, no other channel."""
    for dtype in DTYPES[engine]:
        x = torch.randn(1, 9, 20, 70).to(dtype)
        x[0, 4, 19, 69] = value  # The last of a row and of its channels.
        tensors = parameters(dtype, 33, kernel, kernel, 70)
        found, _ = run(engine, x, *tensors)
        expected = torch.empty_like(found, dtype=torch.float32)
        reference.conv(*(t.float() for t in (x, *tensors)), expected)
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert torch.equal(found.isnan(), expected.isnan())


def test_empty(engine):
    for dtype in DTYPES[engine]:
        tensors = parameters(dtype, 8, 3, 3, 16)
        for shape in ((0, 5, 7, 16), (2, 0, 7, 16)):
            x, out = torch.empty(shape, dtype=dtype), torch.empty(*shape[:3], 8, dtype=dtype)
            partials = cpu.conv(x, *tensors, out, pool=True)
            assert partials.shape == (shape[0], 1, 8)
            assert not partials.any()


# --------------------------------------------------------------------------------------
# The choice of an engine, and packed weights
# --------------------------------------------------------------------------------------


def test_choice():
    found = convolution.engines()
    for dtype, names in convolution.PREFERRED.items():
        expected = [name for name in names if name in found]
        assert convolution.choose_engine(dtype) == [*expected, convolution.ATEN][0]
    assert convolution.choose_engine(torch.float64) == convolution.ATEN


@pytest.fixture
def without_amx(monkeypatch, tmp_path):
    """A processor with AVX512-BF16 and no matrix unit, on which engines are measured."""
    monkeypatch.setenv("VOVNET_FAST_TUNE", "1")
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(convolution, "engines", lambda: ("fma", "dpbf16"))
    monkeypatch.setattr(weight_grad, "engines", lambda: ("fma", "dpbf16"))
    tuning._table.cache_clear()
    convolution._fastest.cache_clear()
    yield
    tuning._table.cache_clear()
    convolution._fastest.cache_clear()


@pytest.mark.parametrize("slow", ["fma", "dpbf16"])
@pytest.mark.parametrize(("module", "name"), [(convolution, "_launch"), (weight_grad, "sums")])
def test_a_slow_engine_is_avoided(monkeypatch, without_amx, module, name, slow):
    """By the clock that is measured with, which has no other hands."""
    now, asked = [0.0], []
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(packing, "pack", lambda engine, weight: weight)

    def run(engine, *args, **kwargs):
        asked.append(engine)
        now[0] += 1 + (engine == slow)

    monkeypatch.setattr(module, name, run)
    [fast] = {"fma", "dpbf16"} - {slow}
    assert module.choose_engine(torch.bfloat16) == fast
    assert {*asked} == {"fma", "dpbf16"}
    number = len(asked)
    assert module.choose_engine(torch.bfloat16) == fast
    assert module.choose_engine(torch.float32) == "fma"
    convolution._fastest.cache_clear()
    tuning._table.cache_clear()  # As the next process finds it.
    assert module.choose_engine(torch.bfloat16) == fast
    assert len(asked) == number
    torch.use_deterministic_algorithms(True)
    try:
        assert module.choose_engine(torch.bfloat16) == "dpbf16"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("module", [convolution, weight_grad])
def test_engines_are_timed_by_what_they_do(module):
    found = module.engines()
    for dtype, names in convolution.PREFERRED.items():
        run = module._trial(dtype)
        for name in {*names} & {*found}:
            run(name)


@pytest.fixture
def packed(monkeypatch, engine):
    """The engine, and a list of the weights that were packed."""
    found, pack = [], packing.pack

    def note(name, weight, **options):
        found.append(weight.shape)
        return pack(name, weight, **options)

    monkeypatch.setattr(packing, "pack", note)
    return engine, found


def test_a_weight_is_packed_once(packed):
    engine, found = packed
    dtype = DTYPES[engine][0]
    x, tensors = torch.randn(1, 5, 6, 16).to(dtype), parameters(dtype, 8, 3, 3, 16)
    first, _ = run(engine, x, *tensors)
    second, _ = run(engine, x, *tensors)
    assert len(found) == 1
    assert torch.equal(first, second)
    tensors[0].neg_()  # And again once it has changed.
    third, _ = run(engine, -x, *tensors)
    assert len(found) == 2
    assert torch.equal(first, third)
    tensors[0].data = tensors[0].data.clone().neg_()
    fourth, _ = run(engine, x, *tensors)
    assert len(found) == 3
    assert torch.equal(first, fourth)


def test_a_packed_weight_goes_with_its_weight(packed):
    engine, _ = packed
    dtype = DTYPES[engine][0]
    before = len(packing._kept)
    tensors = parameters(dtype, 8, 1, 1, 16)
    run(engine, torch.randn(1, 5, 6, 16).to(dtype), *tensors)
    assert len(packing._kept) == before + 1
    del tensors
    gc.collect()
    assert len(packing._kept) == before


def test_a_weight_that_trains_is_packed_every_time(packed):
    """Autograd holds it until the backward pass: so would it hold its packed form."""
    engine, found = packed
    dtype = DTYPES[engine][0]
    before = len(packing._kept)
    weight, *vectors = parameters(dtype, 8, 3, 3, 16)
    weight.requires_grad_()
    for number in (1, 2):
        run(engine, torch.randn(1, 5, 6, 16).to(dtype), weight, *vectors)
        assert len(found) == number
    assert len(packing._kept) == before


def test_inference_tensors_are_packed_every_time(packed):
    """They do not count what is written to them."""
    engine, found = packed
    dtype = DTYPES[engine][0]
    with torch.inference_mode():
        x = torch.randn(1, 5, 6, 16).to(dtype)
        tensors = parameters(dtype, 8, 1, 1, 16)
        first, _ = run(engine, x, *tensors)
        tensors[0].neg_()
        second, _ = run(engine, -x, *tensors)
    assert len(found) == 2
    assert torch.equal(first, second)


def test_what_does_not_run_is_said():
    extension = _extension.load("cpu")
    with pytest.raises(ValueError, match='no convolution engine "neon" runs on instruction set'):
        extension.conv_parts("neon", 1, 1, 1, 1, 1, 1)
