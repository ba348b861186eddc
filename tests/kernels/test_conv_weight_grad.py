"""Weight gradients: every shipped configuration, dtype and awkward size against fp64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.forms import require, why_not
from vovnet_fast.backends import triton as backend
from vovnet_fast.backends._engines import weight_grad_trial
from vovnet_fast.compat import zip
from vovnet_fast.kernels import conv_weight_grad as module
from vovnet_fast.kernels import conv_weight_grad_tma
from vovnet_fast.kernels._common import accumulator
from vovnet_fast.kernels.conv import output_size
from vovnet_fast.kernels.conv_weight_grad import channel_sums, choices, finish, plan, weight_grad
from vovnet_fast.kernels.conv_weight_grad_config import (
    MAX_PARTIAL_BYTES,
    WeightGradConfig,
    candidates,
    column_groups,
    row_tile,
    split,
)

HOPPER, AMPERE = (9, 0), (8, 0)
LAYERS = [
    # C_in, C_out, kernel of the published specs.
    *((width, width, 3) for width in (64, 80, 96, 112, 128, 160, 192, 224)),
    *((768, 256, 1), (1056, 512, 1), (1472, 768, 1), (1888, 1024, 1), (672, 384, 1)),
    *((64, 128, 3), (512, 192, 3), (768, 224, 3), (64, 64, 1), (80, 80, 1)),
]
FORMS = {
    "pointer": WeightGradConfig("pointer", 32, 1, (16, 16), 16, 4, 2),
    "tma": WeightGradConfig("tma", 32, 1, (16, 16), 16, 4, 2),
    "tma groups": WeightGradConfig("tma", 16, 3, (16, 16), 16, 4, 2),
}


@pytest.fixture(autouse=True)
def _two_splits(monkeypatch):
    """Where there are pixels for them, as a large device has for large images."""

    def two(*args, steps, **options):
        each = -(-steps // 2)
        return -(-steps // each), each

    monkeypatch.setattr(module, "split", two)


@dataclasses.dataclass
class Case:
    """Arguments of one call, and what it should compute."""

    x: torch.Tensor
    g: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None
    stride: int

    def run(self, **options):
        return weight_grad(self.x, self.g, self.weight, self.scale, stride=self.stride, **options)

    def reference(self, dtype, absolute=False):
        """The same by autograd, every step in ``dtype``; ``absolute``: of absolute values."""
        scale = torch.ones(self.weight.shape[0], device=self.x.device)
        scale = scale if self.scale is None else self.scale
        x, g, weight, scale = (t.to(dtype) for t in (self.x, self.g, self.weight, scale))
        if absolute:
            x, g, weight, scale = (t.abs() for t in (x, g, weight, scale))
        shift = torch.zeros_like(scale)
        parameters = [t.detach().clone().requires_grad_() for t in (weight, scale, shift)]
        z = F.conv2d(
            x.permute(0, 3, 1, 2),
            parameters[0].permute(0, 3, 1, 2),
            stride=self.stride,
            padding=weight.shape[1] // 2,
        )
        y = z.permute(0, 2, 3, 1) * parameters[1] + parameters[2]
        dweight, dscale, dshift = torch.autograd.grad(y, parameters, g)
        return dweight, None if self.scale is None else dscale, dshift


@pytest.fixture
def case(embed, device):
    def case(n, h, w, c_in, c_out, dtype, *, kernel=3, stride=1, crop=False, scaled=True):
        def random(*shape):
            return torch.randn(shape, dtype=torch.float64, device=device)

        size = output_size(h, w, kernel, stride)
        high = accumulator(dtype)
        return Case(
            embed(random(n, h, w, c_in), dtype, crop=crop),
            embed(random(n, *size, c_out), dtype, crop=crop),
            random(c_out, kernel, kernel, c_in).to(dtype),
            random(c_out).to(high) if scaled else None,
            stride,
        )

    return case


@pytest.fixture
def check(assert_accurate):
    """The error is at most twice that of eager in the precision of the sums."""

    def check(case, config=None, **options):
        found = case.run(config=config, **options)
        high = accumulator(case.x.dtype)
        eager, exact = case.reference(high), case.reference(torch.float64)
        # Split, the sums round in another order than eager's: some more roundings.
        magnitudes = case.reference(torch.float64, absolute=True)
        for actual, e, right, magnitude in zip(found, eager, exact, magnitudes, strict=True):
            if right is not None:
                assert actual.dtype == high
                assert_accurate(actual, e, right, 4 * magnitude)
        assert (found[1] is None) == (case.scale is None)

    return check


def shipped():
    """Every configuration; without a GPU those that differ in more than warps and stages."""
    found = {}
    for capability in (HOPPER, AMPERE):
        for c_in, c_out, kernel in [*LAYERS, (3, 64, 3)]:
            for config in candidates(capability, c_in, c_out, kernel=kernel):
                tile = (config.form, config.columns, config.groups, config.block_out)
                key = config if torch.cuda.is_available() else tile
                found.setdefault(key, pytest.param(config, id=config.name))
    return list(found.values())


@pytest.mark.parametrize("config", shipped())
def test_every_configuration(config, case, assert_accurate, device):
    """What it leaves for the finish; with a last block that is not full of either channels."""
    require(config, device)
    layer = case(1, 2, 70, 8, sum(config.block_out) - 8, torch.float16, scaled=False)
    launch, products, sums = plan(layer.x, layer.g, 3, config=config)
    assert launch.grid[1:] == (1, 2)
    for partials in (products, sums):
        partials.fill_(float("nan"))
    launch.run(device)
    eager, exact = layer.reference(torch.float32), layer.reference(torch.float64)
    magnitudes = layer.reference(torch.float64, absolute=True)
    for partials, which in ((products, 0), (sums, 2)):
        assert_accurate(partials.sum(0), eager[which], exact[which], 4 * magnitudes[which])


@pytest.mark.parametrize(("form", "stride"), [*((form, 1) for form in FORMS), ("pointer", 2)])
@pytest.mark.parametrize("kernel", [3, 1])
def test_every_dtype(form, kernel, stride, dtype, case, check, device):
    config = FORMS[form]
    if config.form == "tma" and device.type == "cuda" and dtype.itemsize > 2:
        pytest.skip("no warpgroup MMA takes wider operands pixels first")
    require(config, device)
    check(case(2, 2, 9, 24, 40, dtype, kernel=kernel, stride=stride), config)


@pytest.mark.parametrize("tf32", [False, True])
def test_shipped_configurations_of_fp32(tf32, case, check, device):
    layer = case(1, 3, 9, 8, 24, torch.float32)
    for config in candidates(HOPPER, 8, 24, dtype=torch.float32, tf32=tf32):
        assert config.form == "pointer"
        if tf32 and device.type == "cuda":
            found, exact = layer.run(tf32=True, config=config), layer.reference(torch.float64)
            for actual, right in zip(found, exact, strict=True):
                torch.testing.assert_close(actual.double(), right, rtol=2e-3, atol=5e-2)
        else:
            check(layer, config, tf32=tf32)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (9, 5)])
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("form", FORMS)
def test_odd_sizes(form, kernel, size, case, check, device):
    require(FORMS[form], device)
    check(case(1, *size, 8, 24, torch.float16, kernel=kernel), FORMS[form])


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (6, 9)])
@pytest.mark.parametrize("kernel", [3, 1])
def test_odd_sizes_with_stride_2(kernel, size, case, check):
    check(case(1, *size, 8, 24, torch.float16, kernel=kernel, stride=2), FORMS["pointer"])


@pytest.mark.parametrize(("c_in", "c_out"), [(3, 80), (5, 3), (56, 5), (80, 56)])
def test_channel_tails(c_in, c_out, case, check):
    """In the default configuration: of the pointer form where bulk copies are impossible."""
    check(case(1, 2, 6, c_in, c_out, torch.float16))


@pytest.mark.versions
def test_image(case, check):
    """The stem: three channels, stride 2."""
    layer = case(2, 9, 14, 3, 64, torch.float16, stride=2)
    found, _ = choices(layer.x, layer.g, 3, stride=2)
    assert [config.columns for config in found] == [32]
    check(layer)


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("form", FORMS)
def test_cropped_views(form, kernel, case, check, device):
    """Rows that do not follow each other: a 1x1 cannot treat the image as one row."""
    require(FORMS[form], device)
    check(case(1, 3, 19, 8, 24, torch.float16, kernel=kernel, crop=True), FORMS[form])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_weights_of_another_dtype(weight_dtype, scaled, case, check):
    layer = case(1, 3, 9, 8, 24, torch.float16, scaled=scaled)
    layer.weight = layer.weight.to(weight_dtype)
    check(layer)


def test_expanded_gradient(case, check):
    """As after a sum: a stride of 0, which bulk copies cannot have."""
    layer = case(1, 3, 19, 8, 24, torch.float16)
    layer.g = layer.g[:1, :1, :1].expand(layer.g.shape)
    assert choices(layer.x, layer.g, 3)[1].form == "pointer"
    check(layer)


def nonfinite_case(case, *, column):
    layer = case(1, 7, 19, 8, 24, torch.float16)
    layer.x[0, 2, column, 5] = float("nan")
    layer.x[0, 4, 9, 7] = float("inf")
    layer.g[0, 3, 8, 11] = float("-inf")
    layer.g[0, 3, 4, 12] = float("nan")
    return layer


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_inf(form, case, assert_same_nonfinite, device):
    require(FORMS[form], device)
    layer = nonfinite_case(case, column=6)
    for actual, right in zip(
        layer.run(config=FORMS[form]), layer.reference(torch.float64), strict=True
    ):
        assert_same_nonfinite(actual, right)


def test_nan_in_the_last_column(case, device):
    """In the tma form it may spread to the taps that do not see it, and no further."""
    layer = nonfinite_case(case, column=18)
    right = layer.reference(torch.float64)[0].isfinite()
    exact = layer.run(config=FORMS["pointer"])[0].isfinite()
    assert torch.equal(exact, right)
    if why_not(FORMS["tma"], device) is None:
        spread = layer.run(config=FORMS["tma"])[0].isfinite()
        right[..., 5] = False
        assert torch.equal(spread, right)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_again(form, case, device):
    require(FORMS[form], device)
    layer = case(1, 3, 19, 8, 24, torch.float16)
    first, second = layer.run(config=FORMS[form]), layer.run(config=FORMS[form])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scaled", [False, True])
def test_empty_batch(scaled, case):
    layer = case(0, 5, 7, 24, 40, torch.float16, scaled=scaled)
    for run in (layer.run, lambda: backend.conv_weight_grad(*dataclasses.astuple(layer)[:4])):
        dweight, dscale, dshift = run()
        assert dweight.shape == layer.weight.shape
        assert dweight.dtype == dshift.dtype == torch.float32
        assert not dweight.any()
        assert not dshift.any()
        assert dscale is None if not scaled else not dscale.any()


@pytest.mark.parametrize(
    ("n", "strides", "wide"),
    [(2, (2**31, 4 * 32, 32, 1), False), (1, (2**32, 2**30, 32, 1), True)],
    ids=["between images", "inside an image"],
)
def test_offsets_beyond_32_bits(n, strides, wide, case, check, device):
    """Strides that reach past 2^31 elements, of which few are ever touched."""
    layer = case(n, 3, 4, 16, 32, torch.float16)
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    layer.x = storage.as_strided((n, 3, 4, 16), strides).copy_(layer.x)
    layer.g = storage.as_strided((n, 3, 4, 32), strides, 2**20).copy_(layer.g)
    for config in FORMS.values():
        if config.form == "tma" and wide:  # The interpreter's descriptors count in 32 bits.
            continue
        if why_not(config, device) is None:
            launch, _, _ = plan(layer.x, layer.g, 3, config=config)
            assert launch.constants["WIDE"] == wide
            check(layer, config)


@pytest.mark.parametrize("crop", [False, True])
def test_channel_sums(crop, embed, dtype, device):
    values = torch.randn(3, 9, 11, 40, dtype=torch.float64, device=device)
    g = embed(values, dtype, crop=crop)
    sums = channel_sums(g)
    assert sums.dtype == accumulator(dtype)
    assert sums.shape[0] > 1
    # 297 numbers, one after the other.
    tolerance = 300 * torch.finfo(sums.dtype).eps
    exact = g.double().sum((0, 1, 2))
    torch.testing.assert_close(sums.double().sum(0), exact, rtol=tolerance, atol=tolerance)


def test_finish_takes_the_sums_of_another_library(device):
    """Output channels first or last, any dtype, more rows of sums than fit at a time."""
    scale, weight = torch.randn(40, device=device), torch.randn(40, 3, 3, 24, device=device)
    sums = torch.randn(130, 40, device=device)
    for products in (
        torch.randn(1, 40, 3, 3, 24, device=device).half(),
        torch.randn(9, 3, 3, 24, 40, device=device).permute(0, 4, 1, 2, 3),
    ):
        dweight, dscale, dshift = finish(products, sums, weight, scale)
        total = products.double().sum(0)
        torch.testing.assert_close(dweight, (total * scale[:, None, None, None]).float())
        torch.testing.assert_close(dscale, (total * weight).sum((1, 2, 3)).float())
        torch.testing.assert_close(dshift, sums.double().sum(0).float())


def test_uneven_columns_are_refused(device):
    products = torch.randn(1, 8, 3, 3, 32, device=device)[..., :16]
    weight = torch.randn(8, 3, 3, 16, device=device)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        finish(products, torch.randn(2, 8, device=device), weight, None)


@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
@pytest.mark.parametrize("size", [(200, 336), (100, 168), (50, 84), (25, 42), (1, 1)])
@pytest.mark.parametrize("batch", [1, 8])
def test_splits_fill_the_device_and_cover_all_steps(batch, size, capability):
    for c_in, c_out, kernel in LAYERS:
        for config in candidates(capability, c_in, c_out, kernel=kernel):
            steps = -(-batch * size[0] * size[1] // config.pixels)
            options = dict(steps=steps, processors=132, itemsize=4)
            splits, each = split(config, c_in, c_out, kernel, **options)
            assert (splits - 1) * each < steps <= splits * each
            assert splits == 1 or splits * kernel**2 * c_in * c_out * 4 <= MAX_PARTIAL_BYTES
            tiles = column_groups(config, c_in, kernel) * -(-c_out // sum(config.block_out))
            assert splits == 1 or splits * tiles <= 4 * 132
            if batch * size[0] * size[1] > 60000:
                assert splits * tiles >= 0.5 * 132


def test_a_size_of_an_image_is_no_kernel_of_its_own():
    """Steps are as long for all images, so that multi-scale training compiles once."""
    assert (row_tile(3), row_tile(1)) == (32, 64)
    for kernel in (1, 3):
        found = candidates(HOPPER, 128, 128, kernel=kernel)
        assert {c.pixels for c in found if c.form == "tma"} == {row_tile(kernel)}


def test_choice_of_form():
    forms = lambda *layer, **options: {c.form for c in candidates(*layer, **options)}  # noqa: E731
    assert candidates(HOPPER, 128, 128)[0].form == "tma"
    assert forms(AMPERE, 128, 128) == {"pointer"}
    assert forms(HOPPER, 128, 128, tma=False) == {"pointer"}
    assert forms(HOPPER, 128, 128, dtype=torch.float32, tf32=True) == {"pointer"}


def test_no_output_channel_is_computed_in_vain_by_pointer_loads():
    for c_in, c_out, kernel in LAYERS:
        for config in candidates(AMPERE, c_in, c_out, kernel=kernel):
            assert c_out % sum(config.block_out) == 0, config.name


def test_names_are_unique():
    configs = {
        config
        for capability in (HOPPER, AMPERE)
        for c_in, c_out, kernel in LAYERS
        for config in candidates(capability, c_in, c_out, kernel=kernel)
    }
    assert len({config.name for config in configs}) == len(configs)
    assert set(module._FORMS) == {config.form for config in configs}


def test_misaligned_views_take_the_pointer_form(case, check):
    layer = case(1, 5, 7, 32, 48, torch.float16)
    layer.x, layer.weight = layer.x[..., 1:25], layer.weight[..., 1:25].contiguous()
    assert not conv_weight_grad_tma.legal(layer.x, layer.g, stride=1)
    check(layer)


# --------------------------------------------------------------------------------------
# Engines
# --------------------------------------------------------------------------------------


def engines(layer):
    found, static = choices(layer.x, layer.g, layer.weight.shape[1], stride=layer.stride)
    return [backend.ATEN, *(config.name for config in found)], static.name


@pytest.fixture
def _exact_fp32(monkeypatch):
    """Engines differ in what TF32 rounds."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.usefixtures("_exact_fp32")
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_engines_agree(kernel, stride, dtype, case):
    """In fp32, where that of fp16 and bf16 comes from sums that no engine may round to them."""
    layer = case(2, 3, 7, 16, 48, dtype, kernel=kernel, stride=stride)
    exact = layer.reference(torch.float64)
    tolerance = {2: 1e-5, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
    names, _ = engines(layer)
    assert len(names) > 1
    for engine in names:
        found = backend.run_weight_grad_engine(
            engine, *dataclasses.astuple(layer)[:4], stride=stride
        )
        for actual, right in zip(found, exact, strict=True):
            error = (actual.double() - right).abs().max()
            assert error <= tolerance * right.abs().max(), engine


@pytest.mark.usefixtures("_exact_fp32")
def test_a_wrong_engine_fails_its_trial(case):
    layer = case(2, 3, 7, 16, 48, torch.float16)
    names, _ = engines(layer)
    right, arguments = backend.run_weight_grad_engine, (layer.x, layer.g, layer.weight)
    trial = weight_grad_trial(right, *arguments, stride=1)
    assert [trial(name) for name in names] == [None] * len(names)

    def wrong(*args, **options):
        dweight, dscale, dshift = right(*args, **options)
        return dweight, dscale, dshift * 1.1

    assert "allowed" in weight_grad_trial(wrong, *arguments, stride=1)(names[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be measured")
def test_the_static_choice_runs_where_nothing_can_be_measured(case):
    layer = case(1, 3, 7, 16, 48, torch.float32)
    arguments = dataclasses.astuple(layer)[:4]
    assert backend.choose_weight_grad_engine(*arguments, stride=1) == engines(layer)[1]
    found = backend.conv_weight_grad(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, layer.run(), strict=True))
