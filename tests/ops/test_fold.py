"""Norms with fixed statistics, folded: the same numbers however it is done, and their gradients."""

import pytest
import torch
from torch import nn

from vovnet_fast import ops
from vovnet_fast.ops import batch_norm
from vovnet_fast.ops.batch_norm import FixedNorm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def norms(sizes=(3, 5, 4), epsilons=(1e-5, 1e-5, 1e-5), dtype=torch.float64):
    return [
        FixedNorm(
            torch.randn(c, dtype=dtype, requires_grad=True),
            torch.randn(c, dtype=dtype, requires_grad=True),
            torch.randn(c, dtype=dtype),
            torch.rand(c, dtype=dtype) + 0.5,
            eps,
        )
        for c, eps in zip(sizes, epsilons)
    ]


def flat(given, dtype=torch.float64):
    return [t for pair in batch_norm.fold(given, dtype) for t in pair]


@pytest.mark.parametrize("epsilons", [(1e-5, 1e-5, 1e-5), (1e-5, 1e-3, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_gradients_it_is_what_it_is_without(epsilons, dtype):
    given = norms(epsilons=epsilons, dtype=dtype)
    found = flat(given, dtype)
    with torch.no_grad():
        expected = flat(given, dtype)
    for a, b, norm in zip(found, expected, [n for n in given for _ in range(2)]):
        assert torch.equal(a, b)
        assert a.requires_grad
        assert a.shape == norm.mean.shape
    for (scale, shift), n in zip(batch_norm.fold(given, dtype), given):
        exact = n.weight.double() / (n.var.double() + n.eps).sqrt()
        torch.testing.assert_close(scale.double(), exact)
        torch.testing.assert_close(shift.double(), n.bias.double() - n.mean.double() * exact)


@pytest.mark.parametrize("count", [1, 3])
def test_gradients(count):
    given = norms((3, 5, 4)[:count], (1e-5, 1e-3, 0.1)[:count])
    affine = [t for n in given for t in (n.weight, n.bias)]

    def run(*affine):
        pairs = zip(affine[::2], affine[1::2])
        return flat([n._replace(weight=w, bias=b) for n, (w, b) in zip(given, pairs)])

    assert torch.autograd.gradcheck(run, affine)
    assert torch.autograd.gradgradcheck(run, affine)


def test_who_has_no_gradient():
    first, second = given = norms((3, 5), (1e-5, 1e-5))
    given[1] = second._replace(weight=second.weight.detach())
    (scale, _), (_, other_shift) = batch_norm.fold(given, torch.float64)
    (scale.sum() + other_shift.sum()).backward()
    assert torch.equal(first.weight.grad, torch.rsqrt(first.var + 1e-5))
    assert first.bias.grad.tolist() == [0.0] * 3
    assert second.bias.grad.tolist() == [1.0] * 5
    assert second.weight.grad is None


def test_nothing_has_a_gradient_where_nothing_depends_on_it():
    """DDP looks for parameters that no feature in use depends on."""
    [norm] = norms((3,), (1e-5,))
    [(scale, shift)] = batch_norm.fold([norm], torch.float64)
    again = norm.weight * 2

    class Ignores(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b, c):
            return c.clone()

        @staticmethod
        def backward(ctx, g):
            return None, None, g

    Ignores.apply(scale, shift, again).sum().backward()
    assert norm.weight.grad.tolist() == [2.0] * 3
    assert norm.bias.grad is None


@pytest.mark.parametrize(
    "change",
    [
        dict(conv_bias=torch.randn(3, dtype=torch.float64, requires_grad=True)),
        dict(weight=None),
        dict(bias=None),
        dict(weight=torch.randn(3, requires_grad=True)),
        dict(mean=torch.randn(3, dtype=torch.float64, requires_grad=True)),
    ],
    ids=["bias of the convolution", "no gamma", "no beta", "other dtype", "trained mean"],
)
def test_other_norms_are_folded_by_pytorch_s_functions(change):
    [norm] = norms((3,), (1e-5,))
    norm = norm._replace(**change)
    pair = flat([norm])
    assert not any("_Fold" in type(t.grad_fn).__name__ for t in pair)
    sum(t.sum() for t in pair).backward()
    assert all(t.grad is not None for t in norm if isinstance(t, torch.Tensor) and t.requires_grad)


def test_under_transforms():
    conv, norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4).eval()

    def total(weight):
        found = ops.fold(
            conv.weight, None, weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
        )
        return found.scale.sum() + found.shift.sum()

    weight = torch.rand(4)
    expected = torch.func.grad(total)(weight)
    assert torch.allclose(torch.func.vmap(torch.func.grad(total))(weight[None])[0], expected)
