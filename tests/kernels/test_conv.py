"""Convolution kernels: every shipped configuration, dtype and awkward size against fp64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.forms import require, why_not
from vovnet_fast.kernels import conv as conv_module
from vovnet_fast.kernels import conv_tma
from vovnet_fast.kernels._common import accumulator
from vovnet_fast.kernels.conv import conv, output_size, plan, pool_tiles
from vovnet_fast.kernels.conv_config import (
    ConvConfig,
    candidates,
    pointer_blocks,
    tma_blocks,
)

HOPPER = (9, 0)
WIDTHS = (64, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512, 768, 1024)
"""Output channels of the convolutions of all published specs."""

FORMS = {
    "tma": ConvConfig("tma", 8, 16, (64,), 32, 4, 3),
    "tma persistent": ConvConfig("tma", 8, 16, (64,), 32, 4, 3, persistent=True),
    "pointer": ConvConfig("pointer", 1, 64, (32, 16), 32, 4, 3),
}


@dataclasses.dataclass
class Case:
    """Arguments of one call, and what it should compute."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    stride: int
    relu: bool = True

    def reference(self, dtype):
        """The same in plain torch, every step in ``dtype``."""
        x = self.x.to(dtype).permute(0, 3, 1, 2)
        weight = self.weight.to(dtype).permute(0, 3, 1, 2)
        y = F.conv2d(x, weight, stride=self.stride, padding=weight.shape[2] // 2)
        y = y * self.scale.to(dtype)[:, None, None] + self.shift.to(dtype)[:, None, None]
        return (F.relu(y) if self.relu else y).permute(0, 2, 3, 1)

    def run(self, out, **options):
        conv(
            self.x, self.weight, self.scale, self.shift, out,
            stride=self.stride, relu=self.relu, **options,
        )  # fmt: skip

    def shape(self):
        height, width = output_size(*self.x.shape[1:3], self.weight.shape[1], self.stride)
        return (self.x.shape[0], height, width, self.weight.shape[0])


@pytest.fixture
def case(embed, device):
    def case(n, h, w, c_in, c_out, dtype, *, kernel=3, stride=1, crop=False, relu=True):
        x = torch.randn(n, h, w, c_in, dtype=torch.float64, device=device)
        weight = torch.randn(c_out, kernel, kernel, c_in, dtype=torch.float64, device=device)
        scale = torch.rand(c_out, dtype=accumulator(dtype), device=device) + 0.5
        shift = torch.randn(c_out, dtype=accumulator(dtype), device=device)
        weight = (weight / (kernel * kernel * c_in) ** 0.5).to(dtype)
        return Case(embed(x, dtype, crop=crop), weight, scale, shift, stride, relu)

    return case


def check(case, out, config, assert_accurate, *, pool=True, tf32=False):
    """Run into a poisoned slot; check values, pool partials and guard bands."""
    dtype = case.x.dtype
    partials = None
    if pool:
        tiles = pool_tiles(
            case.x, case.weight, out.view, stride=case.stride, tf32=tf32, config=config
        )
        shape = (case.x.shape[0], tiles, case.weight.shape[0])
        partials = torch.full(shape, float("nan"), dtype=case.scale.dtype, device=case.x.device)
    case.run(out.view, pool_partials=partials, tf32=tf32, config=config)
    exact = case.reference(torch.float64)
    assert_accurate(out.view, case.reference(dtype), exact)
    out.assert_guards_untouched()
    if pool:
        eager = case.reference(dtype).to(partials.dtype).sum((1, 2))
        # The interpreter adds one after the other, torch pairwise: some more roundings.
        magnitude = 4 * exact.abs().sum((1, 2))
        assert_accurate(partials.sum(1), eager, exact.sum((1, 2)), magnitude)


def shipped():
    """Every configuration, with a small layer that has what it can get wrong.

    That is a second group of output channels, or a masked tail, and a last step of
    input channels that is not full.
    """
    layers = {}
    for c_out in WIDTHS:
        for c_in, kernel in ((64, 3), (80, 3), (64, 1)):
            for config in candidates(HOPPER, c_in, c_out, kernel=kernel):
                layers[config, kernel] = (config, sum(config.block_out) + 8, kernel)
    for config in candidates(HOPPER, 3, 64):
        layers[config, 3] = (config, 72, 3)
    return [
        pytest.param(*layer, id=f"{layer[0].name}-{kernel}x{kernel}")
        for (_, kernel), layer in layers.items()
    ]


@pytest.mark.parametrize(("config", "c_out", "kernel"), shipped())
def test_every_configuration(config, c_out, kernel, case, output, assert_accurate, device):
    require(config, device)
    layer = case(1, 5, 17, 40, c_out, torch.float16, kernel=kernel)
    check(layer, output(layer.shape(), torch.float16), config, assert_accurate)


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize(("form", "stride"), [*((form, 1) for form in FORMS), ("pointer", 2)])
def test_every_dtype(form, stride, kernel, dtype, case, output, assert_accurate, device):
    config = FORMS[form]
    if config.form == "tma" and device.type == "cuda" and dtype == torch.float32:
        pytest.skip("there is no warpgroup MMA for exact fp32")
    require(config, device)
    layer = case(2, 5, 19, 24, 40, dtype, kernel=kernel, stride=stride)
    check(layer, output(layer.shape(), dtype), config, assert_accurate)


@pytest.mark.parametrize("tf32", [False, True])
def test_shipped_configurations_of_fp32(tf32, case, output, assert_accurate, device):
    layer = case(1, 5, 19, 24, 40, torch.float32)
    for config in candidates(HOPPER, 24, 40, dtype=torch.float32, tf32=tf32):
        if why_not(config, device) is not None:
            continue
        out = output(layer.shape(), torch.float32)
        if tf32 and device.type == "cuda":
            layer.run(out.view, tf32=True, config=config)
            exact = layer.reference(torch.float64)
            torch.testing.assert_close(out.view.double(), exact, rtol=2e-3, atol=2e-3)
        else:
            check(layer, out, config, assert_accurate, tf32=tf32)


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (17, 1), (2, 2), (8, 16), (9, 33)])
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("form", FORMS)
def test_odd_sizes(form, kernel, size, case, output, assert_accurate, device):
    config = FORMS[form]
    require(config, device)
    layer = case(2, *size, 24, 40, torch.float16, kernel=kernel)
    check(layer, output(layer.shape(), torch.float16), config, assert_accurate)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (6, 9)])
