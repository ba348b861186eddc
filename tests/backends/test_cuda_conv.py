"""The cuda backend's choice among engines of convolutions, with its own kernels on the host."""

import types

import pytest
import torch

pytest.importorskip("triton")  # The cost model is the kernels'.

from tests.csrc import cuda_on_cpu
from tests.csrc.test_conv_sm80 import Layer
from vovnet_fast import _optional, tuning
from vovnet_fast.backends import _cuda_conv, _extension, _predict, conv_sm80, cuda, reference
from vovnet_fast.kernels import cost
from vovnet_fast.kernels.device import CARDS

A100, H100 = (next(card for card in CARDS if card.name == name) for name in ("A100", "H100"))
HALF = torch.float16


@pytest.fixture
def measured(once, monkeypatch, tmp_path):
    """Has everything measured as on a GPU, by a clock that each engine's entry tells: seconds.

    The engines really run, on the host.
    """
    module = cuda_on_cpu.built(once)
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_extension, "CUDA", _extension.Ops(lambda: module, cuda_on_cpu.on_host))
    monkeypatch.setattr(conv_sm80, "why_not", lambda device: None)
    monkeypatch.setattr(_cuda_conv, "cudnn", lambda: True)
    monkeypatch.setattr(tuning, "may_measure", lambda device: True)
    monkeypatch.setattr(tuning, "_announce", lambda: None)
    clock, ran = {}, []

    def timer(device):
        def seconds(work):
            work()
            return clock.get(ran[-1].split(" ")[0], 1.0)

        return seconds

    def noting(run):
        def noted(engine, *args, **options):
            ran.append(engine)
            return run(engine, *args, **options)

        return noted

    for name in (
        "run_engine",
        "run_statistics_engine",
        "run_input_grad_engine",
        "run_weight_grad_engine",
    ):
        monkeypatch.setattr(_cuda_conv, name, noting(getattr(_cuda_conv, name)))
    monkeypatch.setattr(tuning, "_device_timer", timer)
    return clock, ran


def choices():
    return tuning.table().choices()[tuning.machine(torch.device("cpu"))]


@pytest.mark.parametrize(
    "kind",
    [
        "conv", "statistics", "input gradient", "weight gradient", "strided input gradient",
        "first layer", "first layer's weight gradient", "gradient of images",
    ],
)  # fmt: skip
@pytest.mark.parametrize("fastest", ["aten", "conv-sm80"])
def test_the_fastest_that_is_right_runs(kind, fastest, measured):
    clock, ran = measured
    clock[fastest] = 0.5
    layer = Layer(1, 5, 6, 16, 80)
    for _ in range(2):  # What was found out is remembered.
        ran.clear()
        layer.buffer.fill_(float("nan"))
        if kind == "conv":
            cuda.conv(layer.x, layer.weight, layer.scale, layer.shift, layer.out, pool=True)
            close(layer.out, layer.affine().relu())
        elif kind == "statistics":
            partials = cuda.conv_statistics(layer.x, layer.weight, layer.out)
            count, sums, _ = reference.batch_norm_merge(partials)
            exact = layer.product()
            assert set(count.tolist()) == {30.0}
            torch.testing.assert_close(sums.double(), exact.sum((0, 1, 2)), rtol=1e-2, atol=0.05)
            close(layer.out, exact)
        elif kind == "input gradient":
            gradient(layer)
        elif kind == "weight gradient":
            weight_gradient(layer)
        elif kind == "strided input gradient":
            strided_gradient(16)
        elif kind == "gradient of images":
            strided_gradient(3)
        else:
            image = Layer(1, 9, 12, 3, 64, stride=2)
            if kind == "first layer":
                cuda.conv(*tensors(image), stride=2)
                close(image.out, image.affine().relu())
            else:
                weight_gradient(image)
    assert [engine.split(" ")[0] for engine in ran] == [fastest]
    (choice,) = choices().values()
    assert {name.split(" ")[0] for name in choice.seconds} == {"aten", "conv-sm80"}


