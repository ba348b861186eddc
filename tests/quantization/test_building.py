"""Integer layers stand for the folded ones they were made of, and are kept whole."""

import pytest
import torch

from tests.quantization import cases
from tests.tiny import TINY
from vovnet_fast.arithmetic import int8
from vovnet_fast.deploy.freeze import folded as fold
from vovnet_fast.quantization.building import build, sigmoids
from vovnet_fast.quantization.calibrating import Images, calibrate
from vovnet_fast.quantization.floating import Folded
from vovnet_fast.quantization.formats import Format
from vovnet_fast.quantization.network import QuantizedVoVNet
from vovnet_fast.quantization.quantize import GAIN, quantize
from vovnet_fast.quantization.straight_through import dequantized

FORMATS = [Format("int8", 127), Format("int8", 255, True)]
FORMATS += [Format("fp8", 448, True)] if "fp8" in cases.DTYPES else []


def made(name, form):
    """Folded weights, ranges, and the network of them, biases as they come."""
    model = cases.model(name)
    folded = Folded.of(fold(model, torch.float64)).map(torch.Tensor.double)
    batches = Images(cases.images(), model)
    exact = folded.map(torch.Tensor.float)
    with torch.no_grad():
        [ranges] = calibrate(exact, batches, model.out_features, form, ["minmax"], 100)
        return folded, ranges, build(folded, ranges, form, model.out_features)


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("name", TINY)
def test_weights_and_biases_are_within_half_a_unit(name, levels):
    folded, ranges, network = made(name, Format("int8", levels))
    for key, layer in network.layers.items():
        weight, bias = dequantized(layer)
        params, unit = folded.layers[key], layer.unit.double()
        error = (weight.double() - params.weight).abs() * layer.in_scales.double()
        assert (error <= unit[:, None, None, None] * 0.5001).all()
        # Beside half a unit the rounding of the bias to fp32, in which it is handed out.
        assert ((bias.double() - params.shift).abs() <= unit * 0.5001 + 1e-6 * bias.abs()).all()
        torch.testing.assert_close(layer.multiplier * layer.scale, layer.unit)
        if layer.depthwise is not None:
            spatial = layer.depthwise
            reached = ranges[f"{key}/depthwise"]
            lowest = -spatial.zero.double() * spatial.scale.double()
            highest = (levels - spatial.zero.double()) * spatial.scale.double()
            step = spatial.scale.double() * 0.51
            assert (lowest <= reached.low + step).all()
            assert (highest >= reached.high - step).all()
            assert torch.equal(layer.in_zeros, spatial.zero)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["seed", "depthwise"])
def test_a_module_has_the_layers_that_it_was_made_of(name, form):
    """All of them go through tensors by name, and back."""
    _, _, network = made(name, form)
    held = QuantizedVoVNet(network).network
    for part in ("spec", "dtype", "levels", "wide_stem", "out_features", "scales", "sums"):
        assert getattr(held, part) == getattr(network, part), part
    assert list(held.layers) == list(network.layers)
    assert list(held.gates) == list(network.gates)
    for kind in ("layers", "gates"):
        for key, wanted in getattr(network, kind).items():
            assert_same(getattr(held, kind)[key], wanted)


def assert_same(found, wanted):
    """NamedTuples of tensors, numbers, and others such."""
    assert type(found) is type(wanted)
    for x, y in zip(found, wanted):
        if isinstance(y, tuple):
            assert_same(x, y)
        elif isinstance(y, torch.Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x.double(), y.double())
        else:
            assert x == y


@pytest.mark.parametrize("name", ["detectron2", "seed"])
def test_gates_are_those_of_the_layer_in_floating_point(name):
    folded, _, network = made(name, Format("int8", 127))
    for key, gate in network.gates.items():
        weight, bias = folded.gates[key]
        scale = network.scales[f"{key}_concat"]
        mean = torch.randint(0, 127 * gate.mean_scale, (3, len(bias)))
        found = int8.gates(mean.to(torch.int32)[:, None], gate.mean_scale, gate)
        logits = mean.double() * (scale / gate.mean_scale) @ weight.T + bias
        hard = gate.kind == "hard_sigmoid"
        wanted = ((logits + 3) / 6).clamp(0, 1) if hard else logits.sigmoid()
        assert (found / gate.most - wanted).abs().max() < 2e-3


def test_the_table_of_sigmoids():
    table = sigmoids(20000, torch.device("cpu"))
    assert table[1024] == 10000
    assert (table + table.flip(0).roll(1) - 20000)[1:].abs().max() <= 1
    assert (table[1:] >= table[:-1]).all()


def test_auto_takes_the_best_of_what_it_tries():
    """Of two calibrators and two stems; a wide stem has to be better by more than nothing."""
    taken = set()
    for seed in range(6):
        model = cases.model("detectron2")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 4:  # Some channels with large values.
                    parameter[torch.randint(len(parameter), (seed,))] *= 4
        x = cases.images(seed=seed)
        with torch.no_grad():
            features = model(x)

        def least(model=model, x=x, features=features, **options):
            found = quantize(model, x, report=False, **options)
            pairs = [(a.double(), b) for a, b in zip(features, found(x), strict=True)]
            return min(
                float(10 * (a.square().sum() / (a - b).square().sum()).log10()) for a, b in pairs
            )

        with torch.no_grad():
            ways = {
                (name, stem): least(calibrator=name, stem=stem)
                for name in ("mse", "minmax")
                for stem in ("int8", "wide")
            }
            found = least()
        assert found >= max(ways.values()) - GAIN - 1e-3
        taken.add(min(ways, key=lambda way, ways=ways, found=found: abs(ways[way] - found)))
    assert len({name for name, _ in taken}) == 2
