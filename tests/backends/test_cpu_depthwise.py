"""Depthwise layers of the CPU half: a 3x3 by channels and its 1x1, in one call and in two."""

import copy
import itertools
import logging

import pytest
import torch

from tests import extension_cases
from tests.backends.cpu_engines import DTYPES, engine_combinations, instruction_set
from tests.backends.test_cpu_backend import threads
from tests.extension_cases import Tensors, require
from tests.features import compared
from vovnet_fast import VoVNet, freeze, tuning, use_backend
from vovnet_fast.backends import _extension, _steps, cpu, reference
from vovnet_fast.backends.cpu import convolution, depthwise_layers, unpacked
from vovnet_fast.selfcheck import calls, cases
from vovnet_fast.tuning import processor

CPU = torch.device("cpu")
LAYERS = [
    calls.Layer(1, c_in, c_out, size, stride)
    for (c_in, c_out, size), stride in itertools.product(
        [
            (1, 1, (1, 1, 1)),
            (5, 17, (2, 1, 9)),
            (8, 40, (2, 9, 2)),
            (33, 24, (2, 17, 31)),
            (64, 64, (1, 30, 43)),
            (64, 112, (1, 3, 90)),  # Rows of more pixels than are made at a time.
            (300, 33, (1, 6, 7)),  # Channels whose sums are put aside.
        ],
        (1, 2),
    )
]


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


@pytest.fixture(params=engine_combinations("conv_engines"), ids="-".join)
def engine(request, monkeypatch):
    """An engine, on one of the instruction sets that it runs on, which the backend chooses."""
    name, isa = request.param
    monkeypatch.setattr(convolution, "choose_engine", lambda dtype: name)
    monkeypatch.setattr(depthwise_layers, "_way", lambda *_: depthwise_layers.TOGETHER)
    with instruction_set(isa):
        yield name


def layer_of(backend, t, *, layer):
    """What a layer leaves: the backend's own, or one pass after the other."""
    x, weight, out = layer.x(t), layer.weight(t), layer.out(t)
    taps = t.weight(3, 3, layer.c_in, fan=9)
    scale, shift = t.vector(layer.c_out), t.vector(layer.c_out, low=-0.5, high=0.5)
    between = x.new_empty(*out.shape[:3], layer.c_in)
    if backend is reference:
        backend.depthwise(x, taps, between, stride=layer.stride)
        backend.conv(between, weight, scale, shift, out, relu=True, pool=False)
    else:
        options = dict(taps=taps, spatial=None, stride=layer.stride, relu=True, pool=False)
        assert backend.depthwise_conv(x, weight, scale, shift, out, **options) is None
    yield out


@torch.no_grad()
def test_against_fp64(engine):
    """In slots surrounded by NaN, from and into crops, and at odd offsets and strides."""
    for case in cases.of_layers(layer_of, *LAYERS):
        for dtype in compared(DTYPES[engine]):
            for layout in Tensors.LAYOUTS:
                wrong = extension_cases.check(case, cpu, dtype, CPU, layout)
                assert wrong is None, f"{case.words}, {dtype}, {layout}: {wrong}"


def random_layer(dtype, layer):
    """Tensors of a layer, and memory for what is between and for the output, of NaN."""
    x, taps = torch.randn(*layer.size, layer.c_in), torch.randn(3, 3, layer.c_in)
    weight = torch.randn(layer.c_out, 1, 1, layer.c_in) / layer.c_in**0.5
    between = torch.full((*layer.output, layer.c_in), torch.nan, dtype=dtype)
    out = torch.full((*layer.output, layer.c_out), torch.nan, dtype=dtype)
    return *(t.to(dtype) for t in (x, taps, weight)), torch.randn(2, layer.c_out), between, out