def test_stride_2_on_an_image(size, case, output, assert_accurate, dtype):
    """Three channels: a step of the product runs across taps."""
    layer = case(2, *size, 3, 64, dtype, stride=2)
    for config in candidates((8, 0), 3, 64, dtype=dtype):
        check(layer, output(layer.shape(), dtype), config, assert_accurate)


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("form", FORMS)
def test_cropped_views(form, kernel, case, output, assert_accurate, device):
    """Rows that do not follow each other: a 1x1 cannot treat the image as one row."""
    config = FORMS[form]
    require(config, device)
    layer = case(2, 5, 19, 24, 40, torch.float16, kernel=kernel, crop=True)
    check(layer, output(layer.shape(), torch.float16, crop=True), config, assert_accurate)


@pytest.mark.parametrize("form", FORMS)
def test_from_slot_to_slot_of_one_buffer(form, case, assert_accurate, device):
    config = FORMS[form]
    require(config, device)
    layer = case(2, 5, 19, 32, 48, torch.float16)
    buffer = torch.full((2, 5, 19, 96), float("nan"), dtype=torch.float16, device=device)
    buffer[..., :32] = layer.x
    layer.x = buffer[..., :32]
    layer.run(buffer[..., 32:80], config=config)
    exact, eager = layer.reference(torch.float64), layer.reference(torch.float16)
    assert_accurate(buffer[..., 32:80], eager, exact)
    assert buffer[..., 80:].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_without_relu(form, case, output, assert_accurate, device):
    require(FORMS[form], device)
    layer = case(1, 5, 7, 24, 40, torch.float16, relu=False)
    check(layer, output(layer.shape(), torch.float16), FORMS[form], assert_accurate)
    assert layer.reference(torch.float64).min() < 0


