"""Winograd's convolution on a CPU, tiles of each size on each instruction set, and its choice."""

import copy
import types

import pytest
import torch

from tests import extension_cases
from tests.backends.cpu_engines import instruction_set
from tests.backends.test_cpu_backend import threads
from tests.backends.test_cpu_conv import parameters, run
from tests.extension_cases import Tensors, require
from tests.tiny import TINY
from vovnet_fast import VoVNet, _environment, freeze, tuning, use_backend
from vovnet_fast.backends import _extension, reference
from vovnet_fast.backends.cpu import convolution, packing, recording, winograd
from vovnet_fast.selfcheck import calls, cases
from vovnet_fast.tuning import processor

CPU = torch.device("cpu")
LAYERS = [
    calls.Layer(3, 3, 5, (1, 1, 1)),
    calls.Layer(3, 5, 17, (2, 1, 9)),
    calls.Layer(3, 33, 50, (1, 1, 64)),
    calls.Layer(3, 70, 112, (1, 33, 47)),
    calls.Layer(3, 64, 48, (2, 30, 25)),  # Several tasks, of tiles of both images.
    calls.Layer(3, 256, 160, (1, 9, 20)),
    calls.Layer(3, 520, 40, (1, 35, 33)),  # Input that does not stay in a cache.
]


def combinations():
    if _extension.why_not("cpu") is not None:
        return [("winograd2", "baseline")]  # For tests that then skip.
    extension, found = _extension.load("cpu"), []
    for isa in extension.isas():
        with instruction_set(isa):
            found += [(name, isa) for name in winograd.SIDES if extension.conv_winograd_runs()]
    return found


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


@pytest.fixture(params=combinations(), ids="-".join)
def engine(request):
    name, isa = request.param
    with instruction_set(isa):
        yield name


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


@dtypes
@torch.no_grad()
def test_against_fp64(engine, dtype):
    """In slots surrounded by NaN, from and into crops, and at odd offsets and strides."""

    def conv(*tensors, stride=1, relu=True, pool=False):
        return convolution.run_engine(engine, *tensors, stride=stride, relu=relu, pool=pool)

    for case in cases.of_layers(calls.conv, *LAYERS, pool=False):
        for layout in Tensors.LAYOUTS:
            backend = types.SimpleNamespace(conv=conv)
            wrong = extension_cases.check(case, backend, dtype, CPU, layout)
            assert wrong is None, f"{case.words}, {layout}: {wrong}"


@dtypes
@pytest.mark.parametrize("channels", [80, 192])
def test_errors_are_at_most_twice_those_of_pytorch(engine, dtype, channels):
    """By mean squares, of the fewest channels too; with tiles of 2 they are less than PyTorch's."""
    if dtype != torch.float32:
        channels -= 48  # There are fewer from which on these are taken.
    x = torch.randn(1, 24, 24, channels).relu().to(dtype)
    weight, scale, shift = parameters(dtype, channels, 3, 3, channels)
    found, _ = run(engine, x, weight, scale, shift, relu=False)
    exact, eager = (torch.empty(found.shape, dtype=kind) for kind in (torch.float64, dtype))
    reference.conv(x, weight, scale, shift, eager, relu=False)
    reference.conv(*(t.double() for t in (x, weight, scale, shift)), exact, relu=False)
    error, eager_error = ((t.double() - exact).square().mean().sqrt() for t in (found, eager))
    in_fp32 = dtype == torch.float32
    assert error < eager_error * (2 if in_fp32 and engine == "winograd4" else 1)
    assert error > 0


