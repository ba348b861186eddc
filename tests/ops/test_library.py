"""vovnet_fast.ops._library: schemas from annotations, and autograd through lists of tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vovnet_fast import ops, use_backend
from vovnet_fast.ops import _library


@pytest.fixture(scope="module")
def scaled():
    """Every tensor times a number, and their sum; differentiable."""

    @_library.op("test_scaled")
    def op(
        x: Tensor | None, many: list[Tensor], some: Sequence[Tensor | None], factors: list[float],
        name: str, flag: bool,
    ) -> list[Tensor]:  # fmt: skip
        found = [t * f for t, f in zip(many, factors)]
        total = sum(t.sum() for t in [*found, *(s for s in some if s is not None)])
        return [*found, total if x is None else total + x.sum()]

    @op.register_fake
    def _(x, many, some, factors, name, flag):
        return [*map(torch.empty_like, many), many[0].new_empty(())]

    def setup(ctx, inputs, output):
        x, many, some, ctx.factors, *_ = inputs
        ctx.like = (x, many, some)
        ctx.set_materialize_grads(False)

    def backward(ctx, grads):
        *each, total = grads
        total = 0 if total is None else total
        x, many, some = ctx.like
        dmany = [
            (total + (0 if g is None else g)) * f * torch.ones_like(t)
            for g, f, t in zip(each, ctx.factors, many)
        ]
        dsome = [None if s is None else total * torch.ones_like(s) for s in some]
        return None if x is None else total * torch.ones_like(x), dmany, dsome, None, None, None

    op.register_autograd(backward, setup)
    return op


def test_the_schema_is_that_of_the_annotations(scaled):
    assert str(torch.ops.vovnet_fast.test_scaled.default._schema) == (
        "vovnet_fast::test_scaled(Tensor? x, Tensor[] many, Tensor?[] some, float[] factors, "
        "str name, bool flag) -> Tensor[]"
    )
    schema = str(torch.ops.vovnet_fast.max_pool_backward.default._schema)
    assert schema.startswith("vovnet_fast::max_pool_backward(Tensor dout, Tensor argmax, SymInt h")
    assert schema.endswith("-> Tensor")
    gradients = torch.ops.vovnet_fast.ese_backward.default._schema
    assert [str(r.type) for r in gradients.returns] == ["Tensor"] * 3


@pytest.mark.parametrize("with_x", [True, False])
def test_gradients_through_lists(scaled, with_x):
    tensors = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def run(x, a, b, c):
        return tuple(scaled(x if with_x else None, [a, b], [None, c], [2.0, -3.0], "n", True))

    assert torch.autograd.gradcheck(run, tensors, fast_mode=False) or not with_x


def test_nothing_is_kept_where_no_gradient_is_needed(scaled):
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        found = scaled(x, [x], [], [2.0], "n", True)
    assert isinstance(found, list)
    assert not any(t.requires_grad for t in found)


def test_it_is_one_node_of_a_graph(scaled):
    torch._dynamo.reset()
    a = torch.randn(3, requires_grad=True)
    compiled = torch.compile(
        lambda t: scaled(None, [t], [t], [2.0], "n", True)[1], backend="aot_eager", fullgraph=True
    )
    [found] = torch.autograd.grad(compiled(a), a)
    torch.testing.assert_close(found, torch.full((3,), 3.0))


def test_an_op_without_a_derivative_says_so():
    model = torch.randn(1, 3, 8, 8, requires_grad=True)

    @_library.op("test_plain")
    def plain(x: Tensor) -> Tensor:
        return x.clone()

    out = plain(model)
    with pytest.raises(NotImplementedError, match="vovnet_fast::test_plain has no derivative"):
        out.sum().backward()


def test_what_a_schema_cannot_say_is_refused():
    def run(x: dict[str, Tensor]) -> Tensor: ...

    with pytest.raises(KeyError, match="dict"):
        _library.Op("test_refused", run)


class Seen(TorchDispatchMode):
    """The names of all ops."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_who_looks_sees_the_ops_of_a_backward_pass():
    """Without anybody they are not called, and what they compute is."""
    x = torch.randn(1, 8, 6, 7, requires_grad=True)

    def gradient(look):
        with use_backend("reference"):
            out = ops.max_pool(x, "ceil")
        with look as looking:
            [found] = torch.autograd.grad(out.sum(), x)
        return found, looking

    alone, _ = gradient(contextlib.nullcontext())
    name = "vovnet_fast::max_pool_backward"
    found, mode = gradient(Seen())
    assert name in mode.names
    assert torch.equal(found, alone)
    found, profiler = gradient(torch.profiler.profile())
    assert name in {event.key for event in profiler.key_averages()}
    assert torch.equal(found, alone)
    with use_backend("reference"):
        out = ops.max_pool(x, "ceil")
    [found] = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert found.requires_grad
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        found.sum().backward()
