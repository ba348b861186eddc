"""eSE kernels against fp64: gates from pool partials, applying them, and their gradients."""

import pytest
import torch
import torch.nn.functional as F

from vovnet_fast import reference
from vovnet_fast.compat import zip
from vovnet_fast.kernels import ese, ese_backward
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
        mean, out = torch.full((2, n, channels), float("nan"), dtype=acc, device=device)
        ese.gates(partials, pixels, weight, bias, kind, mean, out)
        exact_mean = partials.double().sum(1) / pixels
        # The interpreter adds one after the other, torch pairwise: some more roundings.
        assert_accurate(mean, partials.sum(1) / pixels, exact_mean, 4 * exact_mean)
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


@pytest.mark.versions
@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_nan_and_inf(kind, assert_same_nonfinite, device):
    partials = torch.rand(4, 3, 64, device=device)
    partials[0, 1, 5] = float("nan")
    partials[1, 2, 7] = float("inf")
    weight = torch.randn(64, 64, device=device)
    weight[:, 7] = weight[:, 7].abs() + 0.1
    bias = torch.zeros(64, device=device)
    mean, out = torch.empty(2, 4, 64, device=device)
    ese.gates(partials, 10, weight, bias, kind, mean, out)
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
    partials = torch.empty(0, 1, 16, device=device)
    ese.gates(partials, 63, weight, bias, "sigmoid", torch.empty_like(gates), gates)
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


def backward(dout, y, gates, mean, fc_weight, kind, out):
    """All three steps. Returns the gradients of the fully connected layer."""
    acc = accumulator(y.dtype)
    n, height, width, c = y.shape
    dgates, dpixel = torch.full((2, n, c), float("nan"), dtype=acc, device=y.device)
    dfc_weight = torch.full((c, c), float("nan"), dtype=acc, device=y.device)
    dfc_bias = torch.full((c,), float("nan"), dtype=acc, device=y.device)
    ese_backward.gate_sums(dout, y, dgates)
    ese_backward.gates_backward(
        dgates, gates, mean, height * width, fc_weight, kind, dpixel, dfc_weight, dfc_bias
    )
    ese_backward.apply_backward(dout, gates, dpixel, y, out)
    return dfc_weight, dfc_bias