def test_without_a_relu(engine):
    x, tensors = torch.randn(1, 7, 9, 48), parameters(torch.float32, 80, 3, 3, 48)
    found, _ = run(engine, x, *tensors, relu=False)
    exact = torch.empty_like(found, dtype=torch.float64)
    reference.conv(*(t.double() for t in (x, *tensors)), exact, relu=False)
    assert exact.min() < -1
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@dtypes
def test_the_number_of_threads_does_not_change_a_bit(engine, dtype):
    for c_in, c_out, size in ((64, 96, (2, 40, 40)), (512, 224, (1, 20, 20))):
        x, tensors = torch.randn(*size, c_in).to(dtype), parameters(dtype, c_out, 3, 3, c_in)
        with threads(1):
            alone, _ = run(engine, x, *tensors)
        for number in (2, 3, 7):
            with threads(number):
                assert torch.equal(alone, run(engine, x, *tensors)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_neighbours_and_stays_in_their_tiles(engine, value):
    x = torch.randn(1, 19, 20, 40)
    x[0, 9, 10, 39] = value
    found, _ = run(engine, x, *parameters(torch.float32, 33, 3, 3, 40), relu=False)
    wrong = ~found.isfinite().all(3)[0]
    assert wrong[8:11, 9:12].all()
    side = winograd.SIDES[engine]
    for axis, place in ((0, 9), (1, 10)):
        beyond = wrong.any(1 - axis).nonzero().flatten()
        assert beyond.min() // side == (place - 1) // side
        assert beyond.max() // side == (place + 1) // side


def test_a_scaled_and_a_transposed_weight_are_packed_as_their_copies_are(engine):
    weight, scale = torch.randn(24, 20, 3, 3).permute(0, 2, 3, 1), torch.rand(24)
    exact = weight * scale[:, None, None, None]
    for transposed in (False, True):
        for dtype in DTYPES:
            copy = exact.flip(1, 2).permute(3, 1, 2, 0) if transposed else exact
            found = packing.pack(engine, weight, scale, dtype=dtype, transposed=transposed)
            # A weight that has fewer digits is a number of fp32 like others.
            assert torch.equal(found, packing.pack(engine, copy.to(dtype).float().contiguous()))


def test_what_it_does_not_compute_is_refused(engine):
    x, tensors = torch.randn(1, 6, 6, 16), parameters(torch.float32, 16, 3, 3, 16)
    with pytest.raises(ValueError, match="needs a kernel of 3 and a stride of 1"):
        run(engine, x, *tensors, stride=2)
    weight, scale, shift = tensors
    out = torch.empty(1, 6, 6, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs weights to be rounded to fp32, fp16 or bf16"):
        convolution.run_engine(
            engine, x.double(), weight.double(), scale, shift, out,
            stride=1, relu=True, pool=False,
        )  # fmt: skip
    tiles = packing.pack(engine, weight)
    with pytest.raises(ValueError, match="needs activations in fp32, fp16 or bf16"):
        convolution._launch(
            engine, x.double(), tiles, out, 3, scale=scale.data_ptr(), shift=shift.data_ptr()
        )
    with pytest.raises(ValueError, match="needs scale and shift"):
        convolution._launch(engine, x, tiles, torch.empty(x.shape), 3)
    with pytest.raises(ValueError, match="tiles of 2 or 4 pixels"):
        _extension.load("cpu").conv_winograd_pack_bytes(3, 16, 16)


def test_empty(engine):
    x, tensors = torch.empty(0, 5, 7, 16), parameters(torch.float32, 8, 3, 3, 16)
    assert run(engine, x, *tensors)[0].shape == (0, 5, 7, 8)


# --------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """The engines that layers are given, on a processor that knows nothing yet."""
    if not _extension.load("cpu").conv_winograd_runs():
        pytest.skip("no Winograd convolution on this processor")
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    for cached in (tuning._table, winograd.fastest):
        cached.cache_clear()
    found, run_engine = [], convolution.run_engine

    def note(engine, x, *args, **options):
        found.append(engine)
        return run_engine(engine, x, *args, **options)

    monkeypatch.setattr(convolution, "run_engine", note)
    yield found
    for cached in (tuning._table, winograd.fastest):
        cached.cache_clear()


def layer(pixels, *, lasts=True, kernel=3, stride=1, channels=96, dtype=torch.float32, pool=False):
    """Run one as the backend does."""
    x = torch.randn(1, 1, pixels, channels).to(dtype)
    tensors = parameters(dtype, channels, kernel, kernel, channels)
    if lasts:
        winograd.lasting(tensors[:1])
    out = torch.empty(1, 1, (pixels - 1) // stride + 1, channels, dtype=dtype)
    convolution.conv(x, *tensors, out, stride=stride, pool=pool)


def test_large_maps_of_lasting_weights(monkeypatch, chosen):
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    layer(1024)
    layer(1023)
    layer(192)
    layer(191)
    assert chosen == ["winograd4", "winograd2", "winograd2", "fma"]
    del chosen[:]
    layer(1024, channels=80)
    layer(1024, channels=79)
    layer(1024, channels=32)
    assert chosen == ["winograd4", "winograd2", "winograd2"]
    del chosen[:]
    monkeypatch.setattr(convolution, "choose_engine", lambda dtype: "fma")
    for dtype in (torch.float16, torch.bfloat16):
        layer(1024, channels=32, dtype=dtype)
        layer(1023, channels=32, dtype=dtype)
    assert chosen == ["winograd4", "winograd2"] * 2
    del chosen[:]
    layer(1024, lasts=False)
    layer(1024, kernel=1)
    layer(1024, stride=2)
    layer(1024, channels=31)
    layer(1024, pool=True)
    with torch.inference_mode():  # Such a tensor does not count what is written to it.
        layer(1024)
    assert {*chosen} == {"fma"}


def test_the_environment_limits_tiles(monkeypatch, chosen):
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    for value in ("0", "2", "4", ""):
        monkeypatch.setenv("VOVNET_FAST_WINOGRAD", value)
        layer(1024)
    assert chosen == ["fma", "winograd2", "winograd4", "winograd4"]
    monkeypatch.setenv("VOVNET_FAST_WINOGRAD", "3")
    with pytest.raises(ValueError, match="VOVNET_FAST_WINOGRAD must be one of 0, 2, 4, got '3'"):
        _environment.require()


@torch.no_grad()
def test_the_matrix_unit_is_not_compared():
    weight = torch.empty(96, 3, 3, 96, dtype=torch.bfloat16)
    winograd.lasting([weight])
    x = torch.empty(1, 64, 64, 96, dtype=torch.bfloat16)
    assert winograd.choose(x, weight, 1, None, "amx") == "amx"


@pytest.mark.parametrize("fast", ["fma", "winograd2", "winograd4"])
def test_the_fastest_is_measured_once_for_sizes_that_are_alike(monkeypatch, chosen, fast):
    """By the clock that is measured with, which has no other hands."""
    monkeypatch.setenv("VOVNET_FAST_TUNE", "1")
    now, launch, timed = [0.0], convolution._launch, []
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now[0])

    def slow(engine, *args, **options):
        timed.append(engine)
        now[0] += 1 + (engine != fast)
        launch(engine, *args, **options)

    monkeypatch.setattr(convolution, "_launch", slow)
    layer(1024)
    assert {*timed} == {"fma", "winograd2", "winograd4"}
    number = len(timed)
    for pixels in (1024, 1448, 725):
        layer(pixels)
    assert len(timed) == number + 3
    layer(1449)
    assert len(timed) > number + 10
    number = len(timed)
    layer(63)  # Too few for tiles.
    assert len(timed) == number + 1
    assert chosen == [fast] * 5 + ["fma"]


def test_a_trial_is_no_part_of_what_is_recorded(monkeypatch, chosen, tmp_path):
    """In the first process of all networks record their calls too."""
    monkeypatch.setenv("VOVNET_FAST_TUNE", "1")
    x, out = torch.randn(1, 1, 100, 96), torch.empty(1, 1, 100, 96)
    tensors = parameters(torch.float32, 96, 3, 3, 96)
    winograd.lasting(tensors[:1])
    found = [recording.record(lambda: convolution.conv(x, *tensors, out))[1] for _ in range(2)]
    assert "Winograd" in (tmp_path / "tuning.json").read_text()
    assert all(each.complete for each in found)
    first, again = (len(each.calls) for each in found)
    assert first - again in (0, 1)  # The first packs, and that may be by a call.


def test_a_verdict_on_small_tiles_says_nothing_of_large_ones(monkeypatch, chosen):
    """Who looks for what is accurate and then lifts the limit is not left with what it allowed."""
    monkeypatch.setenv("VOVNET_FAST_TUNE", "1")
    asked = []

    def choose(problem, names, *_, **__):
        asked.append((problem, names))
        return names[0]

    monkeypatch.setattr(processor, "choose", choose)
    for side in ("2", "4"):
        monkeypatch.setenv("VOVNET_FAST_WINOGRAD", side)
        layer(1024)
    assert [names for _, names in asked] == [
        ("winograd2", "fma"),
        ("winograd4", "winograd2", "fma"),
    ]
    assert asked[0][0] != asked[1][0]
    assert chosen == ["winograd2", "winograd4"]


@pytest.mark.parametrize("pixels", [64, 128, 8192])
def test_a_trial_is_of_a_layer_as_it_was_asked_for(monkeypatch, pixels):
    """Of so many pixels, with weights that take turns."""
    if not _extension.load("cpu").conv_winograd_runs():
        pytest.skip("no Winograd convolution on this processor")
    found, launch = [], convolution._launch

    def note(engine, x, tiles, out, *args, **options):
        found.append((engine, x.shape[0] * x.shape[1] * x.shape[2], tiles.data_ptr()))
        assert x.shape[3] == 48
        assert out.shape == (*x.shape[:3], 64)
        assert x.dtype == out.dtype == torch.bfloat16
        launch(engine, x, tiles, out, *args, **options)

    monkeypatch.setattr(convolution, "_launch", note)
    layer = winograd.Layer(pixels, 48, 64, torch.bfloat16, "fma", "avx2", 1)
    run = convolution._winograd_trial(layer)
    for _ in range(9):
        run("winograd4")
    assert {each[:2] for each in found} == {("winograd4", pixels)}
    assert len({each[2] for each in found}) == 8
    run("fma")
    assert found[-1][:2] == ("fma", pixels)


def test_maps_of_several_sizes_share_no_packed_form(monkeypatch, chosen):
    """A network that meets both in turn packs for each of them once."""
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    packed, pack = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda *a: packed.append(a[0]) or pack(*a))
    tensors = parameters(torch.float32, 96, 3, 3, 96)
    winograd.lasting(tensors[:1])
    for pixels in (1024, 300, 9) * 2:
        x = torch.randn(1, 1, pixels, 96)
        convolution.conv(x, *tensors, torch.empty_like(x))
    assert packed == ["winograd4", "winograd2", "fma"]
    tensors[0].neg_()
    convolution.conv(x, *tensors, torch.empty_like(x))
    assert packed[3:] == ["fma"]


@pytest.mark.parametrize("form", ["frozen", "kept"])
@torch.no_grad()
def test_networks_whose_weights_last_take_it(monkeypatch, chosen, form):
    """Frozen ones, and others from the call on that finds weights as they were."""
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 16)
    monkeypatch.setattr(winograd, "STATIC_PIXELS", {"winograd2": 16, "winograd4": 64})
    monkeypatch.setattr(winograd, "_CHANNELS_FP32", {"winograd2": 8, "winograd4": 8})
    model = VoVNet(TINY["detectron2"]).eval()
    image = torch.randn(2, 3, 64, 64)

    def run(model, times):
        with use_backend("cpu"):
            found = [model(image) for _ in range(times)]
        for again in found[2:]:  # Recorded, and repeated.
            assert all(map(torch.equal, found[1], again))
        return found[1]

    with use_backend("cpu"):
        model(image)
    assert {*chosen} == {"fma"}
    del chosen[:]
    for _ in range(2):
        found = run(freeze(model) if form == "frozen" else model, 5)
        assert {*chosen} >= {"winograd2", "winograd4"}
        with use_backend("reference"):
            eager, exact = model(image), copy.deepcopy(model).double()(image.double())
        for ours, theirs, right in zip(found, eager, exact):
            error, allowed = ((y.double() - right).abs().max() for y in (ours, theirs))
            assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * right.abs().max()
        del chosen[:]
        for weight in model.parameters():
            if weight.ndim == 4:
                weight.data.neg_()


@torch.no_grad()
def test_the_environment_limits_what_is_kept(monkeypatch, chosen):
    """From one call to the next."""
    monkeypatch.setenv("VOVNET_FAST_TUNE", "0")
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 16)
    monkeypatch.setattr(winograd, "STATIC_PIXELS", {"winograd2": 16, "winograd4": 64})
    monkeypatch.setattr(winograd, "_CHANNELS_FP32", {"winograd2": 8, "winograd4": 8})
    model, image = VoVNet(TINY["detectron2"]).eval(), torch.randn(1, 3, 64, 64)
    with use_backend("cpu"):
        for side, allowed in (("4", {"fma", "winograd2", "winograd4"}), ("0", {"fma"})):
            monkeypatch.setenv("VOVNET_FAST_WINOGRAD", side)
            model(image)
            del chosen[:]
            model(image)
            assert {*chosen} == allowed
