"""Packing of weights for the input gradient against fp64."""

import pytest
import torch

from vovnet_fast.kernels._common import accumulator
from vovnet_fast.kernels.pack import transposed


def reference(weight, scale, dtype):
    weight = weight.to(dtype)
    if scale is not None:
        weight = weight * scale.to(dtype)[:, None, None, None]
    return weight.flip(1, 2).permute(3, 1, 2, 0)


@pytest.fixture
def check(assert_accurate, device):
    def check(c_out, kernel, c_in, dtype, *, master=None, scaled=True):
        master = master or dtype
        weight = torch.randn(c_out, kernel, kernel, c_in, device=device, dtype=torch.float64)
        weight = weight.to(master)
        scale = torch.randn(c_out, device=device, dtype=accumulator(master)) if scaled else None
        out = torch.full((c_in, kernel, kernel, c_out), float("nan"), dtype=dtype, device=device)
        transposed(weight, scale, out)
        exact = reference(weight, scale, torch.float64)
        assert_accurate(out, exact.to(dtype), exact)

    return check


@pytest.mark.parametrize("scaled", [False, True])
def test_dtypes(scaled, dtype, check):
    check(40, 3, 24, dtype, scaled=scaled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("master", [torch.float32, torch.float64])
def test_weights_of_higher_precision_are_rounded_once(master, dtype, check):
    check(40, 3, 24, dtype, master=master)


@pytest.mark.parametrize("shape", [(64, 3, 3), (3, 1, 64), (80, 3, 96), (1, 1, 1), (224, 1, 33)])
def test_channels(shape, check):
    check(*shape, torch.float32)


def test_nan_and_inf(assert_same_nonfinite, device):
    weight = torch.randn(8, 3, 3, 16, device=device)
    weight[3, 0, 1, 5] = float("nan")
    weight[7, 2, 2, 15] = float("inf")
    scale = torch.full((8,), 1e6, device=device)
    out = torch.empty(16, 3, 3, 8, dtype=torch.float16, device=device)
    weight[0, 0, 0, 0] = 1.0  # Times the scale, too large for fp16.
    transposed(weight, scale, out)
    assert_same_nonfinite(out, reference(weight, scale, torch.float64).half())


def test_nothing_to_pack(device):
    transposed(torch.empty(8, 3, 3, 0, device=device), None, torch.empty(0, 3, 3, 8, device=device))


def test_a_transposed_convolution(device):
    """What the weights are packed for."""
    g = torch.randn(2, 5, 6, 12, dtype=torch.float64, device=device)
    weight = torch.randn(12, 3, 3, 8, dtype=torch.float64, device=device)
    packed = torch.empty(8, 3, 3, 12, dtype=torch.float64, device=device)
    transposed(weight, None, packed)
    g, weight, packed = (t.permute(0, 3, 1, 2) for t in (g, weight, packed))
    expected = torch.nn.functional.conv_transpose2d(g, weight, padding=1)
    actual = torch.nn.functional.conv2d(g, packed, padding=1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
