"""Depthwise kernels, forward and backward, against fp64."""

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast.backends import triton as backend
from vovnet_fast.kernels._common import accumulator
from vovnet_fast.kernels.conv import output_size
from vovnet_fast.kernels.depthwise import depthwise, input_grad, weight_grad


def reference(x, weight, stride, dtype):
    y = F.conv2d(
        x.to(dtype).permute(0, 3, 1, 2),
        weight.to(dtype).permute(2, 0, 1)[:, None],
        stride=stride,
        padding=1,
        groups=x.shape[3],
    )
    return y.permute(0, 2, 3, 1)


@pytest.fixture
def check(embed, output, assert_accurate, device):
    def check(n, height, width, channels, dtype, stride, crop=False):
        values = torch.randn(n, height, width, channels, device=device)
        x = embed(values, dtype, crop=crop)
        weight = torch.randn(3, 3, channels, device=device).to(dtype)
        shape = (n, *output_size(height, width, 3, stride), channels)
        out = output(shape, dtype, crop=crop)
        depthwise(x, weight, out.view, stride=stride)
        exact = reference(x, weight, stride, torch.float64)
        assert_accurate(out.view, reference(x, weight, stride, dtype), exact)
        out.assert_guards_untouched()

    return check


@pytest.mark.parametrize("stride", [1, 2])
def test_dtypes(stride, dtype, check):
    check(2, 7, 10, 80, dtype, stride)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("channels", [3, 56, 64, 96, 112, 128, 160, 192, 224])
def test_channels(channels, crop, check):
    check(1, 5, 6, channels, torch.float16, 1, crop)


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (17, 1), (2, 2), (12, 33)])
@pytest.mark.parametrize("stride", [1, 2])
def test_odd_sizes(stride, size, check):
    check(2, *size, 16, torch.float16, stride)


@pytest.mark.parametrize("stride", [1, 2])
def test_nan_and_inf(stride, embed, output, assert_same_nonfinite, device):
    x = embed(torch.randn(1, 7, 9, 16, device=device), torch.float16)
    x[0, 0, 0, 3] = float("nan")
    x[0, 5, 7, 4] = float("inf")
    weight = torch.randn(3, 3, 16, device=device).half()
    expected = reference(x, weight, stride, torch.float64)
    out = output(expected.shape, torch.float16)
    depthwise(x, weight, out.view, stride=stride)
    assert_same_nonfinite(out.view, expected)


def test_empty_batch(check, embed, output, device):
    x = embed(torch.randn(0, 7, 9, 16, device=device), torch.float16)
    out = output((0, 7, 9, 16), torch.float16)
    depthwise(x, torch.randn(3, 3, 16, device=device).half(), out.view)


def test_offsets_beyond_32_bits(device):
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    x = storage.as_strided((1, 3, 4, 16), (2**32, 2**30, 32, 1))
    x.copy_(torch.randn(1, 3, 4, 16, device=device))
    weight = torch.randn(3, 3, 16, device=device).half()
    out = torch.empty(1, 3, 4, 16, dtype=torch.float16, device=device)
    depthwise(x, weight, out)
    expected = reference(x, weight, 1, torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


# --------------------------------------------------------------------------------------
# Backward
# --------------------------------------------------------------------------------------


@pytest.fixture
def arguments(embed, device):
    """Input, gradient of the output and weight of a layer, in slots."""

    def arguments(n, height, width, channels, dtype, stride, crop=False):
        x = embed(torch.randn(n, height, width, channels, device=device), dtype, crop=crop)
        shape = (n, *output_size(height, width, 3, stride), channels)
        g = embed(torch.randn(shape, device=device), dtype, crop=crop)
        return x, g, torch.randn(3, 3, channels, device=device).to(dtype)

    return arguments


def gradients(x, g, weight, stride, dtype):
    """Of input and weight, by autograd, every step in ``dtype``."""
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    return torch.autograd.grad(reference(x, weight, stride, dtype), (x, weight), g.to(dtype))


def accumulated(dx, add, mask):
    """What goes into the slot, every step in the dtype of ``dx``."""
    if add is not None:
        dx = dx + add.to(dx.dtype)
    return dx if mask is None else torch.where(mask.to(dx.dtype) <= 0, 0, dx)


@pytest.fixture
def check_input_grad(arguments, embed, output, assert_accurate, device):
    def check(n, height, width, channels, dtype, stride, crop=False, extras=("add", "mask")):
        x, g, weight = arguments(n, height, width, channels, dtype, stride, crop)
        extra = {
            name: embed(torch.randn(x.shape, device=device), dtype, crop=crop) for name in extras
        }
        if "mask" in extra:
            extra["mask"].relu_()
        out = output(x.shape, dtype, crop=crop)
        input_grad(g, weight, out.view, stride=stride, **extra)
        eager, exact = (
            accumulated(
                gradients(x, g, weight, stride, kind)[0], extra.get("add"), extra.get("mask")
            )
            for kind in (dtype, torch.float64)
        )
        assert_accurate(out.view, eager, exact)
        out.assert_guards_untouched()

    return check


@pytest.fixture
def check_weight_grad(arguments, assert_accurate):
    def check(n, height, width, channels, dtype, stride, crop=False):
        x, g, weight = arguments(n, height, width, channels, dtype, stride, crop)
        found = weight_grad(x, g, stride=stride)
        high = accumulator(dtype)
        assert found.dtype == high
        eager, exact = (gradients(x, g, weight, stride, kind)[1] for kind in (high, torch.float64))
        magnitude = gradients(x.abs(), g.abs(), weight, stride, torch.float64)[1]
        assert_accurate(found, eager, exact, 4 * magnitude)

    return check


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_all_dtypes(stride, dtype, check_input_grad, check_weight_grad):
    check_input_grad(2, 7, 10, 80, dtype, stride)
    check_weight_grad(2, 7, 10, 80, dtype, stride)


@pytest.mark.parametrize("extras", [(), ("add",), ("mask",)])
@pytest.mark.parametrize("stride", [1, 2])
def test_input_gradient_alone(stride, extras, check_input_grad):
    check_input_grad(1, 4, 9, 16, torch.float16, stride, extras=extras)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("channels", [3, 5, 56, 64, 112, 160])
def test_channels_of_gradients(channels, crop, check_input_grad, check_weight_grad):
    check_input_grad(1, 5, 6, channels, torch.float16, 1, crop)
    check_weight_grad(1, 5, 6, channels, torch.float16, 2, crop)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (9, 5), (12, 33)])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_odd_sizes(stride, size, check_input_grad, check_weight_grad):
    check_input_grad(2, *size, 16, torch.float16, stride)
    check_weight_grad(2, *size, 16, torch.float16, stride)


