"""Gradients of ops and of whole networks on the Triton kernels.

In this folder, because the Triton backend runs in the interpreter here.
"""

import copy

import pytest
import torch
from torch import nn

from tests import straight_line
from tests.tiny import TINY
from vovnet_fast import VoVNet, backends, ops
from vovnet_fast.compat import zip
from vovnet_fast.network.blocks import OSABlock
from vovnet_fast.ops.chain import conv_chain
from vovnet_fast.ops.osa import osa_block_with_statistics


@pytest.fixture(autouse=True)
def _triton():
    if torch.cuda.is_available():
        pytest.skip("CPU tensors, for the interpreter; test_device.py has the GPU")
    with backends.use_backend("triton"):
        yield


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def layer(c_in, c_out, kernel=3, *, stride=1, depthwise=False, eps=None):
    weight = (randn(c_out, kernel, kernel, c_in) / c_in**0.5).detach().requires_grad_()
    taps = randn(3, 3, c_in) if depthwise else None
    scale = torch.rand(c_out, dtype=torch.float64).requires_grad_()
    return ops.ConvParams(weight, scale, randn(c_out), stride, taps, eps)


every_mode = pytest.mark.parametrize(
    "fast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fast", "entry by entry"]
)
"""gradcheck of a random projection of the Jacobian, or, for nightly runs, of all of it."""


def gradcheck(call, inputs, *, fast_mode):
    """torch's own; the fast one takes all inputs as one, which takes two passes for all of them.

    Otherwise it would take two for each.
    """
    if not fast_mode:
        return torch.autograd.gradcheck(call, inputs)
    sizes = [t.numel() for t in inputs]

    def joined(flat):
        parts = zip(flat.split(sizes), inputs, strict=True)
        return call(*(part.view(t.shape) for part, t in parts))

    flat = torch.cat([t.detach().reshape(-1) for t in inputs]).requires_grad_()
    return torch.autograd.gradcheck(joined, flat, fast_mode=True)


LAYERS = {
    "3x3": dict(),
    "1x1": dict(kernel=1),
    "stride 2": dict(stride=2),
    "depthwise": dict(kernel=1, depthwise=True),
    "depthwise stride 2": dict(kernel=1, depthwise=True, stride=2),
    "batch statistics": dict(eps=1e-5),
}


@every_mode
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_layers(options, fast):
    params = layer(5, 12 if fast else 4, **options)
    tensors = [t for t in params if isinstance(t, torch.Tensor)]
    depthwise = params.depthwise is not None

    def call(x, *tensors):
        taps = tensors[3] if depthwise else None
        return ops.conv_bn_relu(x, params._replace(depthwise=taps)._replace(
            weight=tensors[0], scale=tensors[1], shift=tensors[2]
        ))  # fmt: skip

    x = randn(2, 5, 5, 4) if fast else randn(2, 5, 3, 2)
    assert gradcheck(call, (x, *tensors), fast_mode=fast)


@every_mode
@pytest.mark.parametrize("eps", [None, 1e-5], ids=["fixed", "batch"])
def test_chains(eps, fast):
    width = 8 if fast else 2
    layers = [layer(3, width, stride=2, eps=eps), layer(width, width, eps=eps), layer(width, 16)]

    def call(x, *weights):
        replaced = [p._replace(weight=w) for p, w in zip(layers, weights, strict=True)]
        return conv_chain(x, replaced)[0][1:]

    weights = [p.weight for p in layers]
    assert gradcheck(call, (randn(1, 3, 7, 6), *weights), fast_mode=fast)


@every_mode
@pytest.mark.parametrize("mode", ["ceil", "padded"])
def test_max_pool(mode, fast):
    x = randn(2, 12 if fast else 4, 5, 6)
    assert gradcheck(lambda x: ops.max_pool(x, mode), (x,), fast_mode=fast)


@every_mode
@pytest.mark.parametrize("kind", ["hard_sigmoid", "sigmoid"])
def test_ese(kind, fast):
    c = 12 if fast else 4
    inputs = (randn(2, c, 4, 3), randn(c, c), randn(c), randn(2, c, 4, 3))
    call = lambda x, w, b, y: ops.ese(x, w, b, kind, y)  # noqa: E731
    assert gradcheck(call, inputs, fast_mode=fast)


def block(
    width=8, *, reduction=False, depthwise=False, eps=(None, None, None), gate=True, identity=True
):
    """Two layers of ``width`` channels between twice as many."""
    c_in = c_out = 2 * width
    options = dict(kernel=1, depthwise=True) if depthwise else {}
    fc = [randn(c_out, c_out), randn(c_out)] if gate else [None, None]
    first = layer(width if reduction else c_in, width, eps=eps[0], **options)
    return ops.BlockParams(
        (first, layer(width, width, **options)),
        layer(c_in + 2 * width, c_out, 1, eps=eps[1]),
        layer(c_in, width, 1, eps=eps[2]) if reduction else None,
        *fc,
        "hard_sigmoid",
        identity,
    )


