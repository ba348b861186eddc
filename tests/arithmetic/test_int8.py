"""The ops in int8 against Python's own integers, rounded by NumPy as the document says."""

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from vovnet_fast import reference
from vovnet_fast.arithmetic import LEVELS, int8
from vovnet_fast.arithmetic.layers import (
    QuantizedConv,
    QuantizedDepthwise,
    QuantizedGate,
    QuantizedSum,
)


def rounded(acc, multiplier, low, high):
    """``clamp(float32(acc) * multiplier, low, high)``, to nearest even, of one integer."""
    scaled = np.float32(int(acc)) * np.float32(multiplier)
    return int(np.rint(np.clip(scaled, np.float32(low), np.float32(high))))


def conv_layer(weight, bias, multiplier, *, stride=1):
    c_out, c_in = weight.shape[0], weight.shape[3]
    unit = torch.full((c_out,), 0.01)
    return QuantizedConv(
        weight, bias, multiplier, unit, stride, None, torch.ones(c_in), None, 1.0
    )  # fmt: skip


def sums_of(x, weight, stride):
    """``[N, H', W', C_out]`` of Python's integers."""
    x, weight = x.tolist(), weight.tolist()
    n, h, w, k = len(x), len(x[0]), len(x[0][0]), len(weight[0])
    out = []
    for image in x:
        for i in range(0, h, stride):
            for j in range(0, w, stride):
                for kernel in weight:
                    total = 0
                    for a in range(k):
                        for b in range(k):
                            y, z = i + a - k // 2, j + b - k // 2
                            if 0 <= y < h and 0 <= z < w:
                                total += sum(
                                    p * q for p, q in zip(image[y][z], kernel[a][b], strict=True)
                                )
                    out.append(total)
    return np.array(out, dtype=object).reshape(n, -(-h // stride), -(-w // stride), len(weight))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from(LEVELS), st.sampled_from([1, 3]), st.sampled_from([1, 2])
)
def test_conv(seed, levels, kernel, stride):
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    x = integers(0, levels, 1, 4, 5, 6).to(torch.uint8)
    weight = integers(-127, 127, 3, kernel, kernel, 6).to(torch.int8)
    bias = integers(-20000, 20000, 3).to(torch.int32)
    multiplier = torch.rand(3, generator=generator) * 2e-3
    layer = conv_layer(weight, bias, multiplier, stride=stride)
    acc = sums_of(x, weight, stride) + np.array(bias.tolist(), dtype=object)
    buffer = torch.full((1, *acc.shape[1:3], 9), 200, dtype=torch.uint8)
    out, feature = buffer[..., 4:7], torch.empty(acc.shape)
    sums = int8.conv(x, layer, out, levels=levels, feature=feature, pool=True)
    wanted = np.empty(acc.shape, dtype=np.int64)
    for index, value in np.ndenumerate(acc):
        wanted[index] = rounded(value, multiplier[index[3]].item(), 0, levels)
    assert np.array_equal(out.numpy(), wanted)
    assert (buffer[..., :4] == 200).all()
    assert (buffer[..., 7:] == 200).all()
    assert np.array_equal(sums.sum(1).numpy(), wanted.sum((1, 2)))
    unrounded = np.maximum(acc.astype(np.float32) * np.float32(layer.unit.numpy()), 0)
    assert np.array_equal(feature.numpy(), unrounded)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_at_the_extremes(levels, sign):
    """The widest 3x3 there is, all at their largest: where kernels saturate or lose digits."""
    channels = 1024
    x = torch.full((1, 3, 3, channels), levels, dtype=torch.uint8)
    weight = torch.full((1, 3, 3, channels), 127 * sign, dtype=torch.int8)
    bias = torch.tensor([sign], dtype=torch.int32)
    exact = sign * (9 * channels * 127 * levels + 1)
    multiplier = torch.tensor([100 / (9 * channels * 127 * levels)])
    layer = conv_layer(weight, bias, multiplier)
    out, feature = torch.empty(1, 3, 3, 1, dtype=torch.uint8), torch.empty(1, 3, 3, 1)
    int8.conv(x, layer, out, levels=levels, feature=feature)
    assert abs(exact) < 2**31
    assert out[0, 1, 1, 0] == rounded(exact, multiplier.item(), 0, levels)
    assert feature[0, 1, 1, 0] == max(np.float32(exact) * np.float32(0.01), 0)


def test_ties_go_to_even_and_ends_are_reached():
    acc = torch.tensor([-3.0, -1.0, 1.0, 3.0, 5.0, 7.0, 300.0], dtype=torch.float64)
    found = int8.requantize(acc, torch.tensor(0.5), 0, 127)
    assert found.tolist() == [0, 0, 0, 2, 2, 4, 127]


def test_an_accumulator_beyond_24_bits_is_rounded_once():
    """2**24 + 1 has no fp32: it becomes 2**24, to nearest even, and the product is of that."""
    acc = torch.tensor([2**24 + 1, 2**24 + 3, -(2**31) + 1], dtype=torch.float64)
    found = int8.requantize(acc, torch.tensor(2.0**-17), -20000, 20000)
    assert found.tolist() == [128, 128, -16384]
    scale = torch.tensor(1.0)
    assert int8.requantize(acc[:2], scale, 0, 2**30).tolist() == [2**24, 2**24 + 4]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(levels, stride):
    torch.manual_seed(0)
    x = torch.randint(0, levels + 1, (2, 5, 4, 3), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (3, 3, 3), dtype=torch.int8)
    multiplier, zero = torch.rand(3) * 2e-3, torch.tensor([0, 60, levels], dtype=torch.uint8)
    layer = QuantizedDepthwise(weight, multiplier, zero, torch.ones(3), torch.ones(3))
    out = torch.empty(2, -(-5 // stride), -(-4 // stride), 3, dtype=torch.uint8)
    int8.depthwise(x, layer, out, levels=levels, stride=stride)
    for c in range(3):
        kernel = weight[None, :, :, c, None]
        acc = sums_of(x[..., c : c + 1], kernel, stride)[..., 0]
        low, high = -int(zero[c]), levels - int(zero[c])
        for index, value in np.ndenumerate(acc):
            wanted = rounded(value, multiplier[c].item(), low, high) + int(zero[c])
            assert out[(*index, c)] == wanted


def gate_layer(kind, channels, levels):
    bits = int8.MEAN_BITS - levels.bit_length()
    weight = torch.randint(-300, 300, (channels, channels), dtype=torch.int16)
    bias = torch.randint(2**20, 2**21, (channels,), dtype=torch.int32)
    table = None
    multiplier = torch.rand(channels) * 6e-3
    if kind == "sigmoid":
        table = torch.arange(int8.TABLE, dtype=torch.int32) * 3
        multiplier = torch.rand(channels) * 1e-3
    return QuantizedGate(weight, bias, multiplier, 2**bits, 20000.0, kind, table)


@pytest.mark.parametrize("kind", ["hard_sigmoid", "sigmoid"])
@pytest.mark.parametrize("levels", LEVELS)
def test_gates(kind, levels):
    torch.manual_seed(1)
    layer, pixels = gate_layer(kind, 5, levels), 77
    sums = torch.randint(0, levels * pixels // 3, (2, 3, 5), dtype=torch.int32)
    found = int8.gates(sums, pixels, layer)
    for n in range(2):
        means = []
        for c in range(5):
            factor = np.float32(layer.mean_scale / pixels)
            total = np.float32(sum(sums[n, :, c].tolist()))
            means.append(int(np.rint(total * factor)))
        for o in range(5):
            acc = sum(w * m for w, m in zip(layer.weight[o].tolist(), means, strict=True))
            acc += layer.bias[o].item()
            most = 20000 if kind == "hard_sigmoid" else int8.TABLE - 1
            gate = rounded(acc, layer.multiplier[o].item(), 0, most)
            assert found[n, o] == (gate if layer.table is None else layer.table[gate])
    assert found.unique().numel() > 4


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("identity", [True, False])
def test_apply_gates(levels, gated, identity):
    torch.manual_seed(0)
    z, x = torch.randint(0, levels + 1, (2, 2, 2, 3, 4), dtype=torch.uint8)
    gates = torch.randint(0, 2**15, (2, 4), dtype=torch.int32) if gated else None
    layer = QuantizedSum(20000.0, 9001.0, 15, 0.25)
    out, feature = torch.empty(2, 2, 3, 4, dtype=torch.uint8), torch.empty(2, 2, 3, 4)
    other = x if identity else None
    int8.apply_gates(z, gates, other, layer, out, levels=levels, feature=feature)
    for n, h, w, c in np.ndindex(*out.shape):
        acc = int(z[n, h, w, c]) * (int(gates[n, c]) if gated else 20000)
        acc += int(x[n, h, w, c]) * 9001 if identity else 0
        assert acc < 2**24
        assert out[n, h, w, c] == rounded(acc, 2.0**-15, 0, levels)
        assert feature[n, h, w, c] == np.float32(acc) * np.float32(0.25 * 2.0**-15)


@pytest.mark.parametrize("mode", ["ceil", "padded"])
def test_max_pool(mode):
    x = torch.randint(0, 256, (2, 6, 7, 3), dtype=torch.uint8)
    wanted = reference.max_pool(x.permute(0, 3, 1, 2).double(), mode).permute(0, 2, 3, 1)
    out = torch.empty(wanted.shape, dtype=torch.uint8)
    int8.max_pool(x, out, mode)
    assert torch.equal(out.double(), wanted)


@pytest.mark.parametrize(("wide", "limit"), [(False, 127), (True, 1023)])
def test_images(wide, limit):
    x = torch.tensor([-9.0, -0.25, 0.0, 0.125, 0.375, 9.0]).view(1, 1, 6, 1)
    out = torch.empty(x.shape, dtype=int8.image_dtype(wide))
    int8.quantize_image(x, 0.25, out, wide=wide)
    assert out.flatten().tolist() == [-36, -1, 0, 0, 2, 36]  # Ties to even.
    int8.quantize_image(x * 1000, 0.25, out, wide=wide)
    assert out.abs().max() == limit