@pytest.mark.parametrize("relu", [False, True])
def test_one_call_leaves_what_two_passes_do(engine, relu):
    """To the last bit, on any number of threads."""
    for dtype, layer in itertools.product(DTYPES[engine], LAYERS):
        x, taps, weight, (scale, shift), between, out = random_layer(dtype, layer)
        _extension.CPU.depthwise(x, taps, between, stride=layer.stride)
        convolution.run_engine(
            engine, between, weight, scale, shift, out, stride=1, relu=relu, pool=False
        )
        for number in (1, 2, 5):
            found = torch.full_like(out, torch.nan)
            with threads(number):
                cpu.depthwise_conv(
                    x, weight, scale, shift, found, taps=taps, spatial=None,
                    stride=layer.stride, relu=relu,
                )  # fmt: skip
            assert torch.equal(found, out), (dtype, layer, number)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_what_it_should(engine, value):
    """The pixels around it, and none beside."""
    for dtype in DTYPES[engine]:
        x, taps, weight, vectors, _, out = random_layer(dtype, calls.Layer(1, 35, 20, (1, 9, 30)))
        x[0, 4, 29, 34] = value
        cpu.depthwise_conv(x, weight, *vectors, out, taps=taps, spatial=None)
        touched = torch.zeros(9, 30, dtype=torch.bool)
        touched[3:6, 28:] = True
        assert torch.equal((~out[0].isfinite()).any(-1), touched)


def test_sums_of_convolutions_without_an_epilogue(engine):
    """As a layer with the batch's statistics would have them, which no backend asks for."""
    for dtype, stride in itertools.product(DTYPES[engine], (1, 2)):
        layer = calls.Layer(1, 70, 40, (2, 9, 14), stride)
        x, taps, weight, _, between, out = random_layer(dtype, layer)
        _extension.CPU.depthwise(x, taps, between, stride=stride)
        form = convolution.packing.pack(engine, weight)
        convolution._launch(engine, between, form, out, 1)
        found = torch.full_like(out, torch.nan)
        address = convolution.packed("taps", taps, dtype, 3, 3, 70)
        convolution._launch(engine, x, form, found, 1, stride=stride, taps=address)
        assert torch.equal(found, out)


def test_what_is_not_one_call(engine, monkeypatch):
    """Partial sums, batch statistics, and steps that multiply weights as they are."""
    dtype = DTYPES[engine][0]
    x, taps, weight, vectors, between, out = random_layer(dtype, calls.Layer(1, 32, 24, (2, 9, 12)))
    asked = []

    def spatial():
        asked.append(between)
        return between

    options = dict(taps=taps, spatial=spatial)
    cpu.depthwise_conv(x, weight, *vectors, out, **options)
    assert not asked
    found = torch.empty_like(out)
    partials = cpu.depthwise_conv(x, weight, *vectors, found, pool=True, **options)
    assert len(asked) == 1
    assert torch.equal(found, out)
    sums, unit = out.double().sum((1, 2)), torch.finfo(dtype).eps  # Each of 108 was rounded.
    torch.testing.assert_close(partials.double().sum(1), sums, rtol=16 * unit, atol=400 * unit)
    assert cpu.depthwise_conv_statistics(x, weight, out, **options).shape[1:] == (3, 24)
    assert len(asked) == 2
    monkeypatch.setattr(unpacked, "faster", lambda layer, engine, run: True)
    cpu.depthwise_conv(x, weight, *vectors, found, **options)
    assert len(asked) == 2
    with _steps.forward():
        cpu.depthwise_conv(x, weight, *vectors, found, **options)
    assert len(asked) == 3


# --------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch, tmp_path):
    monkeypatch.setenv("VOVNET_FAST_TUNE", "1")
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    tuning._table.cache_clear()
    depthwise_layers._way.cache_clear()
    yield
    tuning._table.cache_clear()
    depthwise_layers._way.cache_clear()


def way(engine="fma"):
    return depthwise_layers._way(engine, torch.float32, _extension.load("cpu").isa(), 1)


def clock(monkeypatch, slow):
    """The time by a clock that only the two ways move."""
    now, asked = [0.0], []
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now[0])

    def trial(engine, dtype):
        def run(name):
            asked.append(name)
            now[0] += 1 + (name == slow)

        return run

    monkeypatch.setattr(depthwise_layers, "_trial", trial)
    return asked


@pytest.mark.parametrize("slow", [depthwise_layers.TOGETHER, depthwise_layers.APART])
def test_the_slower_way_is_avoided(monkeypatch, measured, slow):
    asked = clock(monkeypatch, slow)
    [fast] = {depthwise_layers.TOGETHER, depthwise_layers.APART} - {slow}
    assert way() == fast
    assert {*asked} == {depthwise_layers.TOGETHER, depthwise_layers.APART}
    number = len(asked)
    depthwise_layers._way.cache_clear()
    tuning._table.cache_clear()  # As the next process finds it.
    assert way() == fast
    assert len(asked) == number


