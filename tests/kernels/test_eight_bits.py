"""Kernels in int8 and fp8 against :mod:`vovnet_fast.arithmetic`: int8 bit for bit, fp8 within a
step of e4m3, whatever the sizes, the strides and the numbers."""

import dataclasses

import pytest
import torch

from tests.kernels.forms import require
from vovnet_fast.arithmetic import LEVELS, fp8
from vovnet_fast.arithmetic.layers import QuantizedConv
from vovnet_fast.kernels import conv_eight_bits
from vovnet_fast.kernels.conv_config import ConvConfig
from vovnet_fast.kernels.conv_eight_bits_config import EightBits, candidates, offset
from vovnet_fast.selfcheck import eight_bits as check

FORMS = ("int8", "fp8") if fp8.why_not() is None else ("int8",)
DTYPES = {form: dtype for dtype, form in check.FORMS.items()}

ON_GPU = torch.cuda.is_available()
SLACK = check.SLACK if ON_GPU else 1e-6
"""The interpreter sums in fp32, and a GPU's tensor cores in less."""


@pytest.fixture(params=FORMS)
def form(request, device):
    if ON_GPU and request.param == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    return request.param


def numbers(form, device, levels=LEVELS[0]):
    return check.Numbers(form, device, levels if form == "int8" else fp8.LARGEST)


def assert_right(found, wanted, form):
    apart = check.distance(found, wanted, form, SLACK)
    assert apart <= (form == "fp8"), f"{apart} apart"


def quantized(t, c_in, c_out, kernel, stride, weight=None):
    weight = t.weight(c_out, kernel, kernel, c_in) if weight is None else weight
    factors = t.factors(c_out, kernel * kernel * c_in)
    unit = t.floats(c_out, scale=0.01)
    return QuantizedConv(weight, t.bias(c_out), factors, unit, stride, None, unit, None, 1.0)


def run_config(config, x, layer, out, levels, feature, pool):
    """The kernel in one configuration; sums if ``pool``."""
    sums = None
    weight = layer.weight.half() if layer.weight.dtype == torch.int16 else layer.weight
    if offset(x.dtype, levels):
        sums = weight.sum((1, 2, 3), dtype=torch.int32)
    epilogue = EightBits(
        layer.bias, layer.multiplier, layer.unit, levels, out, feature, weight_sums=sums
    )
    partials = None
    if pool:
        tiles = conv_eight_bits.pool_tiles(x, weight, epilogue, stride=layer.stride, config=config)
        partials = torch.full((x.shape[0], tiles, weight.shape[0]), 99, device=x.device)
        partials = partials.to(layer.bias.dtype)
        epilogue = dataclasses.replace(epilogue, pool_partials=partials)
    conv_eight_bits.conv(x, weight, epilogue, stride=layer.stride, config=config)
    return partials


def assert_same_conv(t, config, x, layer, *, out=True, feature=True, pool=True, levels=None):
    levels = levels or t.levels
    n, h, w, _ = x.shape
    size = n, (h - 1) // layer.stride + 1, (w - 1) // layer.stride + 1, layer.weight.shape[0]
    found = []
    for ours in (False, True):
        target = t.slot(*size) if out else None
        value = t.slot(*size, dtype=torch.float32) if feature else None
        pools = pool and out
        if ours:
            sums = run_config(config, x, layer, target, levels, value, pools)
        else:
            sums = t.ops.conv(x, layer, target, levels=levels, feature=value, pool=pools)
        pair = [view.clone() for view in (target, value) if view is not None]
        found.append(pair if sums is None else [*pair, check.pooled(sums, target)])
    for theirs, mine in zip(*found, strict=True):
        assert_right(mine, theirs, t.form)
    assert len(found[0][0].to(torch.float32).unique()) > 2, "nothing was compared"
    assert t.untouched()


POINTER = ConvConfig("pointer", 1, 64, (32, 16), 64, 4, 3)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(
    "shape",
    [
        # n, h, w, c_in, c_out, kernel, stride
        (1, 7, 9, 64, 48, 3, 1),
        (2, 13, 5, 80, 40, 3, 1),  # Chunks that are not full, and groups of channels.
        (1, 20, 13, 96, 96, 3, 2),
        (2, 9, 11, 200, 40, 1, 1),
        (1, 3, 3, 5, 7, 3, 1),  # Steps across taps, and no vectors.
        (1, 1, 1, 17, 16, 3, 2),
        (1, 1, 130, 64, 33, 1, 1),
    ],
)
def test_conv(shape, form, levels, device):
    n, h, w, c_in, c_out, kernel, stride = shape
    if form == "fp8" and levels != LEVELS[0]:
        pytest.skip("levels are those of int8")
    t = numbers(form, device, levels)
    layer = quantized(t, c_in, c_out, kernel, stride)
    assert_same_conv(t, POINTER, t.activations(n, h, w, c_in), layer)


@pytest.mark.parametrize("written", ["slot", "feature"])
def test_what_is_written(written, form, device):
    t = numbers(form, device)
    layer = quantized(t, 64, 32, 3, 1)
    options = dict(out=written == "slot", feature=written == "feature")
    assert_same_conv(t, POINTER, t.activations(1, 6, 7, 64), layer, **options)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_saturates(sign, levels, device):
    """Every product the largest there is, or the least, and padding beside them."""
    t = numbers("int8", device, levels)
    weight = torch.full((16, 3, 3, 128), 127 * sign, dtype=torch.int8, device=device)
    weight[::2] *= -1
    weight[3] = -127
    weight[5, 1, 1] = 127
    layer = quantized(t, 128, 16, 3, 1, weight)
    layer = layer._replace(multiplier=torch.full_like(layer.multiplier, 5e-6 / levels * 127))
    x = t.slot(1, 5, 6, 128).fill_(levels)
    assert_same_conv(t, POINTER, x, layer)


