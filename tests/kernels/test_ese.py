"""eSE kernels against fp64: gates from pool partials, and applying them."""

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast.kernels import ese
from vovnet_fast.kernels._common import accumulator

KINDS = ("hard_sigmoid", "sigmoid")


def gate(z, kind):
    return F.relu6(z + 3) / 6 if kind == "hard_sigmoid" else torch.sigmoid(z)


def reference_gates(partials, pixels, weight, bias, kind, dtype):
    mean = partials.to(dtype).sum(1) / pixels
    return gate(mean @ weight.to(dtype).T + bias.to(dtype), kind)


def reference_apply(z, gates, identity, dtype):
    y = z.to(dtype) if gates is None else z.to(dtype) * gates.to(dtype)[:, None, None]
    return y if identity is None else y + identity.to(dtype)


@pytest.fixture
def check_gates(assert_accurate, device):
    def check(n, tiles, channels, dtype, kind, pixels=63):
        acc = accumulator(dtype)
        partials = torch.rand(n, tiles, channels, dtype=acc, device=device) * pixels / tiles
        weight = (torch.randn(channels, channels, device=device) * channels**-0.5 * 4).to(dtype)
        bias = torch.randn(channels, device=device).to(dtype)
        out = torch.full((n, channels), float("nan"), dtype=acc, device=device)
        ese.gates(partials, pixels, weight, bias, kind, out)
        exact = reference_gates(partials, pixels, weight, bias, kind, torch.float64)
        assert_accurate(out, reference_gates(partials, pixels, weight, bias, kind, acc), exact)
        return exact

    return check


@pytest.mark.parametrize("kind", KINDS)
def test_gates_in_every_dtype(kind, dtype, check_gates):
    exact = check_gates(2, 5, 80, dtype, kind)
    if kind == "hard_sigmoid":
        assert {0.0, 1.0} <= set(exact.flatten().tolist()), "both ends of the ramp are reached"


@pytest.mark.parametrize("channels", [1, 56, 112, 128, 192, 256, 384, 512, 768, 1024])
def test_gates_of_every_width(channels, check_gates):
    check_gates(1, 3, channels, torch.float16, "hard_sigmoid")


@pytest.mark.parametrize("tiles", [1, 63, 64, 65, 525])
def test_gates_from_any_number_of_partials(tiles, check_gates):
    check_gates(2, tiles, 64, torch.float16, "sigmoid", pixels=67200)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_nan_and_inf(kind, assert_same_nonfinite, device):
    partials = torch.rand(4, 3, 64, device=device)
    partials[0, 1, 5] = float("nan")
    partials[1, 2, 7] = float("inf")
    weight = torch.randn(64, 64, device=device)
    weight[:, 7] = weight[:, 7].abs() + 0.1
    bias = torch.zeros(64, device=device)
    out = torch.empty(4, 64, device=device)
    ese.gates(partials, 10, weight, bias, kind, out)
    expected = reference_gates(partials, 10, weight, bias, kind, torch.float64)
    assert_same_nonfinite(out, expected)
    assert (out[1] == 1).all()


@pytest.fixture
def check_apply(embed, output, assert_accurate, device):
    def check(shape, dtype, *, gated=True, identity=True, crop=False):
        n, _, _, channels = shape
        z = embed(torch.randn(shape, device=device), dtype, crop=crop)
        added = embed(torch.randn(shape, device=device), dtype) if identity else None
        gates = torch.rand(n, channels, dtype=accumulator(dtype), device=device)
        gates = gates if gated else None
        out = output(shape, dtype, crop=crop)
        ese.apply(z, gates, added, out.view)
        exact = reference_apply(z, gates, added, torch.float64)
        assert_accurate(out.view, reference_apply(z, gates, added, dtype), exact)
        out.assert_guards_untouched()

    return check


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("identity", [False, True])
def test_apply_in_every_dtype(identity, gated, dtype, check_apply):
    check_apply((2, 7, 9, 80), dtype, identity=identity, gated=gated)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("channels", [3, 56, 112, 128, 192, 256, 384, 1024])
def test_apply_to_every_width(channels, crop, check_apply):
    check_apply((2, 3, 5, channels), torch.float16, crop=crop)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (17, 31)])
@pytest.mark.parametrize("identity", [False, True])
def test_apply_to_odd_sizes(identity, size, check_apply):
    check_apply((2, *size, 16), torch.float16, identity=identity)


def test_apply_in_place_of_the_identity(embed, assert_accurate, device):
    z = embed(torch.randn(1, 5, 6, 64, device=device), torch.float16)
    x = embed(torch.randn(1, 5, 6, 64, device=device), torch.float16)
    gates = torch.rand(1, 64, device=device)
    exact = reference_apply(z, gates, x, torch.float64)
    eager = reference_apply(z, gates, x, torch.float16)
    ese.apply(z, gates, x, x)
    assert_accurate(x, eager, exact)


def test_apply_to_nan_and_inf(embed, output, assert_same_nonfinite, device):
    z = embed(torch.randn(1, 7, 9, 16, device=device), torch.float16)
    z[0, 0, 0, 3] = float("nan")
    z[0, 5, 7, 4:6] = float("inf")
    gates = torch.rand(1, 16, device=device)
    gates[0, 4] = 0  # Inf * 0 is NaN.
    gates[0, 8] = float("nan")
    out = output(z.shape, torch.float16)
    ese.apply(z, gates, None, out.view)
    assert_same_nonfinite(out.view, reference_apply(z, gates, None, torch.float64))


def test_empty_batch(output, device):
    out = output((0, 7, 9, 16), torch.float16)
    gates = torch.empty(0, 16, device=device)
    weight, bias = torch.empty(16, 16, device=device), torch.empty(16, device=device)
    ese.gates(torch.empty(0, 1, 16, device=device), 63, weight, bias, "sigmoid", gates)
    ese.apply(out.view, gates, None, out.view)


def test_offsets_beyond_32_bits(device):
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    z = storage.as_strided((1, 3, 4, 16), (2**32, 2**30, 32, 1))
    z.copy_(torch.randn(1, 3, 4, 16, device=device))
    gates = torch.rand(1, 16, device=device)
    out = storage.as_strided((1, 3, 4, 16), (2**32, 2**30, 32, 1), 2**20)
    ese.apply(z, gates, z, out)
    exact = reference_apply(z, gates, z, torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