def test_shares_of_the_pixels(arguments, assert_accurate):
    """More tiles than programs, the last of which find nothing left; and the same bits again."""
    x, g, weight = arguments(1, 13, 11, 128, torch.float16, 1)
    first, second = weight_grad(x, g), weight_grad(x, g)
    exact = gradients(x, g, weight, 1, torch.float64)[1]
    magnitude = gradients(x.abs(), g.abs(), weight, 1, torch.float64)[1]
    assert_accurate(first, exact.to(first.dtype), exact, 16 * magnitude)
    assert torch.equal(first, second)


@pytest.mark.parametrize("stride", [1, 2])
def test_input_gradient_in_place(stride, arguments, output, assert_accurate, device):
    """Added to what is in the slot already."""
    x, g, weight = arguments(2, 5, 9, 48, torch.float16, stride)
    out = output(x.shape, torch.float16)
    before = out.view.normal_().clone()
    mask = torch.randn(x.shape, device=device).half().relu()
    backend.depthwise_input_grad(g, weight, out.view, stride=stride, add=out.view, mask=mask)
    eager, exact = (
        accumulated(gradients(x, g, weight, stride, kind)[0], before, mask)
        for kind in (torch.float16, torch.float64)
    )
    assert_accurate(out.view, eager, exact)
    out.assert_guards_untouched()


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_nan_and_inf(stride, arguments, output, assert_same_nonfinite, device):
    x, g, weight = arguments(1, 9, 13, 16, torch.float16, stride)
    x[0, 3, 4, 3] = float("nan")
    g[0, 2, 3, 4] = float("inf")
    g[0, 1, 2, 5] = float("nan")
    mask = torch.randn(x.shape, device=device).half().relu()
    mask[0, 2, :, 5] = float("nan")  # Of NaN it is not said that it is not positive.
    out = output(x.shape, torch.float16)
    input_grad(g, weight, out.view, stride=stride, mask=mask)
    dx, dweight = gradients(x, g, weight, stride, torch.float64)
    assert_same_nonfinite(out.view, accumulated(dx, None, mask))
    assert torch.equal(out.view[..., 5] != 0, accumulated(dx, None, mask)[..., 5] != 0)
    assert_same_nonfinite(backend.depthwise_weight_grad(x, g, stride=stride), dweight)


def test_gradients_of_an_empty_batch(arguments, output):
    x, g, weight = arguments(0, 7, 9, 16, torch.float16, 1)
    out = output(x.shape, torch.float16)
    input_grad(g, weight, out.view)
    assert torch.equal(weight_grad(x, g), torch.zeros(3, 3, 16, device=x.device))


def test_gradients_beyond_32_bits(arguments, device):
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    x, g, weight = arguments(1, 3, 4, 16, torch.float16, 1)
    far = storage.as_strided((1, 3, 4, 16), (2**32, 2**30, 32, 1)).copy_(x)
    far_g = storage.as_strided((1, 3, 4, 16), (2**32, 2**30, 32, 1), 2**20).copy_(g)
    dx, dweight = gradients(x, g, weight, 1, torch.float64)
    torch.testing.assert_close(weight_grad(far, far_g).double(), dweight, rtol=1e-5, atol=1e-5)
    input_grad(far_g, weight, far)
    torch.testing.assert_close(far.double(), dx, rtol=2e-3, atol=2e-3)