def test_large_accumulators_are_rounded_to_nearest_even(device):
    """Beyond 2**24 fp32 has no odd integers."""
    t = numbers("int8", device)
    layer = quantized(t, 64, 32, 1, 1)
    bias = t.integers(2**25, 2**26, 32, dtype=torch.int32)
    ones = torch.ones_like(layer.multiplier)
    layer = layer._replace(bias=bias, unit=ones, multiplier=ones * 1.5e-6)
    assert_same_conv(t, POINTER, t.activations(2, 5, 7, 64), layer)


def test_ties_go_to_even(device):
    t = numbers("int8", device)
    weight = torch.eye(16, dtype=torch.int8, device=device).view(16, 1, 1, 16)
    layer = quantized(t, 16, 16, 1, 1, weight)
    layer = layer._replace(
        bias=torch.zeros_like(layer.bias), multiplier=torch.full_like(layer.multiplier, 0.5)
    )
    x = t.slot(1, 8, 16, 16)
    x.copy_(torch.arange(128, device=device).view(1, 8, 16, 1).expand(x.shape))
    out = t.slot(1, 8, 16, 16)
    run_config(POINTER, x, layer, out, 127, None, False)
    assert out[0, 0, :6, 0].tolist() == [0, 0, 1, 2, 2, 2]


def test_slots_of_one_buffer(form, device):
    """From a slot into the next one, as in a block: pixels are further apart than their
    channels."""
    t = numbers(form, device)
    buffer = t.activations(2, 5, 7, 96)
    layer = quantized(t, 32, 32, 3, 1)
    wanted = t.slot(2, 5, 7, 32)
    t.ops.conv(buffer[..., :32], layer, wanted, levels=t.levels)
    before = buffer.clone()
    run_config(POINTER, buffer[..., :32], layer, buffer[..., 32:64], t.levels, None, False)
    assert_right(buffer[..., 32:64], wanted, form)
    for part in (slice(0, 32), slice(64, 96)):
        assert torch.equal(buffer[..., part].float(), before[..., part].float())


@pytest.mark.parametrize("wide", [False, True])
def test_images(wide, form, device):
    t = numbers(form, device)
    x = torch.zeros(2, 11, 9, 3, dtype=t.ops.image_dtype(wide), device=device)
    t.ops.quantize_image(t.floats(2, 11, 9, 3) - 0.5, 0.4 / 127, x, wide=wide)
    weight = t.weight(64, 3, 3, 3, limit=255 if wide else 127)
    if wide and form == "fp8":
        weight = weight.float()
    layer = quantized(t, 3, 64, 3, 2, weight)
    capability = (9, 0)
    weight = layer.weight.half() if layer.weight.dtype == torch.int16 else layer.weight
    epilogue = EightBits(layer.bias, layer.multiplier, layer.unit, t.levels, t.slot(2, 6, 5, 64))
    found, _ = conv_eight_bits.choices(x, weight, epilogue, stride=2)
    assert found, f"nothing takes {x.dtype} on {capability}"
    for config in found:
        assert_same_conv(t, config, x, layer)


def shipped():
    """Every configuration of a few widths, with a second group of output channels."""
    layers = {}
    for form in FORMS:
        for c_out in (64, 80, 128, 192, 224):
            for c_in, kernel in ((64, 3), (80, 3), (192, 1)):
                for capability in ((8, 9), (9, 0)):
                    for config in candidates(capability, c_in, c_out, form, kernel=kernel):
                        layers[config, kernel, form] = sum(config.block_out) + 16
    return [
        pytest.param(config, c_out, kernel, form, id=f"{form}-{config.name}-{kernel}x{kernel}")
        for (config, kernel, form), c_out in layers.items()
    ]


@pytest.mark.parametrize(("config", "c_out", "kernel", "form"), shipped())
def test_every_configuration(config, c_out, kernel, form, device):
    require(config, device)
    t = numbers(form, device)
    layer = quantized(t, 48, c_out, kernel, 1)
    assert_same_conv(t, config, t.activations(1, 5, 17, 48), layer)


@pytest.mark.parametrize("function", ["quantize_image", "conv", "depthwise", "max_pool"])
def test_the_self_check_passes(function, form, device):
    rows = check.run(f"triton.{form}", device, DTYPES[form], [function], slack=SLACK)
    assert len(rows) > 1
    assert not [str(row) for row in rows if not row.passed]


@pytest.mark.parametrize("function", ["gates", "apply_gates"])
def test_gates_pass_the_self_check(function, form, device):
    """Gates of fp8, and what they are applied to, are summed in fp32."""
    rows = check.run(f"triton.{form}", device, DTYPES[form], [function])
    assert len(rows) > 1
    assert not [str(row) for row in rows if not row.passed]


def test_the_self_check_finds_what_is_wrong(form, device, monkeypatch):
    """A bit too much in one place, and a byte beside a slot."""
    from vovnet_fast.backends.triton import fp8 as of_fp8
    from vovnet_fast.backends.triton import int8 as of_int8

    module = of_int8 if form == "int8" else of_fp8
    right = module.max_pool

    def wrong(x, out, mode):
        right(x, out, mode)
        out.view(torch.uint8)[0, 0, 0, 0] ^= 0x12

    def beside(x, out, mode):
        right(x, out, mode)
        out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(1)

    for broken, words in ((wrong, "error"), (beside, "it wrote outside its slot")):
        monkeypatch.setattr(module, "max_pool", broken)
        rows = check.run(f"triton.{form}", device, DTYPES[form], ["max_pool"])
        assert not any(row.passed for row in rows)
        assert words in str(rows[0])
