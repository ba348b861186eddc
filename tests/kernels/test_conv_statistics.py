"""Statistics of convolution outputs, as convolutions and the epilogue kernel leave them."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.forms import require
from vovnet_fast.kernels import epilogue as epilogue_module
from vovnet_fast.kernels._common import accumulator
from vovnet_fast.kernels.conv import conv, output_size, pool_tiles
from vovnet_fast.kernels.conv_config import ConvConfig, candidates
from vovnet_fast.kernels.epilogue import epilogue

HOPPER = (9, 0)
WIDTHS = (64, 80, 128, 192, 224, 256)
"""Output channels that together take every configuration."""

FORMS = {
    "tma": ConvConfig("tma", 4, 16, (64,), 32, 4, 3),
    "tma persistent": ConvConfig("tma", 4, 16, (64,), 32, 4, 3, persistent=True),
    "pointer": ConvConfig("pointer", 1, 64, (32, 16), 32, 4, 3),
}


def merged(partials):
    """(count, mean, sum of squared deviations) of each channel, from ``[N, T, 3, C]``, in fp64."""
    count, sums, squares = partials.double().flatten(0, 1).unbind(1)
    total = count.sum(0)
    mean = sums.sum(0) / total
    own = torch.where(count > 0, sums / count, mean)
    return total, mean, (squares + count * (own - mean).square()).sum(0)


def assert_statistics(partials, z):
    """Those of ``z`` as it is stored, to a few roundings of the dtype of sums."""
    z = z.double().flatten(0, 2)
    count, mean, squares = merged(partials)
    unit = torch.finfo(partials.dtype).eps
    assert (count == z.shape[0]).all()
    exact = z.mean(0)
    torch.testing.assert_close(mean, exact, rtol=0, atol=8 * unit * z.abs().max().item())
    # An error of the mean, which is relative to the values, matters by its square.
    spread = (z - exact).square().sum(0)
    allowed = 64 * unit * spread + z.shape[0] * (8 * unit * z.abs().max()) ** 2
    assert ((squares - spread).abs() <= allowed).all()


@pytest.fixture
def check(embed, output, assert_accurate, device):
    def check(shape, c_out, config, dtype, *, kernel=3, stride=1, crop=False, shift=0.0, **options):
        x = embed(torch.randn(shape, dtype=torch.float64, device=device), dtype, crop=crop)
        weight = torch.randn(c_out, kernel, kernel, shape[3], dtype=torch.float64, device=device)
        weight = ((weight + shift) / (kernel * kernel * shape[3]) ** 0.5).to(dtype)
        out_shape = (shape[0], *output_size(*shape[1:3], kernel, stride), c_out)
        out = output(out_shape, dtype, crop=crop)
        options = dict(stride=stride, config=config) | options
        tiles = pool_tiles(x, weight, out.view, statistics=True, **options)
        partials = torch.full(
            (shape[0], tiles, 3, c_out), float("nan"), dtype=accumulator(dtype), device=device
        )
        conv(x, weight, None, None, out.view, relu=False, statistics=partials, **options)

        def reference(dtype):
            return F.conv2d(
                x.to(dtype).permute(0, 3, 1, 2),
                weight.to(dtype).permute(0, 3, 1, 2),
                stride=stride,
                padding=kernel // 2,
            ).permute(0, 2, 3, 1)

        assert_accurate(out.view, reference(dtype), reference(torch.float64))
        assert_statistics(partials, out.view)
        out.assert_guards_untouched()

    return check


def shipped():
    """Every configuration, by name."""
    return {
        config.name: config
        for width in WIDTHS
        for c_in, kernel in ((64, 3), (80, 3), (64, 1))
        for config in candidates(HOPPER, c_in, width, kernel=kernel, kind="statistics")
    }


@pytest.mark.parametrize("config", shipped().values(), ids=shipped())
def test_every_configuration(config, check, device):
    """With a second group of channels or a masked tail.

    One tap is enough: test_conv.py sees the configurations through a 3x3.
    """
    require(config, device)
    c_out = sum(config.block_out) + 8
    check((1, 3, 17, 24), c_out, config, torch.float16, kernel=1, crop=True)


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize(("form", "stride"), [("tma", 1), ("pointer", 1), ("pointer", 2)])
def test_every_dtype(form, stride, kernel, dtype, check, device):
    config = FORMS[form]
    if config.form == "tma" and device.type == "cuda" and dtype == torch.float32:
        pytest.skip("there is no warpgroup MMA for exact fp32")
    require(config, device)
    check((1, 5, 19, 24), 40, config, dtype, kernel=kernel, stride=stride)


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (17, 1), (9, 33)])
@pytest.mark.parametrize("form", FORMS)
def test_odd_sizes(form, size, check, device):
    require(FORMS[form], device)
    check((2, *size, 24), 40, FORMS[form], torch.float16, kernel=1)


@pytest.mark.parametrize("form", FORMS)
def test_cropped_views(form, check, device):
    require(FORMS[form], device)
    check((2, 5, 19, 24), 40, FORMS[form], torch.float16, kernel=1, crop=True)


def test_an_image(check, dtype):
    """Three channels: a step of the product runs across taps."""
    for config in candidates((8, 0), 3, 64, dtype=dtype, kind="statistics"):
        check((1, 6, 9, 3), 64, config, dtype, stride=2)


def test_default_configuration(check, dtype):
    check((1, 9, 11, 32), 48, None, dtype, kernel=1)


def test_scale_shift_and_relu_come_together(device):
    x = torch.zeros(1, 4, 4, 32, dtype=torch.float16, device=device)
    weight = torch.zeros(64, 3, 3, 32, dtype=torch.float16, device=device)
    out = torch.zeros(1, 4, 4, 64, dtype=torch.float16, device=device)
    vector = torch.ones(64, device=device)
    for scale, shift, relu in ((None, vector, False), (vector, None, False), (None, None, True)):
        with pytest.raises(AssertionError, match="come together"):
            conv(x, weight, scale, shift, out, relu=relu)


# --------------------------------------------------------------------------------------
# Large means
# --------------------------------------------------------------------------------------


def shifted(shape, device):
    """Values of mean 1000 and deviation 1, where a sum of squares in fp32 loses 6 digits."""
    return (torch.randn(shape, dtype=torch.float64, device=device) + 1e3).float()


def assert_variance_of_shifted(partials, z):
    count, mean, squares = merged(partials)
    z = z.double().flatten(0, 2)
    torch.testing.assert_close(mean, z.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(squares / count, z.var(0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_conv_with_large_means(form, device):
    config = FORMS[form]
    if config.form == "tma" and device.type == "cuda":
        pytest.skip("there is no warpgroup MMA for exact fp32")
    x = shifted((1, 19, 23, 16), device)
    weight = torch.eye(16, device=device).reshape(16, 1, 1, 16)
    out = torch.empty_like(x)
    tiles = pool_tiles(x, weight, out, statistics=True, config=config)
    partials = torch.empty(1, tiles, 3, 16, device=device)
    conv(x, weight, None, None, out, relu=False, statistics=partials, config=config)
    torch.testing.assert_close(out, x, rtol=1e-6, atol=0)
    assert_variance_of_shifted(partials, out)


def test_epilogue_with_large_means(device):
    z = shifted((2, 19, 23, 128), device)
    partials = torch.empty(2, epilogue_module.pool_tiles(z), 3, 128, device=device)
    epilogue(z, None, None, z, relu=False, statistics=partials)
    assert_variance_of_shifted(partials, z)


# --------------------------------------------------------------------------------------
# After another library's convolution
# --------------------------------------------------------------------------------------


@pytest.fixture
def check_epilogue(embed, output, device):
    def check(shape, dtype, *, crop=False, in_place=False):
        z = embed(torch.randn(shape, device=device), dtype, crop=crop)
        before = z.clone()
        out = output(shape, dtype, crop=crop)
        target = z if in_place else out.view
        tiles = epilogue_module.pool_tiles(z)
        partials = torch.full(
            (shape[0], tiles, 3, shape[3]), float("nan"), dtype=accumulator(dtype), device=device
        )
        epilogue(z, None, None, target, relu=False, statistics=partials)
        assert torch.equal(target, before)
        assert torch.equal(z, before)
        assert_statistics(partials, before)
        out.assert_guards_untouched()

    return check


@pytest.mark.parametrize("in_place", [False, True])
def test_epilogue_dtypes(in_place, dtype, check_epilogue):
    check_epilogue((2, 17, 19, 80), dtype, in_place=in_place)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("channels", [3, 56, 64, 224])
def test_epilogue_channels(channels, crop, check_epilogue):
    check_epilogue((2, 5, 6, channels), torch.float16, crop=crop)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (16, 16), (17, 31)])
def test_epilogue_odd_sizes(size, check_epilogue):
    check_epilogue((2, *size, 128), torch.float16)


def test_epilogue_nan_and_inf(device):
    """Only the channels that hold them are spoiled."""
    z = torch.randn(1, 7, 9, 16, dtype=torch.float16, device=device)
    z[0, 2, 3, 4] = float("nan")
    z[0, 5, 7, 9] = float("inf")
    partials = torch.empty(1, 1, 3, 16, device=device)
    epilogue(z, None, None, z, relu=False, statistics=partials)
    finite = partials[0, 0].isfinite().all(0)
    assert set((~finite).nonzero().flatten().tolist()) == {4, 9}