BLOCKS = {
    "fixed statistics": dict(),
    "no gate": dict(gate=False),
    "plain": dict(gate=False, identity=False),
    "reduced depthwise": dict(reduction=True, depthwise=True),
    "batch statistics": dict(eps=(1e-5, 1e-5, None)),
    "one of the batch, reduced": dict(reduction=True, eps=(None, None, 1e-5)),
}


def check_block(options, *, size=(3, 4), recompute=False, **check):
    params = block(**options)
    tensors = [t for p in params.convs() for t in p if isinstance(t, torch.Tensor)]
    tensors += params.fcs()

    def call(x, *tensors):
        rest = iter(tensors)

        def take(p):
            return ops.ConvParams(*(next(rest) if isinstance(t, torch.Tensor) else t for t in p))

        reduction = None if params.reduction is None else take(params.reduction)
        layers = tuple(take(p) for p in params.layers)
        concat, fcs = take(params.concat), [*rest] or [None, None]
        replaced = ops.BlockParams(layers, concat, reduction, *fcs, *params[5:])
        return osa_block_with_statistics(x, replaced, recompute=recompute)[0]

    x = randn(1, params.concat.weight.shape[0], *size)
    assert gradcheck(call, (x, *tensors), **check)


@every_mode
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS.keys())
def test_blocks(options, fast):
    if fast:
        check_block(options, fast_mode=True)
    else:  # As small as blocks can be: every weight takes two forward passes.
        check_block(dict(options, width=2), size=(2, 3), fast_mode=False)


def test_recomputed_blocks():
    check_block(BLOCKS["batch statistics"], recompute=True, fast_mode=True)


def network(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return straight_line.randomise(VoVNet(TINY[name], **options)).to(dtype).train()


def step(model, x, backend="triton"):
    with backends.use_backend(backend):
        features = model(x)
        sum((f * f).mean() for f in features).backward()
    return features


@pytest.mark.parametrize("norm_eval", [True, False], ids=["fixed", "batch"])
@pytest.mark.parametrize("name", list(TINY))
def test_networks(name, norm_eval):
    """Against plain modules in fp64: features, gradients, running statistics."""
    ours = network(name, norm_eval=norm_eval)
    eager = copy.deepcopy(ours)
    x = torch.randn(1 if norm_eval else 2, 3, 33, 36, dtype=torch.float64)
    expected = step(eager, x, "reference")
    for a, b in zip(step(ours, x), expected, strict=True):
        torch.testing.assert_close(a, b)
    for (key, p), q in zip(eager.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, k=key: f"{k}: {m}")
    for (key, p), q in zip(eager.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_eager(dtype):
    """Gradients' error against fp64 at most twice that of eager in the same dtype."""
    x = torch.randn(1, 3, 36, 40, dtype=torch.float64)
    exact = network("detectron2")
    step(exact, x, "reference")
    errors = []
    for backend in ("triton", "reference"):
        model = network("detectron2", dtype)
        step(model, x.to(dtype), backend)
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        errors.append(sum((p.grad.double() - q.grad).norm() / q.grad.norm() for p, q in pairs))
    assert 0 < errors[0] <= 2 * errors[1]


def test_all_blocks_are_of_the_fused_kind():
    """Nothing here would be tested if modules ran on plain PyTorch."""
    model = network("detectron2")
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    for block in (m for m in model.modules() if isinstance(m, OSABlock)):
        assert block.decide(x).op
    assert type(model(x)[0].grad_fn).__name__ == "BlockBackward"


def test_a_backward_pass_stays_on_the_backend_of_its_forward(monkeypatch):
    """Autograd runs it in threads of its own, where use_backend does not hold."""
    ran = []
    module = backends._module("triton")
    for name in ("conv_weight_grad", "max_pool_backward"):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, f=function, n=name, **kw: ran.append(n) or f(*a, **kw)
        )
    model = nn.Sequential(network("detectron2"))
    features = model(torch.randn(1, 3, 33, 33, dtype=torch.float64))
    with backends.use_backend("reference"):
        sum(f.sum() for f in features).backward()
    assert {"conv_weight_grad", "max_pool_backward"} == set(ran)


def test_five_steps_follow_the_reference():
    """The loss curve of a tiny network that learns, on the kernels and on plain PyTorch."""
    curves = []
    for backend in ("triton", "reference"):
        model = network("detectron2", norm_eval=False, out_features=("stage2",))
        head = nn.Linear(16, 3).double()
        optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], 0.3, 0.9)
        curve = []
        for seed in range(5):
            torch.manual_seed(seed)
            labels = torch.arange(3)
            images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
            with backends.use_backend(backend):
                [feature] = model(images * (1 + labels[:, None, None, None]))
                logits = head(feature.mean((2, 3)))
                loss = nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[1][-1] < 0.9 * curves[1][0]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-6, atol=1e-7)