@pytest.mark.versions
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_inf(form, kernel, case, output, assert_same_nonfinite, device):
    require(FORMS[form], device)
    layer = case(1, 9, 19, 24, 40, torch.float16, kernel=kernel)
    layer.x[0, 1, 1, 5] = float("nan")
    layer.x[0, 7, 17, 23] = float("inf")
    layer.x[0, 4, 9, 0] = float("-inf")
    out = output(layer.shape(), torch.float16)
    layer.run(out.view, config=FORMS[form])
    assert_same_nonfinite(out.view, layer.reference(torch.float64))


@pytest.mark.parametrize("form", FORMS)
def test_overflow_to_infinity(form, case, output, device):
    require(FORMS[form], device)
    layer = case(1, 5, 7, 24, 40, torch.float16)
    layer.scale.fill_(1e6)
    out = output(layer.shape(), torch.float16)
    layer.run(out.view, config=FORMS[form])
    assert torch.equal(out.view.isinf(), layer.reference(torch.float64) > 65520)


@pytest.mark.parametrize("config", [None, *FORMS.values()])
def test_empty_batch(config, case, output):
    layer = case(0, 5, 7, 24, 40, torch.float16)
    out = output(layer.shape(), torch.float16)
    layer.run(out.view, config=config)
    out.assert_guards_untouched()


@pytest.mark.parametrize(
    ("n", "strides", "wide"),
    [(2, (2**31, 4 * 32, 32, 1), False), (1, (2**32, 2**30, 32, 1), True)],
    ids=["between images", "inside an image"],
)
def test_offsets_beyond_32_bits(n, strides, wide, case, device):
    """Strides that reach past 2^31 elements, of which few are ever touched."""
    layer = case(n, 3, 4, 16, 32, torch.float16)
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    layer.x = storage.as_strided((n, 3, 4, 16), strides).copy_(layer.x)
    out = storage.as_strided((n, 3, 4, 32), strides, 2**20)
    config = FORMS["pointer"]
    launch = plan(layer.x, layer.weight, layer.scale, layer.shift, out, config=config)
    assert launch.constants["WIDE"] == wide
    layer.run(out, config=config)
    exact = layer.reference(torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.versions
def test_default_configuration(case, output, assert_accurate, dtype):
    for kernel in (1, 3):
        layer = case(1, 9, 11, 32, 48, dtype, kernel=kernel)
        check(layer, output(layer.shape(), dtype), None, assert_accurate)


def test_wrong_number_of_pool_tiles(case, output):
    layer = case(1, 9, 17, 24, 40, torch.float16)
    out = output(layer.shape(), torch.float16)
    with pytest.raises(AssertionError, match="pool_partials must be a contiguous"):
        layer.run(out.view, config=FORMS["pointer"], pool_partials=torch.empty(1, 1, 40))


@pytest.mark.versions
def test_misaligned_views_take_the_pointer_form(case, output, assert_accurate, device):
    layer = case(1, 5, 7, 32, 48, torch.float16)
    layer.x = layer.x[..., 1:25]
    layer.weight = layer.weight[..., 1:25].contiguous()
    out = output(layer.shape(), torch.float16)
    assert not conv_tma.legal(layer.x, layer.weight, out.view)
    check(layer, out, None, assert_accurate)


@pytest.mark.parametrize("c_out", WIDTHS)
def test_no_channel_is_computed_in_vain(c_out):
    assert c_out % sum(pointer_blocks(c_out, 192)) == 0
    exact = c_out % 64 == 0
    assert all((c_out % sum(blocks) == 0) == exact for blocks in tma_blocks(c_out))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("c_in", [64, 80])
def test_names_are_unique(c_in, kernel):
    for c_out in WIDTHS:
        configs = candidates(HOPPER, c_in, c_out, kernel=kernel)
        names = [c.name for c in configs]
        assert len(set(names)) == len(configs)
        assert set(conv_module._FORMS) == {c.form for c in configs}
