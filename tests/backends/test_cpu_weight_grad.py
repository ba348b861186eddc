"""The extension's own weight gradients of convolutions on a CPU, and their choice."""

import pytest
import torch

from tests import extension_cases
from tests.backends.cpu_engines import DTYPES, engine_combinations, instruction_set
from tests.backends.test_cpu_backend import threads
from tests.extension_cases import Tensors, require
from tests.features import compared
from vovnet_fast import backends, ops
from vovnet_fast.backends import _aten, _extension, cpu, reference
from vovnet_fast.backends.cpu import convolution, unpacked, weight_grad
from vovnet_fast.selfcheck import calls, cases

CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)

LAYERS = [
    calls.Layer(1, 1, 1, (1, 1, 1)),
    calls.Layer(1, 33, 24, (2, 17, 31)),
    calls.Layer(1, 150, 70, (2, 20, 13)),  # Several groups of chunks, the last one smaller.
    calls.Layer(1, 16, 7, (5, 4, 4), 2),
    calls.Layer(1, 16, 9, (2, 17, 31)),  # Read where pixels lie, as the next three.
    calls.Layer(1, 64, 70, (3, 9, 13)),
    calls.Layer(1, 112, 5, (1, 3, 70)),
    calls.Layer(1, 48, 100, (1, 40, 41)),
    calls.Layer(1, 544, 400, (1, 9, 8)),
    calls.Layer(3, 3, 5, (1, 1, 1)),
    calls.Layer(3, 3, 64, (1, 41, 47), 2),  # Unfolded, in parts.
    calls.Layer(3, 6, 9, (3, 11, 30), 2),  # Unfolded into two chunks of pairs.
    calls.Layer(3, 5, 17, (2, 1, 9)),
    calls.Layer(3, 4, 16, (2, 9, 1), 2),
    calls.Layer(3, 40, 80, (2, 13, 11), 2),
    calls.Layer(3, 33, 50, (1, 1, 64), 2),
    calls.Layer(3, 70, 112, (1, 23, 37)),
    calls.Layer(3, 48, 56, (7, 8, 8)),  # Several images in a strip, the last strip with fewer.
    calls.Layer(3, 20, 6, (1, 3, 600)),  # Rows wider than a strip.
    calls.Layer(3, 20, 13, (1, 4, 601), 2),
]


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


@pytest.fixture(params=engine_combinations("conv_weight_grad_engines"), ids="-".join)
def engine(request, monkeypatch):
    """An engine by name, on one of the instruction sets that it runs on, which is chosen."""
    name, isa = request.param
    monkeypatch.setattr(weight_grad, "choose_engine", lambda dtype: name)
    monkeypatch.setattr(unpacked, "faster", lambda layer, engine, run: False)
    with instruction_set(isa):
        yield name


@pytest.fixture
def baseline():
    """The instruction set that has none."""
    with instruction_set("baseline"):
        yield


@pytest.fixture
def aten(monkeypatch):
    """Shapes of the weights whose gradients ATen is asked for."""
    found, run = [], _aten.weight_grad

    def note(x, g, weight, *, stride):
        found.append(tuple(weight.shape))
        return run(x, g, weight, stride=stride)

    monkeypatch.setattr(_aten, "weight_grad", note)
    return found


@torch.no_grad()
def test_against_fp64(engine, aten):
    """From slots surrounded by NaN, crops, and odd offsets and strides."""
    for dtype in compared(DTYPES[engine]):
        for scaled in (False, True):
            for case in cases.of_layers(calls.conv_weight_grad, *LAYERS, scaled=scaled):
                for layout in Tensors.LAYOUTS:
                    wrong = extension_cases.check(case, cpu, dtype, CPU, layout)
                    assert wrong is None, f"{case.words}, {dtype}, {layout}: {wrong}"
    assert not aten


@pytest.mark.parametrize("kernel", [1, 3])
def test_sums_of_half_precision_are_not_rounded(engine, kernel):
    """A thousand times closer than the dtype's own rounding, over several strips."""
    for dtype in set(HALF) & set(DTYPES[engine]):
        x, g = (torch.randn(2, 30, 40, c).to(dtype) for c in (20, 24))
        found = weight_grad.sums(engine, x, g, kernel)
        weight = torch.empty(24, kernel, kernel, 20, dtype=torch.float64)
        exact, _, _ = reference.conv_weight_grad(x.double(), g.double(), weight, None)
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < torch.finfo(dtype).eps / 1000 * exact.abs().max()