def close(found, exact):
    """cuDNN's are rounded twice."""
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)


def gradient(layer):
    """Of a layer with 64 input channels, added to what its slot holds, and masked."""
    g = Layer(1, 5, 6, 80, 64, kernel=3)
    weight = torch.randn(80, 3, 3, 64).div(24)
    scale = torch.rand(80)
    mask = g.beside(24)
    expected = g.out.normal_().double()
    reference.conv_input_grad(
        g.x.double(), weight.double(), scale.double(), expected, add=expected.clone(),
        mask=mask.double(),
    )  # fmt: skip
    cuda.conv_input_grad(g.x, weight, scale, g.out, add=g.out, mask=mask)
    close(g.out, expected)


def tensors(layer):
    return layer.x, layer.weight, layer.scale, layer.shift, layer.out


def strided_gradient(c_in):
    """Added to what its slot holds, which is put back after engines were measured, and masked."""
    layer = Layer(1, 9, 12, c_in, 24, stride=2)
    g, dx, mask = layer.beside(24), layer.x, torch.randn(1, 9, 12, c_in).half()
    start, scale = dx.double(), torch.rand(24)
    expected = torch.empty_like(start)
    reference.conv_input_grad(
        g.double(), layer.weight.double(), scale.double(), expected, stride=2, add=start,
        mask=mask.double(),
    )  # fmt: skip
    cuda.conv_input_grad(g, layer.weight.float(), scale, dx, stride=2, add=dx, mask=mask)
    close(dx, expected)


def weight_gradient(layer):
    g, weight = layer.beside(layer.size[3]), layer.weight.float()
    found = cuda.conv_weight_grad(layer.x, g, weight, layer.scale, stride=layer.stride)
    given = (each.double() for each in (layer.x, g, weight, layer.scale))
    expected = reference.conv_weight_grad(*given, stride=layer.stride)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=0.05)


def test_an_engine_that_is_wrong_is_never_chosen(measured, monkeypatch):
    clock, ran = measured
    clock["conv-sm80"] = 0.1
    run = conv_sm80.run

    def wrong(engine, x, weight, out, **options):
        partials = run(engine, x, weight, out, **options)
        out[..., -1, :] += 1
        return partials

    monkeypatch.setattr(conv_sm80, "run", wrong)
    layer = Layer(1, 5, 6, 16, 80)
    cuda.conv(layer.x, layer.weight, layer.scale, layer.shift, layer.out)
    assert ran[-1] == "aten"
    close(layer.out, layer.affine().relu())


def test_fp32_that_may_not_be_rounded_to_tf32_is_cudnns(measured):
    """The host's tensors ask for fp32: products of TF32 do not pass, however fast."""
    clock, ran = measured
    clock["conv-sm80"] = 0.1
    layer = Layer(1, 5, 6, 16, 80, dtype=torch.float32)
    cuda.conv(layer.x, layer.weight, layer.scale, layer.shift, layer.out)
    assert any(engine.startswith("conv-sm80") for engine in ran)
    assert ran[-1] == "aten"


def test_without_measurements_it_is_cudnn_and_without_cudnn_our_own(measured, monkeypatch):
    _, ran = measured
    monkeypatch.setattr(tuning, "may_measure", lambda device: False)
    layer = Layer(1, 5, 6, 16, 80)
    cuda.conv(layer.x, layer.weight, layer.scale, layer.shift, layer.out)
    monkeypatch.setattr(_cuda_conv, "cudnn", lambda: False)
    cuda.conv(layer.x, layer.weight, layer.scale, layer.shift, layer.out)
    assert ran == ["aten", "conv-sm80 128x80"]
    layer.check(layer.affine().relu())


