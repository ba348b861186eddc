"""Epilogue kernel against fp64."""

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast.kernels._common import accumulator
from vovnet_fast.kernels.epilogue import epilogue, pool_tiles


def reference(z, scale, shift, relu, dtype):
    y = z.to(dtype) * scale.to(dtype) + shift.to(dtype)
    return F.relu(y) if relu else y


@pytest.fixture
def check(embed, output, assert_accurate, device):
    def check(shape, dtype, *, relu=True, crop=False, in_place=False):
        acc = accumulator(dtype)
        z = embed(torch.randn(shape, device=device), dtype, crop=crop)
        scale = torch.randn(shape[3], dtype=acc, device=device)
        shift = torch.randn(shape[3], dtype=acc, device=device)
        exact = reference(z, scale, shift, relu, torch.float64)
        eager = reference(z, scale, shift, relu, dtype)
        out = output(shape, dtype, crop=crop)
        target = z if in_place else out.view
        partials_shape = (shape[0], pool_tiles(target), shape[3])
        partials = torch.full(partials_shape, float("nan"), dtype=acc, device=device)
        epilogue(z, scale, shift, target, relu=relu, pool_partials=partials)
        assert_accurate(target, eager, exact)
        sums, eager_sums = partials.sum(1), eager.to(acc).sum((1, 2))
        # The interpreter adds one after the other, torch pairwise: some more roundings.
        magnitude = 4 * exact.abs().sum((1, 2))
        assert_accurate(sums, eager_sums, exact.sum((1, 2)), magnitude)
        out.assert_guards_untouched()

    return check


@pytest.mark.parametrize("relu", [True, False])
def test_dtypes(relu, dtype, check):
    check((2, 17, 19, 80), dtype, relu=relu)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("channels", [3, 56, 64, 96, 112, 128, 160, 192, 224, 256])
def test_channels(channels, crop, check):
    check((2, 5, 6, channels), torch.float16, crop=crop)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (16, 16), (17, 31)])
def test_odd_sizes(size, check):
    check((2, *size, 16), torch.float16)


def test_in_place(check):
    check((2, 5, 6, 64), torch.bfloat16, in_place=True)


def test_nan_and_inf(embed, output, assert_same_nonfinite, device):
    z = embed(torch.randn(1, 7, 9, 16, device=device), torch.float16)
    z[0, 0, 0, 3] = float("nan")
    z[0, 5, 7, 4] = float("inf")
    z[0, 6, 8, 15] = float("-inf")
    one = torch.ones(16, device=device)
    out = output(z.shape, torch.float16)
    epilogue(z, one, one, out.view)
    assert_same_nonfinite(out.view, reference(z, one, one, True, torch.float64))


def test_empty_batch(output, device):
    out = output((0, 7, 9, 16), torch.float16)
    one = torch.ones(16, device=device)
    epilogue(out.view, one, one, out.view)


def test_offsets_beyond_32_bits(device):
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    z = storage.as_strided((1, 3, 4, 16), (2**32, 2**30, 32, 1))
    z.copy_(torch.randn(1, 3, 4, 16, device=device))
    one = torch.ones(16, device=device)
    out = storage.as_strided((1, 3, 4, 16), (2**32, 2**30, 32, 1), 2**20)
    epilogue(z, one, one, out)
    expected = reference(z, one, one, True, torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