@pytest.mark.parametrize(
    ("kernel", "c_in", "c_out", "size", "stride"),
    [
        (3, 3, 64, (2, 64, 64), 2),
        (3, 8, 8, (2, 40, 40), 1),
        (3, 64, 96, (2, 24, 24), 1),
        (1, 320, 112, (2, 20, 20), 1),
        (1, 64, 96, (2, 24, 25), 1),
    ],
)
def test_the_number_of_threads_does_not_change_a_bit(engine, kernel, c_in, c_out, size, stride):
    n, h, w = size
    for dtype in DTYPES[engine]:
        x = torch.randn(n, h, w, c_in).to(dtype)
        g = torch.randn(n, h // stride, w // stride, c_out).to(dtype)
        with threads(1):
            alone = weight_grad.sums(engine, x, g, kernel, stride=stride)
        for number in (2, 3, 4, 7):
            with threads(number):
                together = weight_grad.sums(engine, x, g, kernel, stride=stride)
                assert torch.equal(together, alone)


def test_partials_take_bounded_memory():
    """However large the images are, and none where there are enough channels to share."""
    extension = _extension.load("cpu")
    for n, height, width in ((1, 1, 1), (2, 128, 128), (64, 800, 1344)):
        for c_in, c_out, kernel in ((3, 64, 3), (16, 16, 3), (64, 48, 1), (128, 128, 3)):
            parts = extension.conv_weight_grad_parts(n, height, width, c_in, c_out, kernel, 1)
            assert 1 <= parts <= 16
            assert parts == 1 or parts * c_out * kernel * kernel * c_in * 4 < 4 << 20
    assert extension.conv_weight_grad_parts(64, 800, 1344, 128, 128, 3, 1) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_what_it_should(engine, value):
    """The taps of one pixel, and no other channels. Products of pairs have the padding among them:
    there it may reach other taps."""
    for dtype in DTYPES[engine]:
        for kernel in (1, 3):
            for where in ("x", "g"):
                x, g = torch.randn(1, 9, 20, 35).to(dtype), torch.randn(1, 9, 20, 17).to(dtype)
                (x if where == "x" else g)[0, 0, 19, 3] = value
                found = weight_grad.sums(engine, x, g, kernel)
                weight = torch.empty(17, kernel, kernel, 35)
                expected, _, _ = reference.conv_weight_grad(x.float(), g.float(), weight, None)
                wrong, least = ~found.isfinite(), ~expected.isfinite()
                most = least if engine == "fma" else least.any(2, True).any(1, True)
                assert least.any()
                assert (wrong >= least).all()
                assert (wrong <= most).all()


def test_what_was_there_before_is_not_read(engine):
    """Of images with fewer rows or pixels than a strip has room for, after NaN has been there."""
    for dtype in DTYPES[engine]:
        for shape in ((1, 30, 20), (3, 5, 7), (1, 1, 3)):
            for stride in (1, 2):
                outputs = (shape[0], *((size - 1) // stride + 1 for size in shape[1:]))
                x, g = torch.ones(*shape, 40).to(dtype), torch.ones(*outputs, 33).to(dtype)
                alone = weight_grad.sums(engine, x, g, 3, stride=stride)
                large = torch.full((2, 40, 40, 64), torch.nan, dtype=dtype)
                weight_grad.sums(engine, large, large, 3)
                again = weight_grad.sums(engine, x, g, 3, stride=stride)
                assert again.isfinite().all()
                assert torch.equal(again, alone)


def test_expanded_gradients(engine):
    """That of a sum has stride 0 everywhere but along the channels."""
    for kernel in (1, 3):
        x = torch.randn(2, 6, 8, 12).to(DTYPES[engine][0])
        g = torch.randn(1, 1, 1, 9).to(x.dtype).expand(2, 6, 8, 9)
        packed = weight_grad.sums(engine, x, g.contiguous(), kernel)
        assert torch.equal(weight_grad.sums(engine, x, g, kernel), packed)


LAYOUTS = {
    "channels_last": lambda w: w.contiguous(),
    "contiguous": lambda w: w.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "taps first": lambda w: w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "flipped taps": lambda w: w.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
    "part": lambda w: torch.cat([w, w], 3).split(w.shape[3], 3)[0],
    "expanded": lambda w: w[:1].expand_as(w),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "c_in"), [(1, 37), (3, 3), (3, 70)])
def test_gradients_lie_as_their_weights_do(engine, layout, kernel, c_in):
    products, scale = torch.randn(19, kernel, kernel, c_in), torch.randn(19)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = LAYOUTS[layout](torch.randn(products.shape, dtype=dtype))
        before = weight.clone()
        dweight, dscale = weight_grad._finish(engine, products, weight, scale)
        assert torch.equal(weight, before)
        assert torch.equal(dweight, products * scale.view(-1, 1, 1, 1))
        if layout in ("part", "expanded"):
            assert dweight.is_contiguous()
        else:
            assert dweight.stride() == weight.stride()
        exact = (products.double() * weight.double()).sum((1, 2, 3))
        torch.testing.assert_close(dscale.double(), exact, rtol=1e-6, atol=1e-5)


def test_gradients_take_the_layout_of_the_weights_to_autograd(engine):
    """No copy of them is made on their way into ``.grad``, whatever the layout is."""
    dtype, near = DTYPES[engine][0], 1e-4 if engine == "fma" else 3e-2
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = torch.nn.Conv2d(5, 7, 3, padding=1, bias=False).to(memory_format=layout)
        scale, shift = torch.rand(7, requires_grad=True), torch.full((7,), 99.0)
        params = ops.ConvParams(ops.conv.channels_last(conv.weight), scale, shift)
        x = torch.randn(2, 5, 6, 9).to(dtype)
        with backends.use_backend("cpu"):
            ops.conv_bn_relu(x, params).sum().backward()
        assert conv.weight.grad.stride() == conv.weight.stride()
        expected = torch.autograd.grad(
            (conv(x.float()) * scale.detach().view(-1, 1, 1)).sum(), conv.weight
        )
        scaled = expected[0].abs().max()
        torch.testing.assert_close(conv.weight.grad, *expected, rtol=near, atol=near * scaled)


def test_empty(engine):
    for dtype in DTYPES[engine]:
        for shape in ((0, 5, 7), (2, 0, 7)):
            x, g = (torch.empty(*shape, c, dtype=dtype) for c in (16, 8))
            weight, scale = torch.ones(8, 3, 3, 16, dtype=dtype), torch.ones(8)
            for grad in cpu.conv_weight_grad(x, g, weight, scale):
                assert not grad.any()
            found = weight_grad.sums(engine, x, g, 3)
            assert found.shape == (8, 3, 3, 16)
            assert not found.any()


def test_choice():
    found = weight_grad.engines()
    for dtype, names in convolution.PREFERRED.items():
        expected = [name for name in names if name in found]
        assert weight_grad.choose_engine(dtype) == [*expected, convolution.ATEN][0]


def test_fp64_is_left_to_aten(aten):
    x, g = (torch.randn(1, 4, 5, c, dtype=torch.float64) for c in (3, 7))
    dw, _, _ = cpu.conv_weight_grad(x, g, torch.empty(7, 3, 3, 3, dtype=torch.float64), None)
    assert aten == [(7, 3, 3, 3)]
    assert dw.dtype == torch.float64


def test_a_dtype_that_it_has_not_is_refused(engine):
    x, g = (torch.randn(1, 4, 5, c, dtype=torch.float64) for c in (3, 7))
    with pytest.raises(ValueError, match="no kernel for the dtype with code 3"):
        weight_grad.sums(engine, x, g, 3)


def test_without_vectors_it_is_left_to_aten(baseline, aten):
    x, g = torch.randn(1, 4, 5, 3), torch.randn(1, 4, 5, 7)
    cpu.conv_weight_grad(x, g, torch.empty(7, 3, 3, 3), None)
    assert aten == [(7, 3, 3, 3)]
    with pytest.raises(
        ValueError, match=r'"fma" (runs|has no weight gradients) on instruction set'
    ):
        weight_grad.sums("fma", x, g, 3)


def test_what_does_not_fit_is_refused(engine):
    dtype = DTYPES[engine][0]
    x, g = torch.randn(1, 4, 5, 6).to(dtype), torch.randn(1, 4, 5, 7).to(dtype)
    with pytest.raises(AssertionError, match=r"g must have shape \(1, 2, 3, 7\)"):
        weight_grad.sums(engine, x, g, 3, stride=2)
    with pytest.raises(AssertionError, match=rf"g must be {dtype}"):
        weight_grad.sums(engine, x, g.double(), 3)
    with pytest.raises(AssertionError, match="x must have channel stride 1"):
        weight_grad.sums(engine, x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), g, 3)
    with pytest.raises(ValueError, match="kernel must be one of 1, 3, got 5"):
        weight_grad.sums(engine, x, g, 5)