def autograd(dout, z, weight, bias, kind, dtype):
    """Gradients of z, weight and bias through ReLU and eSE, in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (z, weight, bias)]
    z, weight, bias = leaves
    y = reference.ese(z.permute(0, 3, 1, 2).relu(), weight[:, :, None, None], bias, kind)
    return torch.autograd.grad(y, leaves, dout.to(dtype).permute(0, 3, 1, 2))


@pytest.fixture
def check_backward(embed, output, assert_accurate, device):
    def check(shape, dtype, kind, *, crop=False):
        n, height, width, c = shape
        acc = accumulator(dtype)
        z = torch.randn(shape, device=device).to(dtype)
        y = embed(z.relu(), dtype, crop=crop)
        dout = embed(torch.randn(shape, device=device), dtype)
        weight = (torch.randn(c, c, device=device) * c**-0.5 * 4).to(dtype)
        bias = torch.randn(c, device=device).to(dtype)
        mean, gates = torch.empty(2, n, c, dtype=acc, device=device)
        partials = y.to(acc).sum((1, 2)).unsqueeze(1)
        ese.gates(partials, height * width, weight, bias, kind, mean, gates)
        out = output(shape, dtype, crop=crop)
        dweight, dbias = backward(dout, y, gates, mean, weight, kind, out.view)
        exact = autograd(dout, z, weight, bias, kind, torch.float64)
        eager = autograd(dout, z, weight, bias, kind, dtype)
        for found, by_eager, right in zip((out.view, dweight, dbias), eager, exact, strict=True):
            # The interpreter adds one after the other, torch pairwise: some more roundings.
            assert_accurate(found.to(dtype), by_eager, right, 4 * right.abs())
        out.assert_guards_untouched()
        return gates

    return check


@pytest.mark.parametrize("kind", KINDS)
def test_backward_in_every_dtype(kind, dtype, check_backward):
    gates = check_backward((3, 7, 9, 80), dtype, kind)
    if kind == "hard_sigmoid":
        assert {0.0, 1.0} <= set(gates.flatten().tolist()), "both ends of the ramp are reached"


@pytest.mark.parametrize("channels", [1, 3, 56, 112, 160])
def test_backward_of_every_width(channels, check_backward):
    check_backward((2, 3, 5, channels), torch.float64, "sigmoid", crop=channels % 3 == 1)


@pytest.mark.versions
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (17, 31)])
def test_backward_of_odd_sizes(size, check_backward):
    check_backward((2, *size, 16), torch.float64, "hard_sigmoid")


def test_backward_of_many_images(check_backward):
    check_backward((19, 2, 2, 16), torch.float64, "sigmoid")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_gate_sums(dtype, embed, assert_accurate, device):
    """Many pixels a program; in fp16 the products exceed its range."""
    dout = embed(torch.randn(1, 60, 71, 64, device=device) * 300, dtype)
    y = embed(torch.rand(1, 60, 71, 64, device=device) * 300, dtype, crop=True)
    out, again = torch.full((2, 1, 64), float("nan"), device=device)
    ese_backward.gate_sums(dout, y, out)
    exact = (dout.double() * y.double()).sum((1, 2))
    eager = (dout.float() * y.float()).sum((1, 2))
    assert_accurate(out, eager, exact, (dout.double() * y.double()).abs().sum((1, 2)))
    ese_backward.gate_sums(dout, y, again)
    assert torch.equal(out, again)


def test_gate_sums_of_an_expanded_gradient(embed, assert_accurate, device):
    """As after a sum over the pixels: strides of 0."""
    dout = torch.randn(2, 1, 1, 64, dtype=torch.float64, device=device).expand(2, 5, 6, 64)
    y = embed(torch.rand(2, 5, 6, 64, device=device), torch.float64)
    out = torch.empty(2, 64, dtype=torch.float64, device=device)
    ese_backward.gate_sums(dout, y, out)
    exact = (dout * y).sum((1, 2))
    assert_accurate(out, exact, exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_gates_backward_alone(weight_dtype, kind, assert_accurate, device):
    """Parameters may have another dtype than the activations. Run to run bit for bit equal."""
    leaves = torch.randn(5, 56), torch.randn(56, 56) / 4, torch.randn(56)
    mean, weight, bias = (leaf.to(device) for leaf in leaves)
    weight = weight.to(weight_dtype)
    dgates = torch.randn(5, 56, device=device)

    def right(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (mean, weight, bias)]
        gates = reference.gate(F.linear(*leaves), kind)
        dmean, dweight, dbias = torch.autograd.grad(gates, leaves, dgates.to(dtype))
        return gates.detach(), (dmean / 63, dweight, dbias)

    gates, eager = right(torch.float32)
    runs = []
    for _ in range(2):
        outs = [torch.full_like(t, float("nan"), dtype=torch.float32) for t in (mean, weight, bias)]
        ese_backward.gates_backward(dgates, gates, mean, 63, weight, kind, *outs)
        runs.append(outs)
    for found, again, by_eager, exact in zip(*runs, eager, right(torch.float64)[1], strict=True):
        # Sums of as many terms: their magnitude, not that of the result, is rounded.
        assert_accurate(found, by_eager, exact, 4 * exact.abs().max().expand_as(exact))
        assert torch.equal(found, again)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_backward_of_nan_and_inf(kind, assert_same_nonfinite, device):
    mean = torch.rand(4, 64, device=device)
    weight = torch.randn(64, 64, device=device)
    z = torch.randn(4, 64, device=device)
    z[0, :3] = torch.tensor([-4.0, 0.0, 4.0])
    dgates = torch.randn(4, 64, device=device)
    dgates[0, :3] = float("nan")  # Does not pass where the ramp is flat.
    dgates[1, 5] = float("inf")
    mean[2, 9] = float("nan")
    z = z.double().requires_grad_()
    gates = reference.gate(z, kind)
    (d,) = torch.autograd.grad(gates, z, dgates.double())
    expected = d @ weight.double(), d.T @ mean.double(), d.sum(0)
    found = [torch.empty(shape, device=device) for shape in ((4, 64), (64, 64), (64,))]
    ese_backward.gates_backward(dgates, gates.detach().float(), mean, 63, weight, kind, *found)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_nonfinite(ours, theirs)


def masked(dout, gates, dpixel, y, dtype):
    dz = dout.to(dtype)
    if gates is not None:
        dz = dz * gates.to(dtype)[:, None, None] + dpixel.to(dtype)[:, None, None]
    return torch.where(y <= 0, 0, dz)


@pytest.mark.parametrize("target", ["out", "dout", "y"])
@pytest.mark.parametrize("gated", [False, True])
def test_apply_backward(gated, target, dtype, embed, output, assert_accurate, device):
    shape, acc = (2, 7, 9, 80), accumulator(dtype)
    dout = embed(torch.randn(shape, device=device), dtype, crop=True)
    y = embed(torch.randn(shape, device=device).relu(), dtype)
    y[0, 0, 0] = -0.0
    gates, dpixel = torch.randn(2, 2, 80, dtype=acc, device=device) if gated else (None, None)
    exact = masked(dout, gates, dpixel, y, torch.float64)
    eager = masked(dout, gates, dpixel, y, dtype)
    out = output(shape, dtype)
    into = dict(out=out.view, dout=dout, y=y)[target]
    ese_backward.apply_backward(dout, gates, dpixel, y, into)
    assert_accurate(into, eager, exact)
    if target == "out":
        out.assert_guards_untouched()


@pytest.mark.parametrize("gated", [False, True])
def test_apply_backward_to_nan_and_inf(gated, embed, output, assert_same_nonfinite, device):
    y = embed(torch.randn(1, 7, 9, 16, device=device).relu(), torch.float16)
    dout = embed(torch.randn(1, 7, 9, 16, device=device), torch.float16)
    y[0, 0, 0, 3] = float("nan")  # Lets through what comes,
    dout[0, 0, 0, 3] = float("inf")
    y[0, 1, 1, :] = 0.0  # and this nothing.
    dout[0, 1, 1, 4] = float("nan")
    dout[0, 2, :, 5] = float("-inf")
    gates, dpixel = torch.rand(2, 1, 16, device=device) if gated else (None, None)
    if gated:
        dpixel[0, 7] = float("nan")
    out = output(y.shape, torch.float16)
    ese_backward.apply_backward(dout, gates, dpixel, y, out.view)
    assert_same_nonfinite(out.view, masked(dout, gates, dpixel, y, torch.float64))
    assert (out.view[0, 1, 1] == 0).all()


def test_backward_of_an_empty_batch(output, device):
    out = output((0, 7, 9, 16), torch.float16)
    empty, weight = torch.empty(0, 16, device=device), torch.ones(16, 16, device=device)
    dweight, dbias = backward(out.view, out.view, empty, empty, weight, "sigmoid", out.view)
    assert not dweight.any()
    assert not dbias.any()


def test_backward_offsets_beyond_32_bits(device):
    storage = torch.empty(2**31 + 2**21, dtype=torch.float16, device=device)
    layout = ((1, 3, 4, 16), (2**32, 2**30, 32, 1))
    dout, y, out = (storage.as_strided(*layout, 2**18 * i) for i in range(3))
    dout.copy_(torch.randn(1, 3, 4, 16, device=device))
    y.copy_(torch.randn(1, 3, 4, 16, device=device).relu())
    gates, dpixel = torch.rand(2, 1, 16, device=device)
    sums = torch.empty(1, 16, device=device)
    ese_backward.gate_sums(dout, y, sums)
    exact = (dout.double() * y.double()).sum((1, 2))
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)
    ese_backward.apply_backward(dout, gates, dpixel, y, out)
    exact = masked(dout, gates, dpixel, y, torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