def test_without_triton_nothing_is_predicted_and_all_is_measured(measured, monkeypatch):
    clock, ran = measured
    clock["conv-sm80"] = 0.5
    monkeypatch.setattr(_optional, "why_not", {"triton": "triton is not installed"}.get)
    monkeypatch.setattr(_predict, "layer", None)
    layer = Layer(1, 5, 6, 16, 80)
    cuda.conv(layer.x, layer.weight, layer.scale, layer.shift, layer.out)
    layer.check(layer.affine().relu())
    names = [config.name for config in conv_sm80.configs(80)]
    assert set(ran) == {"aten", *names}
    properties = types.SimpleNamespace(name="A100", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    words = tuning.machine.__wrapped__(torch.device("cuda", 0)).split("; ")
    assert (words[0], words[3]) == ("A100 sm_80", "no triton")


def test_what_our_own_does_not_take_is_cudnns_at_once(measured):
    _, ran = measured
    for layer in (Layer(1, 5, 6, 12, 80), Layer(1, 5, 6, 16, 76), Layer(1, 5, 6, 3, 60)):
        cuda.conv(*tensors(layer))
        cuda.conv_statistics(layer.x, layer.weight, layer.out)
    strided = Layer(1, 6, 6, 12, 64, stride=2)
    out = strided.x.clone()
    cuda.conv_input_grad(strided.out.normal_(), strided.weight, None, out, stride=2)
    assert set(ran) == {"aten"}


def test_a_prediction_has_a_floor_and_knows_the_tiles():
    """Large tiles where there is work for all processors, small ones elsewhere."""
    for batch, height, width, first in ((8, 100, 168, "256x64"), (1, 13, 21, "128x64")):
        layer = cost.Layer(batch, height, width, 64, 64, dtype=HALF, tma=False)
        names = [config.name for config in conv_sm80.configs(64)]
        found = {name: _predict.library(name, layer, H100) for name in names}
        floor = max(layer.flop / H100.half, layer.activation_bytes / H100.dram)
        assert all(one.seconds > floor for one in found.values())
        assert min(found, key=lambda name: found[name].seconds) == f"conv-sm80 {first}"
    assert _predict.predict(["conv-sm80 256x96"], layer, A100) == {}


def test_predictions_of_the_first_layer_and_of_strided_gradients():
    """None is faster than memory or the products that are needed; large tiles for large maps."""
    options = dict(kernel=3, stride=2, dtype=HALF, tma=False)
    first = cost.Layer(8, 400, 672, 3, 64, **options)
    strided = cost.Layer(
        8, 400, 672, 128, 64, kind="gradient", added=64, transposed=True, **options
    )
    image = cost.Layer(8, 800, 1344, 64, 3, kind="gradient", transposed=True, **options)
    for layer, names in (
        (first, ["conv-sm80 128x64"]),
        (strided, ["conv-sm80 256x64", "conv-sm80 128x64"]),
        (image, ["conv-sm80 image"]),
    ):
        for device in (A100, H100):
            found = _predict.predict([*names, "conv-sm80 128x80"], layer, device)
            assert list(found) == names
            floor = max(layer.flop / device.half, layer.activation_bytes / device.dram)
            assert all(floor < one.seconds < 20 * floor for one in found.values())
    # A quarter of the taps: what strides skip is not multiplied.
    dense = cost.Layer(8, 400, 672, 128, 64, kind="gradient", added=64, **{**options, "stride": 1})
    name = "conv-sm80 256x64"
    both = [_predict.library(name, layer, H100) for layer in (strided, dense)]
    assert both[0].compute == pytest.approx(both[1].compute / 4, rel=0.05)


def test_candidates_are_one_of_each_kind():
    layer = cost.Layer(1, 50, 84, 128, 128, dtype=HALF, tma=False)
    names = ("aten", *(config.name for config in conv_sm80.configs(128)))
    found = _predict._of_libraries(layer, A100, names)
    assert tuple(found) == names
    assert len(found.likely) == 2
    assert found.likely[0] == "aten"
