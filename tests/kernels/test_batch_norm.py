"""Batch norm kernels against fp64: merging statistics, and both passes of the backward."""

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast.compat import zip
from vovnet_fast.kernels import batch_norm, batch_norm_backward
from vovnet_fast.kernels._common import accumulator

EPS = 1e-5
HIGH = pytest.mark.parametrize("high", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def statistics(z):
    """[3, C] of a [P, C]: count, sum, squared deviations, as a convolution leaves them."""
    mean = z.mean(0, keepdim=True)
    return torch.stack([torch.full_like(z[0], len(z)), z.sum(0), (z - mean).square().sum(0)])


def split(z, sizes):
    """Partial statistics of the parts of a [P, C]."""
    return torch.stack([statistics(part) for part in z.split(sizes)])


def run(partials, gamma=None, beta=None, eps=EPS):
    """``merge`` and ``finish``, of the same partials."""
    _, rows, c = partials.shape
    merged = torch.full((rows, c), float("nan"), dtype=partials.dtype, device=partials.device)
    norm = torch.full((6, c), float("nan"), dtype=partials.dtype, device=partials.device)
    batch_norm.merge(partials, merged)
    batch_norm.finish(partials, gamma, beta, eps, norm)
    return merged, norm


def expected_norm(z, gamma=None, beta=None, eps=EPS):
    """The rows of ``norm`` for a [P, C], in fp64."""
    z = z.double()
    mean, var = z.mean(0), z.var(0, unbiased=False)
    rstd = (var + eps).rsqrt()
    scale = rstd if gamma is None else gamma.double() * rstd
    shift = -mean * scale if beta is None else beta.double() - mean * scale
    return torch.stack([mean, rstd, scale, shift, z.var(0), torch.full_like(mean, len(z))])


@pytest.fixture
def close():
    """Assert agreement to 1e-13 and a few roundings of the largest number of each row."""

    def close(actual, exact):
        allowed = 4 * torch.finfo(actual.dtype).eps + 1e-13
        error = (actual.double() - exact).abs() / exact.abs().amax(1, keepdim=True)
        assert error.max() <= allowed, f"off by {error.max():.3g}, {allowed:.3g} is allowed"

    return close


def values(pixels, channels, device):
    """Channels of different mean and spread; the last one is constant."""
    z = torch.randn(pixels, channels, dtype=torch.float64, device=device)
    z = z * torch.rand(channels, device=device) + torch.randn(channels, device=device)
    z[:, -1] = 3
    return z


@HIGH
@pytest.mark.parametrize(
    ("parts", "channels"), [(1, 16), (2, 3), (31, 56), (33, 112), (300, 16), (1700, 5)]
)
def test_statistics(parts, channels, high, close, device):
    z = values(5 * parts - 2, channels, device)
    gamma, beta = torch.randn(2, channels, dtype=high, device=device)
    partials = split(z, 5).to(high)
    merged, norm = run(partials, gamma, beta)
    close(merged, statistics(z))
    close(norm, expected_norm(z, gamma, beta))
    again = run(partials, gamma, beta)
    assert torch.equal(merged, again[0])
    assert torch.equal(norm, again[1])


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_parameters(parameters, eps, close, device):
    z = values(40, 24, device)
    gamma, beta = torch.randn(2, 24, device=device).to(parameters) if parameters else (None, None)
    close(run(split(z, 7), gamma, beta, eps)[1], expected_norm(z, gamma, beta, eps))


def test_parts_of_every_size(close, device):
    """The empty ones count for nothing, whatever is written in them."""
    z = values(1 + 700 + 30 + 256 + 3, 16, device)
    partials = split(z, [1, 700, 30, 256, 3])
    empty = torch.full((3, 16), float("nan"), dtype=torch.float64, device=device)
    empty[0] = 0
    for place in (0, 2, 5):
        partials = torch.cat([partials[:place], empty[None], partials[place:]])
    merged, norm = run(partials)
    close(merged, statistics(z))
    close(norm, expected_norm(z))


def test_more_parts_than_programs_merge_well(close, device, monkeypatch):
    """The most that a program takes is reached, and the groups are of unequal size."""
    monkeypatch.setattr(batch_norm, "_MIN_PARTS", 16)
    monkeypatch.setattr(batch_norm, "_MAX_PARTS", 80)
    z = values(1001, 4, device)
    partials = split(z, 1)
    if device.type == "cpu":
        assert batch_norm._groups(partials) == 13
    merged, norm = run(partials)
    close(merged, statistics(z))
    close(norm, expected_norm(z))


@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_large_means(mean, assert_accurate, device):
    """As exact as fp32 can hold: the normalised values, and through them the variance."""
    z = (torch.randn(8191, 16, dtype=torch.float64, device=device) + mean).float()
    gamma, beta = torch.rand(16, device=device) + 0.5, torch.randn(16, device=device)
    partials = split(z.double(), 128).float()  # What a good convolution leaves.
    merged, norm = run(partials, gamma, beta)
    exact = expected_norm(z, gamma, beta)
    assert ((norm[0] - exact[0]).abs() <= 2 * torch.finfo(torch.float32).eps * abs(mean)).all()
    for row in (1, 4):
        torch.testing.assert_close(norm[row].double(), exact[row], rtol=2e-6, atol=0)
    torch.testing.assert_close(merged[2].double() / 8190, exact[4], rtol=2e-6, atol=0)
    right = F.batch_norm(z.double(), None, None, gamma.double(), beta.double(), True, eps=EPS)
    eager = F.batch_norm(z, None, None, gamma, beta, True, eps=EPS)
    assert_accurate(z * norm[2] + norm[3], eager, right)


@HIGH
def test_statistics_of_nan_and_inf(high, assert_same_nonfinite, device):
    z = values(900, 16, device)
    z[3, 1] = float("nan")
    z[500, 2] = float("inf")
    z[600, 3] = float("-inf")
    _, norm = run(split(z, 1).to(high))
    expected = expected_norm(z)
    assert_same_nonfinite(norm, expected)


def test_statistics_of_nothing(device):
    partials = torch.empty(0, 3, 16, device=device)
    merged, _ = run(partials)
    assert not merged.any()
    batch_norm.merge(torch.empty(4, 3, 0, device=device), torch.empty(3, 0, device=device))


def prepare(z, gamma):
    """``norm`` of a [N, H, W, C] view as the forward pass leaves it."""
    acc = accumulator(z.dtype)
    norm = torch.empty(6, z.shape[3], dtype=acc, device=z.device)
    partials = split(z.double().flatten(0, 2), 64).to(acc)
    batch_norm.finish(partials, gamma, None, EPS, norm)
    return norm


def backward(g, z, norm, gamma, out):
    """Both passes. Returns the sums."""
    sums = torch.full((2, z.shape[3]), float("nan"), dtype=norm.dtype, device=z.device)
    batch_norm_backward.backward_sums(g, z, norm, sums)
    batch_norm_backward.input_grad(g, z, norm, sums, gamma, out)
    return sums


def autograd(g, z, gamma, dtype):
    """Gradients of z, gamma and beta as torch has them, in ``dtype``."""
    gamma = torch.ones(z.shape[3], device=z.device) if gamma is None else gamma
    leaves = [t.detach().to(dtype).requires_grad_() for t in (z, gamma, torch.zeros_like(gamma))]
    z, gamma, beta = leaves
    y = F.batch_norm(z.permute(0, 3, 1, 2), None, None, gamma, beta, True, eps=EPS)
    return torch.autograd.grad(y, leaves, g.to(dtype).permute(0, 3, 1, 2))


@pytest.fixture
def check(embed, output, assert_accurate, device):
    def check(shape, dtype, *, crop=False, target="out", gamma=True):
        z = embed(torch.randn(shape, device=device) * 2 + 1, dtype, crop=crop)
        g = embed(torch.randn(shape, device=device), dtype)
        gamma = torch.randn(shape[3], device=device).to(dtype) if gamma else None
        exact, eager = (autograd(g, z, gamma, t) for t in (torch.float64, dtype))
        terms = g.double().abs().sum((0, 1, 2))  # xhat is about 1.
        out = output(shape, dtype, crop=crop)
        into = dict(out=out.view, g=g, z=z)[target]
        sums = backward(g, z, prepare(z, gamma), gamma, into)
        assert_accurate(into, eager[0], exact[0])
        for found, by_eager, right in zip(sums.flip(0), eager[1:], exact[1:], strict=True):
            assert_accurate(found.to(dtype), by_eager, right, terms)
        out.assert_guards_untouched()

    return check


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("target", ["out", "g", "z"])
def test_backward_in_every_dtype(target, gamma, dtype, check):
    check((2, 7, 9, 80), dtype, target=target, gamma=gamma)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 56, 112, 128, 160])
