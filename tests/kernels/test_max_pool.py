"""Max pool kernel: bit for bit what torch computes, values and positions."""

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast.kernels.max_pool import max_pool, output_size

MODES = {"ceil": dict(ceil_mode=True), "padded": dict(padding=1)}


def reference(x, mode):
    """Output and position in the window, 3 * row + column, as torch has them."""
    width = x.shape[2]
    y, index = F.max_pool2d(x.permute(0, 3, 1, 2), 3, stride=2, return_indices=True, **MODES[mode])
    pad = 1 if mode == "padded" else 0
    oh = torch.arange(y.shape[2], device=x.device)[:, None]
    ow = torch.arange(y.shape[3], device=x.device)
    row = index // width - (2 * oh - pad)
    column = index % width - (2 * ow - pad)
    return y.permute(0, 2, 3, 1), (3 * row + column).permute(0, 2, 3, 1)


def check(x, mode, output):
    expected, position = reference(x.double(), mode)
    out = output(expected.shape, x.dtype)
    argmax = torch.full(expected.shape, 255, dtype=torch.uint8, device=x.device)
    max_pool(x, out.view, mode, argmax)
    assert torch.equal(out.view.isnan(), expected.isnan())
    assert torch.equal(out.view.nan_to_num(), expected.to(x.dtype).nan_to_num())
    assert torch.equal(argmax.long(), position)
    out.assert_guards_untouched()


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("channels", [3, 56, 64, 80, 128, 160])
@pytest.mark.parametrize("mode", MODES)
def test_channels(mode, channels, crop, embed, output, device):
    values = torch.randn(2, 7, 10, channels, device=device)
    check(embed(values, torch.float16, crop=crop), mode, output)


@pytest.mark.parametrize("mode", MODES)
def test_dtypes(mode, dtype, embed, output, device):
    check(embed(torch.randn(2, 7, 10, 80, device=device), dtype), mode, output)


@pytest.mark.parametrize("size", [(2, 2), (2, 31), (31, 2), (3, 3), (4, 5), (12, 33)])
@pytest.mark.parametrize("mode", MODES)
def test_odd_sizes(mode, size, embed, output, device):
    check(embed(torch.randn(1, *size, 16, device=device), torch.float16), mode, output)


def test_single_pixels(embed, output, device):
    check(embed(torch.randn(2, 1, 1, 16, device=device), torch.float16), "padded", output)
    check(embed(torch.randn(2, 1, 9, 16, device=device), torch.float16), "padded", output)
    assert output_size(1, 9, "ceil") == (0, 4)  # torch raises: the output would be empty.


@pytest.mark.parametrize("mode", MODES)
def test_ties_nan_and_infinities(mode, embed, output, device):
    x = embed(torch.randint(0, 2, (2, 9, 11, 32), device=device).float(), torch.float16)
    check(x, mode, output)
    x[0, 3, 4, :] = float("nan")
    x[0, 4, 5, ::2] = float("nan")
    x[0, 8, :, 1] = float("inf")
    x[1] = float("-inf")
    x[1, 2, 2, 0] = float("nan")
    check(x, mode, output)


def test_without_positions_into_a_slot(embed, output, device):
    x = embed(torch.randn(2, 7, 10, 64, device=device), torch.bfloat16)
    out = output((2, 3, 5, 64), torch.bfloat16)
    max_pool(x, out.view, "ceil")
    assert torch.equal(out.view, reference(x, "ceil")[0])
    out.assert_guards_untouched()


def test_empty_batch(output, embed, device):
    out = output((0, 3, 5, 64), torch.float16)
    max_pool(embed(torch.randn(0, 7, 10, 64, device=device), torch.float16), out.view, "ceil")


def test_offsets_beyond_32_bits(device):
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    x = storage.as_strided((1, 3, 4, 16), (2**32, 2**30, 32, 1))
    x.copy_(torch.randn(1, 3, 4, 16, device=device))
    out = torch.empty(1, 1, 2, 16, dtype=torch.float16, device=device)
    max_pool(x, out, "ceil")
    assert torch.equal(out, reference(x, "ceil")[0])
