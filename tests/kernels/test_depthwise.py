"""Depthwise kernel against fp64."""

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast.kernels.conv import output_size
from vovnet_fast.kernels.depthwise import depthwise


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
