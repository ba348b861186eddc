"""What quantize() makes: near the network in fp32, and the same integers on every way."""

import copy
import io
import pickle

import pytest
import torch

import vovnet_fast
from tests.quantization import cases
from tests.quantization.cases import sqnr
from tests.tiny import TINY
from vovnet_fast import VoVNet
from vovnet_fast.arithmetic import int8
from vovnet_fast.backends import BackendError
from vovnet_fast.network.filling import CheckpointError
from vovnet_fast.ops.memory import Arena, Plan
from vovnet_fast.quantization.floating import Floating, Folded
from vovnet_fast.quantization.running import run
from vovnet_fast.quantization.straight_through import StraightThrough

LEAST = {"int8": 24.0, "fp8": 18.0}
"""dB: one and more below what they reach, with depthwise layers, and ten without."""


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_it_is_near_the_network_in_fp32(name, dtype):
    """On images that it was not calibrated on."""
    x = cases.images(seed=7)
    with torch.no_grad():
        wanted = cases.model(name)(x)
    found = cases.quantized(name, dtype)(x)
    assert [y.shape for y in found] == [y.shape for y in wanted]
    assert all(y.dtype == torch.float32 for y in found)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in found)
    assert min(map(sqnr, found, wanted)) > LEAST[dtype]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_from_slot_to_slot_it_is_what_goes_by_name(name, dtype):
    """Two ways through the same layers, by code that has nothing in common but the ops."""
    quantized, x = cases.quantized(name, dtype), cases.images(seed=8)
    found = quantized(x)
    with torch.no_grad():
        wanted = StraightThrough(quantized.network).run(x)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_it_runs_in_memory_that_is_planned(name, dtype):
    """Nothing is read after it was written over: the arena holds what an earlier image left."""
    quantized = cases.quantized(name, dtype, stem="wide")
    network, ops, plan = quantized.network, quantized.architecture.form.ops, Plan()
    x = cases.images(seed=8)
    run(ops, x.permute(0, 2, 3, 1), network, plan)
    assert {"image", "chained_0", "chained_1"} <= set(plan.sizes)
    arena = Arena(plan.sizes, ops.ACTIVATION, x.device)
    for seed in (9, 8):
        pixels = cases.images(seed=seed).permute(0, 2, 3, 1)
        found = run(ops, pixels, network, arena)
        wanted = run(ops, pixels, network)
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    "out_features", [("stem_2",), ("stem_2", "stem"), ("stem", "stage3"), ("stage4",)]
)
@pytest.mark.parametrize("name", ["seed", "torchhub", "depthwise"])
def test_any_features(name, out_features):
    """What is a feature and an input, a feature alone, and layers that nobody needs."""
    model = cases.model(name, out_features=out_features)
    quantized = vovnet_fast.quantize(model, [cases.images(6)], report=False, **cases.QUICK)
    x = cases.images(seed=7)
    with torch.no_grad():
        wanted = model(x)
    found = quantized(x)
    assert quantized.feature_channels == model.feature_channels
    assert quantized.feature_strides == model.feature_strides
    assert min(map(sqnr, found, wanted)) > LEAST["int8"]
    if "stage5" not in out_features:
        assert len(quantized.network.layers) < len(list(model.fold(torch.float32).convs()))


def test_255_levels_are_nearer_than_127():
    x = cases.images(seed=7)
    with torch.no_grad():
        wanted = cases.model()(x)
    least = {}
    for levels in (127, 255):
        quantized = cases.quantized("detectron2", "int8", levels=levels)
        least[levels] = min(map(sqnr, quantized(x), wanted))
    assert least[255] > least[127] + 2
    assert cases.quantized("detectron2", "int8", levels=255).levels == 255


def test_what_its_accumulators_may_be():
    """No image makes them larger: kernels sum in int32, and what is a factor in 15 bits."""
    for name in ("detectron2", "seed", "depthwise"):
        network = cases.quantized(name, "int8", stem="wide").network
        for key, layer in network.layers.items():
            wide = key == "stem_1"
            largest = int8.WIDE if wide else network.levels
            most = layer.weight.double().abs().sum((1, 2, 3)) * largest + layer.bias.abs()
            assert most.max() < (int8.WIDE_SUM if wide else int8.SUM)
            assert layer.weight.abs().max() <= (int8.WIDE_WEIGHT if wide else 127)
            if not wide:  # All of the digits are used.
                assert (layer.weight.abs().amax((1, 2, 3)) == 127).all()
        for gate in network.gates.values():
            largest = network.levels * gate.mean_scale
            assert largest < 2**15
            most = gate.weight.double().abs().sum(1) * largest + gate.bias.abs()
            assert most.max() <= int8.SUM
        for rescale in network.sums.values():
            assert max(rescale.gate, rescale.identity) <= int8.FACTOR
            assert max(rescale.gate, rescale.identity) > int8.FACTOR // 2


def test_slots_have_scales_of_their_own():
    """The 1x1 over the concat has them in its weights."""
    network = cases.quantized().network
    layer = network.layers["OSA2_1_concat"]
    scales = [network.scales[name] for name in ("stem_3", "OSA2_1_0", "OSA2_1_1")]
    assert len(set(scales)) == 3
    wanted = torch.tensor(scales).repeat_interleave(torch.tensor([16, 8, 8]))
    assert torch.equal(layer.in_scales, wanted)