def test_backward_of_channels(channels, crop, check):
    check((2, 3, 5, channels), torch.float64, crop=crop)


@pytest.mark.parametrize("size", [(2, 1), (1, 300), (300, 1), (17, 31)])
def test_backward_of_odd_sizes(size, check):
    check((1, *size, 16), torch.float64)


@pytest.mark.versions
def test_backward_of_single_pixels(check):
    check((9, 1, 1, 16), torch.float64)


def test_programs_take_several_steps(check):
    check((1, 33, 41, 64), torch.float32)


@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_backward_with_large_means(mean, embed, assert_accurate, device):
    z = embed(torch.randn(2, 15, 17, 16, device=device) + mean, torch.float32)
    g = embed(torch.randn(2, 15, 17, 16, device=device), torch.float32)
    gamma = torch.rand(16, device=device) + 0.5
    out = torch.empty_like(z)
    sums = backward(g, z, prepare(z, gamma), gamma, out)
    exact, eager = (autograd(g, z, gamma, dtype) for dtype in (torch.float64, torch.float32))
    assert_accurate(out, eager[0], exact[0])
    terms = g.double().abs().sum((0, 1, 2))  # xhat is about 1.
    assert_accurate(sums[1], eager[1], exact[1], terms)
    assert_accurate(sums[0], eager[2], exact[2], terms)


