"""Training on the integers: the same features bit for bit, and the gradients of what they stand
for."""

import pytest
import torch
import torch.nn.functional as F

import vovnet_fast
from tests.quantization import cases
from tests.quantization.cases import sqnr
from tests.tiny import TINY
from vovnet_fast.quantization.floating import Floating
from vovnet_fast.quantization.straight_through import dequantized, replace


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_features_are_those_of_the_integers(name, dtype):
    trainable, x = cases.trainable(name, dtype), cases.images(seed=4)
    wanted = trainable.quantized()(x)
    found = trainable(x)
    assert all(y.requires_grad for y in found)
    assert all(map(torch.equal, found, wanted))
    with torch.no_grad():
        assert all(map(torch.equal, trainable(x), wanted))


def test_it_begins_as_what_quantize_makes():
    x = cases.images(seed=4)
    options = dict(stem="wide", calibrator="percentile", equalize=True)
    wanted = vovnet_fast.quantize(cases.model(), [cases.images(6)], **options)
    trainable = cases.trainable(**options)
    found = trainable.quantized()
    assert all(map(torch.equal, found(x), wanted(x)))
    assert trainable.feature_channels == wanted.feature_channels
    with pytest.raises(ValueError, match="nothing was measured"):
        found.report()
    measured = trainable.quantized(cases.images()).report()
    assert measured.least > 20


def test_replace_has_the_value_of_one_and_the_gradient_of_the_other():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def function(x):
        return replace(x.sin(), x.detach().round())

    assert torch.equal(function(x), x.detach().round())
    [found] = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(found, x.detach().cos())
    assert torch.autograd.gradcheck(lambda x: replace(x.sin(), x.sin().detach()), x)
    with pytest.raises(ValueError, match="cannot stand for"):
        replace(x, x[:2])


def test_gradients_are_those_of_the_rounded_network():
    """Written out once more for the first two layers, where nothing but rounding differs."""
    trainable = cases.trainable()
    x = cases.images(seed=4).requires_grad_()
    network = trainable.quantized().network
    trainable.out_features = ("stem_2",)
    [feature] = trainable(x)
    direction = torch.randn(feature.shape)
    weights = [trainable.weights[name] for name in ("stem_1", "stem_2")]
    biases = [trainable.biases[name] for name in ("stem_1", "stem_2")]
    found = torch.autograd.grad((feature * direction).sum(), [x, *weights, *biases])

    image = (x / network.scales["image"]).round().clamp(-127, 127) * network.scales["image"]
    image = image.detach().requires_grad_()
    first, second = (dequantized(network.layers[name]) for name in ("stem_1", "stem_2"))
    first, second = ([t.requires_grad_() for t in pair] for pair in (first, second))
    z1 = F.conv2d(image, first[0].permute(0, 3, 1, 2), first[1], stride=2, padding=1)
    step = network.scales["stem_1"]
    a1 = (z1.detach() / step).round().clamp(0, 127) * step
    a1.requires_grad_()
    z2 = F.conv2d(a1, second[0].permute(0, 3, 1, 2), second[1], stride=1, padding=1)
    g_w2, g_b2, g_a1 = torch.autograd.grad((z2.relu() * direction).sum(), [*second, a1])
    inside = (z1 > 0) & (z1 < 127 * step)
    g_w1, g_b1, g_x = torch.autograd.grad((z1 * (g_a1 * inside)).sum(), [*first, image])
    limit = 127 * network.scales["image"]
    g_x = g_x * (x.abs() <= limit)
    for ours, theirs in zip(found, (g_x, g_w1, g_w2, g_b1, g_b2)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_a_gradient(name):
    trainable = cases.trainable(name)
    sum(y.square().mean() for y in trainable(cases.images(seed=4))).backward()
    without = [key for key, p in trainable.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in trainable.parameters())
    zero = [key for key, p in trainable.named_parameters() if not p.grad.any()]
    assert not zero


def test_gradients_point_where_those_in_floating_point_do():
    trainable, x = cases.trainable(levels=255), cases.images(seed=4)
    direction = [torch.randn(y.shape) for y in trainable(x)]

    def gradient(run):
        trainable.zero_grad()
        sum((y * d).sum() for y, d in zip(run(x), direction)).backward()
        return torch.cat([p.grad.flatten() for p in trainable.parameters()])

    floating = Floating(trainable.folded(), lambda name, x: None)
    ours = gradient(trainable)
    theirs = gradient(lambda x: floating.run(x, trainable.out_features))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.97


def test_training_brings_it_nearer():
    """A network whose weights have been disturbed, to what it was."""
    model, x = cases.model("torchhub"), cases.images(2)
    with torch.no_grad():
        wanted = model(x)
    trainable = cases.trainable("torchhub")
    with torch.no_grad():
        for parameter in trainable.weights.values():
            parameter *= 1 + 0.2 * torch.randn(parameter.shape)
    before = min(map(sqnr, trainable.quantized()(x), wanted))
    optimizer = torch.optim.Adam(trainable.parameters(), lr=1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        sum(F.mse_loss(y, w) / w.var() for y, w in zip(trainable(x), wanted)).backward()
        optimizer.step()
    after = trainable.quantized()
    assert min(map(sqnr, after(x), wanted)) > before + 3
    assert all(map(torch.equal, after(x), trainable(x)))


def test_its_state_is_all_that_it_needs():
    first = cases.trainable("depthwise")
    second = cases.trainable("depthwise", calibrator="minmax", bias_correction=False)
    x = cases.images(seed=4)
    assert not torch.equal(first(x)[0], second(x)[0])
    second.load_state_dict(first.state_dict())
    assert all(map(torch.equal, first(x), second(x)))


def test_what_cannot_be_quantised_is_refused():
    trainable = cases.trainable()
    with pytest.raises(ValueError, match="NaN or Inf"):
        trainable(torch.full((1, 3, 40, 40), float("nan")))
    with pytest.raises(ValueError, match="too small"):
        cases.trainable("torchhub")(torch.zeros(1, 3, 4, 4))