def test_both_ways_are_timed(measured):
    if "fma" not in convolution.engines():
        pytest.skip("the baseline instruction set has no engine")
    run = depthwise_layers._trial("fma", torch.float32)
    for name in (
        depthwise_layers.APART,
        depthwise_layers.TOGETHER,
        depthwise_layers.APART,
        depthwise_layers.TOGETHER,
    ):
        run(name)


def test_other_results_are_not_taken(monkeypatch, measured, caplog):
    if "fma" not in convolution.engines():
        pytest.skip("the baseline instruction set has no engine")
    run_engine = convolution.run_engine

    def wrong(engine, x, weight, scale, shift, out, *, taps=None, **options):
        run_engine(engine, x, weight, scale, shift, out, taps=taps, **options)
        if taps is not None:
            out[0, 0, 0, 0] += 1

    monkeypatch.setattr(convolution, "run_engine", wrong)
    with caplog.at_level(logging.WARNING, "vovnet_fast.tuning"):
        assert way() == depthwise_layers.APART
    assert "one call gave other results than two passes" in caplog.text


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "isa", _extension.load("cpu").isas() if _extension.why_not("cpu") is None else []
)
def test_rows_of_every_width(isa, stride):
    """Outputs and both gradients, of pixels that NaN lies around, side by side and left alone."""
    backend = _extension.CPU
    for width, height in [*itertools.product(range(1, 15), (1, 3)), (40, 2)]:
        for dtype, channels in ((torch.float32, 20), (torch.float64, 3), (torch.bfloat16, 40)):
            x, g = (surrounded(2, h, w, channels, dtype) for h, w in (
                (height, width), ((height - 1) // stride + 1, (width - 1) // stride + 1),
            ))  # fmt: skip
            weight = torch.randn(3, 3, channels).to(dtype)
            add, mask = (torch.randn(2, height, width, channels).to(dtype) for _ in range(2))
            exact = reference.depthwise, reference.depthwise_input_grad
            with instruction_set(isa):
                out, gradient = torch.full_like(g, torch.nan), add.clone()
                backend.depthwise(x, weight, out, stride=stride)
                options = dict(stride=stride, mask=mask)
                backend.depthwise_input_grad(g, weight, gradient, add=gradient, **options)
                sums = backend.depthwise_weight_grad(x, g, stride=stride)
            found = out, gradient, sums
            wide = [t.double() for t in (x, g, weight, add, mask)]
            true_out, true_gradient = torch.empty_like(wide[1]), torch.empty_like(wide[0])
            exact[0](wide[0], wide[2], true_out, stride=stride)
            options = dict(stride=stride, add=wide[3], mask=wide[4])
            exact[1](wide[1], wide[2], true_gradient, **options)
            true_sums = reference.depthwise_weight_grad(wide[0], wide[1], stride=stride)
            for ours, true in zip(found, (true_out, true_gradient, true_sums)):
                limit = torch.finfo(ours.dtype).eps * (9 + true.abs().max()) * 4
                assert (ours.double() - true).abs().max() <= limit, (width, height, dtype)


def surrounded(n, height, width, channels, dtype):
    """Pixels in the middle of others, which nobody may read."""
    whole = torch.full((n, height + 2, width + 2, channels + 5), torch.nan, dtype=dtype)
    inside = whole[:, 1:-1, 1:-1, 2:-3]
    return inside.copy_(torch.randn(n, height, width, channels))


def test_a_network_has_it(monkeypatch):
    """Frozen, its layers are single calls, and its errors at most twice those of the modules."""
    if "fma" not in convolution.engines():
        pytest.skip("the baseline instruction set has no engine")
    monkeypatch.setattr(depthwise_layers, "_way", lambda *_: depthwise_layers.TOGETHER)
    found, run_engine = [], convolution.run_engine

    def note(*args, taps=None, **kwargs):
        found.append(taps is not None)
        return run_engine(*args, taps=taps, **kwargs)

    monkeypatch.setattr(convolution, "run_engine", note)
    model = VoVNet("V-19-slim-dw-eSE").eval()
    images = torch.randn(1, 3, 64, 96)
    exact_model = copy.deepcopy(model).double()
    with torch.inference_mode():
        with use_backend("reference"):
            eager, exact = model(images), exact_model(images.double())
        with use_backend("cpu"):
            features = freeze(model)(images)
    assert sum(found) == 14  # Two of the stem, and three of each of four blocks.
    for ours, theirs, true in zip(features, eager, exact):
        assert (ours - true).norm() <= 2 * (theirs - true).norm()
