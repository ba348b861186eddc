"""Max pool kernels: what torch computes, values and positions bit for bit, and gradients."""

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast.kernels.max_pool import max_pool, max_pool_backward, output_size

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


def autograd(x, dout, mode, dtype):
    """Gradient of the input as torch has it, in ``dtype``."""
    x = x.detach().to(dtype).requires_grad_()
    y = F.max_pool2d(x.permute(0, 3, 1, 2), 3, stride=2, **MODES[mode])
    return torch.autograd.grad(y, x, dout.to(dtype).permute(0, 3, 1, 2))[0]


def positions(x, mode):
    return reference(x.double(), mode)[1].to(torch.uint8).contiguous()


@pytest.fixture
def check_backward(embed, output, assert_accurate, device):
    def check(x, mode, *, crop=False):
        argmax = positions(x, mode)
        dout = embed(torch.randn(argmax.shape, device=device), x.dtype, crop=crop)
        out = output(x.shape, x.dtype, crop=crop)
        max_pool_backward(dout, argmax, out.view, mode)
        exact = autograd(x, dout, mode, torch.float64)
        assert_accurate(out.view, autograd(x, dout, mode, x.dtype), exact)
        out.assert_guards_untouched()

    return check


@pytest.mark.parametrize("mode", MODES)
def test_gradients_in_every_dtype(mode, dtype, check_backward, device):
    check_backward(torch.randn(2, 7, 10, 80, device=device).to(dtype), mode)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("channels", [3, 56, 64, 128, 160])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_channels(mode, channels, crop, check_backward, device):
    check_backward(torch.randn(2, 8, 9, channels, device=device).double(), mode, crop=crop)


@pytest.mark.parametrize(
    "size", [(2, 2), (2, 31), (31, 2), (3, 3), (3, 4), (4, 3), (4, 5), (12, 33)]
)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_odd_sizes(mode, size, check_backward, device):
    check_backward(torch.randn(1, *size, 16, device=device).double(), mode)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 9), (9, 1)])
def test_gradients_of_single_pixels(size, check_backward, device):
    check_backward(torch.randn(2, *size, 16, device=device).double(), "padded")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_ties(mode, check_backward, device):
    """They flow to one of them: the one that torch takes."""
    check_backward(torch.randint(0, 2, (2, 9, 11, 32), device=device).double(), mode)
    check_backward(torch.full((1, 6, 7, 16), float("-inf"), device=device).double(), mode)
    x = torch.randn(1, 9, 11, 16, device=device).double()
    x[0, 3, 4] = x[0, 4, 5] = x[0, 8, 10] = float("nan")
    check_backward(x, mode)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_what_the_forward_left(mode, embed, output, assert_accurate, device):
    x = embed(torch.randn(2, 9, 11, 64, device=device), torch.float16)
    size = output_size(9, 11, mode)
    y, dx = output((2, *size, 64), torch.float16), output(x.shape, torch.float16)
    argmax = torch.full(y.view.shape, 255, dtype=torch.uint8, device=device)
    max_pool(x, y.view, mode, argmax)
    dout = torch.randn(2, 1, 1, 64, device=device).half().expand(y.view.shape)  # As after a sum.
    max_pool_backward(dout, argmax, dx.view, mode)
    exact = autograd(x, dout, mode, torch.float64)
    assert_accurate(dx.view, autograd(x, dout, mode, torch.float16), exact)


@pytest.mark.parametrize("mode", MODES)
def test_nonfinite_gradients_stay_where_they_belong(
    mode, embed, output, assert_same_nonfinite, device
):
    x = torch.randn(1, 9, 11, 16, device=device).half()
    argmax = positions(x, mode)
    dout = embed(torch.randn(argmax.shape, device=device), torch.float16)
    dout[0, 1, 1] = float("nan")
    dout[0, 2, 3, ::2] = float("inf")
    dout[0, 2, 4, ::3] = float("-inf")
    out = output(x.shape, torch.float16)
    max_pool_backward(dout, argmax, out.view, mode)
    assert_same_nonfinite(out.view, autograd(x, dout, mode, torch.float64))


def test_gradients_of_an_empty_batch(output, device):
    dout, out = output((0, 3, 5, 64), torch.float16), output((0, 7, 10, 64), torch.float16)
    argmax = torch.empty(0, 3, 5, 64, dtype=torch.uint8, device=device)
    max_pool_backward(dout.view, argmax, out.view, "ceil")


def test_gradient_offsets_beyond_32_bits(device):
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    out = storage.as_strided((1, 3, 4, 16), (2**32, 2**30, 32, 1))
    x = torch.randn(1, 3, 4, 16, device=device).half()
    dout = torch.randn(1, 1, 2, 16, device=device).half()
    max_pool_backward(dout, positions(x, "ceil"), out, "ceil")
    assert torch.equal(out, autograd(x, dout, "ceil", torch.float16))
