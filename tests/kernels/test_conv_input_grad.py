"""Input gradient of a convolution: configurations, strides, add, mask and sizes against fp64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.forms import require, why_not
from vovnet_fast.kernels.conv import input_grad, input_grad_choices, output_size, plan_input_grad
from vovnet_fast.kernels.conv_config import ConvConfig, candidates
from vovnet_fast.kernels.pack import transposed

HOPPER = (9, 0)
WIDTHS = (64, 80, 128, 192, 224, 256)
"""Input channels that together take every configuration."""

FORMS = {
    "tma": ConvConfig("tma", 4, 16, (64,), 32, 4, 3),
    "tma persistent": ConvConfig("tma", 4, 16, (64,), 32, 4, 3, persistent=True),
    "pointer": ConvConfig("pointer", 1, 64, (32, 16), 32, 4, 3),
}


@dataclasses.dataclass
class Case:
    """Arguments of one call, and what it should compute."""

    g: torch.Tensor
    weight: torch.Tensor
    size: tuple[int, int]
    stride: int
    add: torch.Tensor | None
    mask: torch.Tensor | None

    def __post_init__(self):
        c_out, kernel, _, c_in = self.weight.shape
        self.packed = self.weight.new_empty(c_in, kernel, kernel, c_out)
        transposed(self.weight, None, self.packed)

    def shape(self):
        return (self.g.shape[0], *self.size, self.weight.shape[3])

    def reference(self, dtype):
        """Autograd of the convolution; what follows in ``dtype`` as well."""
        x = torch.zeros(self.shape(), dtype=dtype, device=self.g.device, requires_grad=True)
        weight = self.weight.to(dtype).permute(0, 3, 1, 2)
        z = F.conv2d(
            x.permute(0, 3, 1, 2), weight, stride=self.stride, padding=weight.shape[2] // 2
        )
        (dx,) = torch.autograd.grad(z, x, self.g.to(dtype).permute(0, 3, 1, 2))
        if self.add is not None:
            dx[..., : self.add.shape[3]] += self.add.to(dtype)
        if self.mask is not None:
            dx[..., dx.shape[3] - self.mask.shape[3] :].masked_fill_(self.mask <= 0, 0.0)
        return dx

    def run(self, out, **options):
        options = dict(stride=self.stride, add=self.add, mask=self.mask) | options
        input_grad(self.g, self.packed, out, **options)


@pytest.fixture
def case(embed, device):
    """``added`` and ``masked`` are numbers of channels, None for no such tensor."""

    def case(
        n, h, w, c_in, c_out, dtype, *,
        kernel=3, stride=1, added=None, masked=None, crop=False,
    ):  # fmt: skip
        def view(size, channels):
            values = torch.randn(n, *size, channels, dtype=torch.float64, device=device)
            return embed(values, dtype, crop=crop)

        g = view(output_size(h, w, kernel, stride), c_out)
        weight = torch.randn(c_out, kernel, kernel, c_in, dtype=torch.float64, device=device)
        weight = (weight / (kernel * kernel * c_out) ** 0.5).to(dtype)
        add = None if added is None else view((h, w), added)
        mask = None if masked is None else view((h, w), masked)
        return Case(g, weight, (h, w), stride, add, mask)

    return case


def check(case, out, config, assert_accurate, **options):
    """Run into a poisoned slot; check values and guard bands."""
    case.run(out.view, config=config, **options)
    exact = case.reference(torch.float64)
    assert_accurate(out.view, case.reference(case.g.dtype), exact)
    out.assert_guards_untouched()


def shipped():
    """Every configuration, by name."""
    return {
        config.name: config
        for width in WIDTHS
        for c_out, kernel in ((64, 3), (80, 3), (64, 1))
        for config in candidates(HOPPER, c_out, width, kernel=kernel, kind="gradient")
    }


@pytest.mark.parametrize("config", shipped().values(), ids=shipped())
def test_every_configuration(config, case, output, assert_accurate, device):
    """The layer has a second group of channels, or a masked tail, and a step that is not full.

    One tap is enough: test_conv.py sees the configurations through a 3x3.
    """
    require(config, device)
    c_in = sum(config.block_out) + 8
    layer = case(
        1, 3, 17, c_in, 40, torch.float16, kernel=1, added=c_in - 16, masked=c_in - 8, crop=True
    )
    check(layer, output(layer.shape(), torch.float16, crop=True), config, assert_accurate)


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize(("form", "stride"), [("tma", 1), ("pointer", 1), ("pointer", 2)])
def test_every_dtype(form, stride, kernel, dtype, case, output, assert_accurate, device):
    config = FORMS[form]
    if config.form == "tma" and device.type == "cuda" and dtype == torch.float32:
        pytest.skip("there is no warpgroup MMA for exact fp32")
    require(config, device)
    layer = case(1, 5, 11, 40, 24, dtype, kernel=kernel, stride=stride, added=40, masked=40)
    check(layer, output(layer.shape(), dtype), config, assert_accurate)


@pytest.mark.parametrize("tf32", [False, True])
def test_shipped_configurations_of_fp32(tf32, case, output, assert_accurate, device):
    layer = case(1, 3, 17, 40, 24, torch.float32, kernel=1, added=40, masked=40)
    for config in candidates(HOPPER, 24, 40, dtype=torch.float32, tf32=tf32, kind="gradient"):
        if why_not(config, device) is not None:
            continue
        out = output(layer.shape(), torch.float32)
        if tf32 and device.type == "cuda":
            layer.run(out.view, tf32=True, config=config)
            exact = layer.reference(torch.float64)
            torch.testing.assert_close(out.view.double(), exact, rtol=2e-3, atol=2e-3)
        else:
            check(layer, out, config, assert_accurate, tf32=tf32)


@pytest.mark.parametrize(
    ("added", "masked"), [(None, None), (40, None), (None, 40), (8, 32), (32, 8), (24, 24)]
)
@pytest.mark.parametrize(("form", "stride"), [*((form, 1) for form in FORMS), ("pointer", 2)])
def test_some_of_the_channels(form, stride, added, masked, case, output, assert_accurate, device):
    """``add`` belongs to the first ones, ``mask`` to the last ones."""
    require(FORMS[form], device)
    layer = case(
        1, 5, 7, 40, 24, torch.float16, kernel=1, stride=stride, added=added, masked=masked
    )
    check(layer, output(layer.shape(), torch.float16), FORMS[form], assert_accurate)


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (17, 1), (9, 21)])
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize(("form", "stride"), [("tma", 1), ("pointer", 1), ("pointer", 2)])
def test_odd_sizes(form, stride, kernel, size, case, output, assert_accurate, device):
    require(FORMS[form], device)
    layer = case(1, *size, 40, 24, torch.float16, kernel=kernel, stride=stride, added=40, masked=40)
    check(layer, output(layer.shape(), torch.float16), FORMS[form], assert_accurate)


@pytest.mark.parametrize("size", [(6, 8), (6, 9), (7, 8)])
@pytest.mark.parametrize("c_in", [3, 40])
def test_stride_2(c_in, size, case, output, assert_accurate):
    """Parities of the sizes, in the shipped configurations, and few channels."""
    dtype = torch.float16
    layer = case(1, *size, c_in, 24, dtype, stride=2, masked=c_in)
    found, static = input_grad_choices(layer.g, layer.packed, layer.g, stride=2)
    assert static in found
    assert {config.form for config in found} == {"pointer"}
    for config in found:
        check(layer, output(layer.shape(), dtype), config, assert_accurate)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_few_channels(stride, case, output, assert_accurate):
    layer = case(1, 5, 7, 16, 8, torch.float16, stride=stride)
    check(layer, output(layer.shape(), torch.float16), FORMS["pointer"], assert_accurate)


@pytest.mark.parametrize(("form", "stride"), [*((form, 1) for form in FORMS), ("pointer", 2)])
def test_cropped_views(form, stride, case, output, assert_accurate, device):
    """Rows that do not follow each other: a 1x1 cannot treat the image as one row."""
    require(FORMS[form], device)
    options = dict(kernel=1, stride=stride, added=40, masked=24, crop=True)
    layer = case(2, 5, 7, 40, 24, torch.float16, **options)
    check(layer, output(layer.shape(), torch.float16, crop=True), FORMS[form], assert_accurate)


@pytest.mark.parametrize("added", [40, 24])
@pytest.mark.parametrize(("form", "stride"), [*((form, 1) for form in FORMS), ("pointer", 2)])
def test_in_place(form, stride, added, case, output, assert_accurate, device):
    """The gradient is added to what the slot holds, all of its channels or the first ones."""
    require(FORMS[form], device)
    layer = case(2, 9, 17, 40, 24, torch.float16, kernel=1, stride=stride, added=added, masked=40)
    exact, eager = layer.reference(torch.float64), layer.reference(torch.float16)
    out = output(layer.shape(), torch.float16)
    out.view[..., :added] = layer.add
    layer.run(out.view, add=out.view[..., :added], config=FORMS[form])
    assert_accurate(out.view, eager, exact)
    out.assert_guards_untouched()


@pytest.mark.parametrize("form", FORMS)
def test_from_slot_to_slot_of_one_buffer(form, case, assert_accurate, device):
    """As in a block: the gradient of layer l is in its slot, and goes into the slot before."""
    require(FORMS[form], device)
    layer = case(2, 5, 19, 48, 32, torch.float16, added=48, masked=48)
    exact, eager = layer.reference(torch.float64), layer.reference(torch.float16)
    buffer = torch.full((2, 5, 19, 96), float("nan"), dtype=torch.float16, device=device)
    buffer[..., :48] = layer.add
    buffer[..., 48:80] = layer.g
    layer.g, layer.add = buffer[..., 48:80], buffer[..., :48]
    layer.run(buffer[..., :48], config=FORMS[form])
    assert_accurate(buffer[..., :48], eager, exact)
    assert buffer[..., 80:].isnan().all()


@pytest.mark.parametrize(("form", "stride"), [*((form, 1) for form in FORMS), ("pointer", 2)])
def test_nan_and_inf(form, stride, case, output, assert_same_nonfinite, device):
    """They spread as in torch; a mask that hides them leaves 0, and one of NaN lets them pass."""
    require(FORMS[form], device)
    layer = case(1, 17, 21, 40, 24, torch.float16, stride=stride, added=40, masked=40)
    layer.g[0, 1, 1, 5] = float("nan")
    layer.g[0, -2, -2, 23] = float("inf")
    layer.add[0, 8, 10, 3] = float("-inf")
    layer.mask[0, :, 10] = float("nan")
    layer.mask[0, 1 * stride, 1 * stride, :20] = -1.0
    out = output(layer.shape(), torch.float16)
    layer.run(out.view, config=FORMS[form])
    assert_same_nonfinite(out.view, layer.reference(torch.float64))
    assert (out.view[0, stride, stride, :20] == 0).all()
    assert out.view[0, stride, stride, 20:].isnan().any()
    assert (out.view[0, 4, 10] != 0).all()


@pytest.mark.parametrize("config", [None, *FORMS.values()])
def test_empty_batch(config, case, output):
    layer = case(0, 5, 7, 40, 24, torch.float16, added=40, masked=40)
    out = output(layer.shape(), torch.float16)
    layer.run(out.view, config=config)
    out.assert_guards_untouched()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("n", "strides", "wide"),
    [(2, (2**31, 4 * 64, 64, 1), False), (1, (2**32, 2**30, 64, 1), True)],
    ids=["between images", "inside an image"],
)
def test_offsets_beyond_32_bits(n, strides, wide, stride, case, device):
    """Strides that reach past 2^31 elements, of which few are ever touched."""
    layer = case(n, 3, 4, 32, 16, torch.float16, stride=stride, added=32, masked=32)
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)

    def move(view, index):
        return storage.as_strided(view.shape, strides, index * 2**18).copy_(view)

    layer.g, layer.add, layer.mask = (
        move(view, i) for i, view in enumerate((layer.g, layer.add, layer.mask))
    )
    out = storage.as_strided(layer.shape(), strides, 3 * 2**18)
    options = dict(stride=stride, add=layer.add, mask=layer.mask, config=FORMS["pointer"])
    assert plan_input_grad(layer.g, layer.packed, out, **options).constants["WIDE"] == wide
    layer.run(out, config=FORMS["pointer"])
    exact = layer.reference(torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)


def test_default_configuration(case, output, assert_accurate, dtype):
    for kernel, stride in ((1, 1), (3, 2)):
        layer = case(1, 5, 11, 48, 32, dtype, kernel=kernel, stride=stride, masked=48)
        check(layer, output(layer.shape(), dtype), None, assert_accurate)


def test_misaligned_views_take_the_pointer_form(case, output, assert_accurate):
    layer = case(1, 5, 7, 48, 32, torch.float16, masked=56)
    layer.mask = layer.mask[..., 1:49]
    out = output(layer.shape(), torch.float16)
    found, _ = input_grad_choices(layer.g, layer.packed, out.view, mask=layer.mask)
    assert {config.form for config in found} == {"pointer"}
    check(layer, out, None, assert_accurate)


def test_add_and_mask_have_no_more_channels_than_the_result(case, output):
    layer = case(1, 5, 7, 40, 24, torch.float16, added=48)
    out = output(layer.shape(), torch.float16)
    with pytest.raises(AssertionError, match="add has 48 channels, out has 40"):
        layer.run(out.view)
