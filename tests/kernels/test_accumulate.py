"""The add and mask epilogue of another library's input gradient against fp64."""

import pytest
import torch

from vovnet_fast.kernels.accumulate import accumulate, plan


def reference(z, add, mask, dtype):
    """The same in plain torch, every step in ``dtype``."""
    y = z.to(dtype, copy=True)
    if add is not None:
        y[..., : add.shape[3]] += add.to(dtype)
    if mask is not None:
        masked = y[..., y.shape[3] - mask.shape[3] :]
        masked.masked_fill_(mask <= 0, 0.0)
    return y


@pytest.fixture
def check(embed, output, assert_accurate, device):
    def check(shape, dtype, *, added=None, masked=None, crop=False, alias=None):
        def view(channels):
            if channels is None:
                return None
            return embed(torch.randn(*shape[:3], channels, device=device), dtype, crop=crop)

        z, add, mask = view(shape[3]), view(added), view(masked)
        exact, eager = (reference(z, add, mask, d) for d in (torch.float64, dtype))
        out = output(shape, dtype, crop=crop)
        target = {"z": z, "add": add, None: out.view}[alias]
        accumulate(z, target, add, mask)
        assert_accurate(target, eager, exact)
        out.assert_guards_untouched()

    return check


@pytest.mark.parametrize(("added", "masked"), [(None, None), (80, None), (None, 80), (80, 80)])
def test_dtypes(added, masked, dtype, check):
    check((2, 7, 9, 80), dtype, added=added, masked=masked)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("channels", [3, 56, 64, 112, 192, 256])
def test_channels(channels, crop, check):
    check((2, 5, 6, channels), torch.float16, added=channels, masked=channels, crop=crop)


@pytest.mark.parametrize(("added", "masked"), [(16, 64), (64, 16), (40, 24), (24, 72), (1, 1)])
def test_some_of_the_channels(added, masked, check):
    """``add`` belongs to the first ones, ``mask`` to the last ones."""
    check((2, 5, 6, 80), torch.float16, added=added, masked=masked)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (17, 31)])
def test_odd_sizes(size, check):
    check((2, *size, 16), torch.float16, added=16, masked=16)


@pytest.mark.parametrize("alias", ["z", "add"])
def test_in_place(alias, check):
    check((2, 5, 6, 64), torch.bfloat16, added=64, masked=64, alias=alias)


def test_nan_and_inf(embed, output, assert_same_nonfinite, device):
    z, add, mask = (embed(torch.randn(1, 7, 9, 16, device=device), torch.float16) for _ in range(3))
    z[0, 0, 0, 3] = float("nan")
    z[0, 5, 7, 4] = float("inf")
    add[0, 6, 8, 15] = float("-inf")
    mask[0, 0, 0, 3] = mask[0, 6, 8, 15] = 1.0
    mask[0, 5, 7, 4] = -1.0
    mask[0, 2, 2, :] = float("nan")
    out = output(z.shape, torch.float16)
    accumulate(z, out.view, add, mask)
    expected = reference(z, add, mask, torch.float64)
    assert_same_nonfinite(out.view, expected)
    assert out.view[0, 5, 7, 4] == 0, "what the mask hides must not spread as NaN"
    assert (out.view[0, 2, 2] != 0).all(), "a NaN of the mask lets gradients pass"


def test_empty_batch(output):
    out = output((0, 7, 9, 16), torch.float16)
    accumulate(out.view, out.view, out.view, out.view)


def test_offsets_beyond_32_bits(device):
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    strides = (2**32, 2**30, 64, 1)
    z, add, mask, out = (storage.as_strided((1, 3, 4, 16), strides, i * 2**18) for i in range(4))
    for view in (z, add, mask):
        view.copy_(torch.randn(1, 3, 4, 16, device=device))
    assert plan(z, out, add, mask).constants["WIDE"]
    accumulate(z, out, add, mask)
    expected = reference(z, add, mask, torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