def test_a_channel_that_is_always_zero_costs_the_others_nothing():
    def made(kill):
        model = cases.model("depthwise")
        for name, module in model.named_modules():
            if kill and name.endswith("stem_2/pw_norm"):
                module.weight.data[3] = module.bias.data[3] = 0
            if kill and name.endswith(("stem_2/pw_conv1x1", "stem_3/dw_conv3x3")):
                module.weight.data[3] *= 1e3 if "dw" in name else 1
        return model

    x = cases.images(seed=7)
    least = []
    for kill in (False, True):
        model = made(kill)
        with torch.no_grad():
            wanted = model(x)
        least.append(
            min(map(sqnr, vovnet_fast.quantize(model, [cases.images()], **cases.QUICK)(x), wanted))
        )
    assert least[1] > least[0] - 2


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_copies_and_state_dicts(dtype):
    quantized, x = cases.quantized("depthwise", dtype), cases.images(seed=3)
    wanted = quantized(x)
    others = [copy.deepcopy(quantized)]
    if dtype == "int8":  # PyTorch pickles no e4m3.
        others.append(pickle.loads(pickle.dumps(quantized)))
    for other in others:
        assert all(map(torch.equal, other(x), wanted))
    other = vovnet_fast.quantize(
        cases.model("depthwise"), [cases.images(seed=9)], dtype, **cases.QUICK
    )
    if other.wide_stem == quantized.wide_stem:
        assert not torch.equal(other(x)[-1], wanted[-1])
        other.load_state_dict(quantized.state_dict())
        assert all(map(torch.equal, other(x), wanted))
    stream = io.BytesIO()
    torch.save(quantized.state_dict(), stream)


def test_state_dicts_of_others_are_refused():
    quantized = copy.deepcopy(cases.quantized("detectron2", "int8", stem="wide"))
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    for other, words in (
        (
            cases.quantized("detectron2", "int8", stem="wide", levels=255),
            "another architecture, dtype or number of",
        ),
        (cases.model(), "Missing key"),
        (cases.quantized("seed", "int8", stem="wide"), "another architecture"),
    ):
        with pytest.raises(CheckpointError, match=words):
            quantized.load_state_dict(other.state_dict())
    floats = {name: tensor.float() for name, tensor in before.items()}
    with pytest.raises(CheckpointError, match=r"float32, expected .* in torch.int8"):
        quantized.load_state_dict(floats)
    assert all(map(torch.equal, quantized.state_dict().values(), before.values()))


def test_modes_and_conversions():
    quantized = copy.deepcopy(cases.quantized())
    assert quantized.train() is quantized
    assert not quantized.training
    assert quantized.to("cpu").to(torch.float32).float().scales.dtype == torch.float64
    for convert in (quantized.half, quantized.double, lambda: quantized.to(torch.bfloat16)):
        with pytest.raises(TypeError, match="quantised in int8 and cannot be converted"):
            convert()
    assert quantized.to(memory_format=torch.channels_last).weight_0.is_contiguous()
    assert "dtype=int8" in repr(quantized)
    x = cases.images()
    wanted = quantized(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, quantized(x), wanted))
    strided = torch.zeros(2, 3, 40, 96)[..., ::2].copy_(x)
    assert all(map(torch.equal, quantized(strided), wanted))
    assert all(map(torch.equal, quantized(x.double()), wanted))
    assert [y.shape[0] for y in quantized(x[:0])] == [0] * 4


def test_layouts_and_dtypes_of_features():
    options = dict(out_dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    quantized = vovnet_fast.quantize(
        cases.model(), [cases.images(6)], report=False, **cases.QUICK, **options
    )
    for feature, wanted in zip(quantized(cases.images()), cases.quantized()(cases.images())):
        assert feature.is_contiguous()
        assert torch.equal(feature, wanted.bfloat16())
    with pytest.raises(TypeError, match="out_dtype must be"):
        vovnet_fast.quantize(cases.model(), [cases.images()], out_dtype=torch.int8)


def test_a_call_is_refused_as_of_any_network(monkeypatch):
    quantized, x = cases.quantized(), cases.images()
    with pytest.raises(ValueError, match="must have 3 channels"):
        quantized(x[:, :2])
    with pytest.raises(ValueError, match="too small"):
        cases.quantized("torchhub")(x[..., :4, :4])
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="NaN or Inf, for which there are no bytes"):
            quantized(bad)
    with pytest.raises(RuntimeError, match="no backward pass"):
        quantized(x.clone().requires_grad_())
    monkeypatch.setenv("VOVNET_FAST_BACKEND", "cuda")
    with pytest.raises(BackendError, match="the cuda backend cannot run a VoVNet in int8: it has"):
        quantized(x)


def test_the_model_stays_as_it_was():
    model = cases.model("depthwise")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vovnet_fast.quantize(model, [cases.images()], equalize=True, **cases.QUICK)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


def test_it_runs_as_the_network_in_floating_point_says():
    """Folded weights by name, computed in fp64, are the model."""
    from vovnet_fast.deploy.freeze import folded

    for name in TINY:
        model = cases.model(name).double()
        x = cases.images(seed=5).double()
        weights = Folded.of(folded(model, torch.float64))
        with torch.no_grad():
            found = Floating(weights, lambda name, x: None).run(x, model.out_features)
            for feature, wanted in zip(found, model(x)):
                torch.testing.assert_close(feature, wanted)


def test_a_published_architecture():
    torch.manual_seed(0)
    model = VoVNet("vovnet-19-slim-dw1", input_ch=4).eval()
    quantized = vovnet_fast.quantize(model, cases.images(1, 4), calibrator="minmax")
    assert quantized.spec.name == "vovnet-19-slim-dw1"
    assert len(quantized(cases.images(1, 4))) == 4


def test_it_tells_what_is_done_next():
    told = []
    model, images = cases.model(), [cases.images(2)]
    vovnet_fast.quantize(model, images, stem="auto", told=told.append, **cases.QUICK)
    assert told == [
        "correcting biases", "comparing what was chosen in several ways", "measuring what it costs",
    ]  # fmt: skip