def test_run_to_run_equality(embed, device):
    z = embed(torch.randn(2, 23, 25, 48, device=device), torch.float16)
    g = embed(torch.randn(2, 23, 25, 48, device=device), torch.float16)
    norm, out, again = prepare(z, None), torch.empty_like(z), torch.empty_like(z)
    assert torch.equal(backward(g, z, norm, None, out), backward(g, z, norm, None, again))
    assert torch.equal(out, again)


def test_an_expanded_gradient(embed, assert_accurate, device):
    """As after a sum over the pixels: strides of 0."""
    z = embed(torch.randn(2, 5, 6, 32, device=device), torch.float64)
    g = torch.randn(2, 1, 1, 32, dtype=torch.float64, device=device).expand(z.shape)
    out = torch.empty_like(z)
    backward(g, z, prepare(z, None), None, out)
    exact = autograd(g, z, None, torch.float64)[0]
    assert_accurate(out, exact, exact)


def test_two_processes(embed, assert_accurate, device):
    """SyncBN: merged statistics and sums of both, each process its own images."""
    z = embed(torch.randn(5, 7, 9, 16, device=device) * 3 + 2, torch.float64)
    g = embed(torch.randn(5, 7, 9, 16, device=device), torch.float64)
    gamma, out = torch.randn(16, dtype=torch.float64, device=device), torch.empty_like(z)
    shares = [slice(0, 2), slice(2, 5)]
    local = [run(split(z[share].flatten(0, 2), 16))[0] for share in shares]
    _, norm = run(torch.stack(local), gamma)
    sums = torch.zeros(2, 16, dtype=torch.float64, device=device)
    for share in shares:
        part = torch.empty_like(sums)
        batch_norm_backward.backward_sums(g[share], z[share], norm, part)
        sums += part
    for share in shares:
        batch_norm_backward.input_grad(g[share], z[share], norm, sums, gamma, out[share])
    exact = autograd(g, z, gamma, torch.float64)
    for found, right in zip((out, sums[1], sums[0]), exact, strict=True):
        assert_accurate(found, right, right)


def test_backward_of_nan_and_inf(embed, output, assert_same_nonfinite, device):
    z = embed(torch.randn(2, 7, 9, 16, device=device), torch.float32)
    g = embed(torch.randn(2, 7, 9, 16, device=device), torch.float32)
    norm = prepare(z, None)
    z[0, 1, 2, 3] = float("nan")  # The statistics are finite: what follows stays apart.
    g[0, 3, 4, 5] = float("nan")
    g[1, 3, 4, 6] = float("inf")
    out = output(z.shape, torch.float32)
    sums = backward(g, z, norm, None, out.view)
    mean, rstd, count = (norm[row].double() for row in (0, 1, 5))
    xhat = (z.double() - mean) * rstd
    expected = torch.stack([g.double().sum((0, 1, 2)), (g.double() * xhat).sum((0, 1, 2))])
    assert_same_nonfinite(sums, expected)
    right = rstd * (g.double() - expected[0] / count - xhat * expected[1] / count)
    assert_same_nonfinite(out.view, right)


def test_backward_of_an_empty_batch(output, device):
    out, norm = output((0, 7, 9, 16), torch.float16), torch.ones(6, 16, device=device)
    assert not backward(out.view, out.view, norm, None, out.view).any()


def test_offsets_beyond_32_bits(device):
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    layout = ((1, 3, 4, 16), (2**32, 2**30, 32, 1))
    g, z, out = (storage.as_strided(*layout, 2**18 * i) for i in range(3))
    for view in (g, z):
        view.copy_(torch.randn(1, 3, 4, 16, device=device))
    norm = prepare(z, None)
    sums = backward(g, z, norm, None, out)
    exact = autograd(g, z, None, torch.float64)
    torch.testing.assert_close(sums[1].double(), exact[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double(), exact[0], rtol=2e-3, atol=2e-3)
