"""Equalisation leaves the function as it is; corrected biases leave the means as they are."""

import pytest
import torch

from tests.quantization import cases
from tests.tiny import TINY
from vovnet_fast.deploy.freeze import folded as fold
from vovnet_fast.quantization.adjusting import correct_biases, equalize
from vovnet_fast.quantization.building import build
from vovnet_fast.quantization.calibrating import Images, calibrate
from vovnet_fast.quantization.floating import Floating, Folded
from vovnet_fast.quantization.formats import Format
from vovnet_fast.quantization.report import measure
from vovnet_fast.quantization.straight_through import StraightThrough

INT8 = Format("int8", 127)


def features(folded, x, out_features):
    return Floating(folded, lambda name, y: None).run(x, out_features)


@pytest.mark.parametrize("out_features", [("stage2", "stage5"), ("stem_2", "stem", "stage4")])
@pytest.mark.parametrize("name", TINY)
def test_an_equalised_network_is_the_same_function(name, out_features):
    model = cases.model(name, out_features=out_features)
    before = Folded.of(fold(model, torch.float64)).map(torch.Tensor.double)
    x = cases.images().double()
    after = equalize(before, x, out_features)
    changed = [
        key for key in before.layers
        if not torch.equal(before.layers[key].weight, after.layers[key].weight)
    ]  # fmt: skip
    assert {"stem_1", "OSA2_1_0", "OSA2_1_1"} <= set(changed)
    other = cases.images(seed=2).double()
    with torch.no_grad():
        wanted, found = (features(each, other, out_features) for each in (before, after))
    for y, z in zip(wanted, found):
        torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-12)


def test_channels_of_unlike_ranges_are_made_alike():
    """A network that equalisation is made for: the same function, its channels at odds."""
    model = cases.model()
    plain = Folded.of(fold(model, torch.float64)).map(torch.Tensor.float)
    layers = dict(plain.layers)
    odd = torch.logspace(-1.5, 1.5, 8)
    first, second = layers["stem_1"], layers["stem_2"]
    layers["stem_1"] = first._replace(
        weight=first.weight * odd[:, None, None, None], shift=first.shift * odd
    )
    layers["stem_2"] = second._replace(weight=second.weight / odd)
    odds = plain._replace(layers=layers)
    x = cases.images(4)

    def least(folded):
        batches = Images([x], model)
        [ranges] = calibrate(folded, batches, ("stem_2",), INT8, ["minmax"], 100)
        network = build(folded, ranges, INT8, ("stem_2",))
        return measure(network, folded, x)[-1].sqnr

    with torch.no_grad():
        before, after = least(odds), least(equalize(odds, x, ("stem_2",)))
        assert after > before + 5
        assert after > least(plain) - 1


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", ["detectron2", "depthwise"])
def test_corrected_biases_keep_the_means(name, dtype):
    form = Format(dtype, 127 if dtype == "int8" else 448)
    model, x = cases.model(name), cases.images(4)
    folded = Folded.of(fold(model, torch.float64)).map(torch.Tensor.float)
    with torch.no_grad():
        [ranges] = calibrate(folded, Images([x], model), model.out_features, form, ["minmax"], 100)
        mended = correct_biases(folded, ranges, form, x, model.out_features)
        means = {}
        Floating(folded, lambda name, y: means.setdefault(name, y.mean((0, 2, 3)))).run(
            x, model.out_features
        )
        errors = []
        for weights in (folded, mended):
            watched = _Means(build(weights, ranges, form, model.out_features))
            watched.run(x)
            errors.append(sum((watched.means[k] - means[k]).abs().sum() for k in watched.means))
    assert errors[1] < 0.6 * errors[0]
    assert folded.layers["OSA2_1_0"].shift is not mended.layers["OSA2_1_0"].shift
    assert torch.equal(folded.layers["OSA2_1_0"].weight, mended.layers["OSA2_1_0"].weight)


class _Means(StraightThrough):
    def __init__(self, network):
        super().__init__(network)
        self.means = {}

    def observe(self, name, x):
        if name.startswith("OSA") and "depthwise" not in name:
            self.means[name] = x.mean((0, 2, 3))
