"""Hooks, modes and transforms see the network as if it had no fused path, or an error says why."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from tests.fused import asked_for, fused
from tests.tiny import TINY
from vovnet_fast import VoVNet, compat, freeze, ops, reference, use_backend
from vovnet_fast.backends import BackendError
from vovnet_fast.compat import zip
from vovnet_fast.ops.chain import conv_chain

DOUBLE = torch.float64


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VoVNet(TINY["detectron2"]).to(DOUBLE)


@pytest.fixture
def x():
    return torch.randn(2, 3, 40, 40, dtype=DOUBLE)


def plain(run):
    with use_backend("reference"):
        return run()


def total(features):
    return sum((feature * feature).sum() for feature in features)


def assert_same(a, b):
    flat_a, flat_b = (torch.utils._pytree.tree_flatten(t)[0] for t in (a, b))
    assert len(flat_a) == len(flat_b)
    for one, other in zip(flat_a, flat_b, strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_of_all_modules_see_every_one(model, x):
    seen = []
    handles = (
        nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m)),
        nn.modules.module.register_module_forward_pre_hook(lambda m, _: seen.append(m)),
    )
    try:
        with fused():
            model(x)
        with asked_for(), pytest.raises(BackendError, match="hooks of all modules"):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    called = [m for m in model.modules() if not isinstance(m, nn.ModuleList)]
    assert {id(m) for m in seen} == {id(m) for m in called}
    with fused():
        seen.clear()
        model(x)
    assert not seen


def test_a_module_tracker_sees_every_one(model, x):
    seen = set()

    class Note(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.update(tracker.parents)
            return func(*args, **(kwargs or {}))

    tracking = pytest.importorskip("torch.utils.module_tracker", reason="torch 2.2 has none")
    with fused(), tracking.ModuleTracker() as tracker, Note():
        model(x)
    assert any("OSA3_2_0/conv" in name for name in seen)


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_are_those_of_plain_pytorch(model, x):
    expected = plain(lambda: flops(lambda: model(x)))
    training = plain(lambda: flops(lambda: total(model(x)).backward()))
    with fused():
        assert flops(lambda: model(x)) == expected
        assert flops(lambda: total(model(x)).backward()) == training
        frozen, images = freeze(model), x
        assert flops(lambda: frozen(images)) == expected
    assert expected > 1e6


@pytest.mark.skipif(compat.TORCH < (2, 4), reason="a counter of FLOP that knows its own ops alone")
@pytest.mark.parametrize("spec", ["detectron2", "seed"])
def test_flops_of_ops(spec, x):
    """Whatever backend was asked for, by name."""
    torch.manual_seed(0)
    model = VoVNet(TINY[spec]).to(DOUBLE).train()
    block = list(model.stage3.children())[1]
    y = torch.randn(2, 24, 5, 5, dtype=DOUBLE, requires_grad=True)
    expected = plain(lambda: flops(lambda: block(y)))
    both = plain(lambda: flops(lambda: total([block(y)]).backward()))
    stem = plain(lambda: flops(lambda: total(model.stem(x)).backward()))
    images = plain(lambda: flops(lambda: model(x)))
    with asked_for():
        assert flops(lambda: ops.osa_block(y.detach(), block.fold(DOUBLE))) == expected
        found = flops(lambda: total([ops.osa_block(y, block.fold(DOUBLE))]).backward())
        assert found == both
        layers = model.stem.fold(DOUBLE)
        assert flops(lambda: total(conv_chain(x, layers)[0][1:]).backward()) == stem
        frozen = freeze(model.eval())
        assert flops(lambda: frozen(x)) == images


def test_tangents_are_not_lost(model, x):
    model.eval().requires_grad_(False)
    tangent = torch.randn_like(x)

    def tangents(net):
        with forward_ad.dual_level():
            found = net(forward_ad.make_dual(x, tangent))
            return [forward_ad.unpack_dual(y).tangent for y in found]

    expected = plain(lambda: tangents(model))
    assert all(t is not None and t.abs().sum() > 0 for t in expected)
    with fused():
        assert_same(tangents(model), expected)
        assert_same(tangents(freeze(model)), expected)
    with asked_for(), pytest.raises(BackendError, match="forward-mode AD"):
        tangents(model)


def test_transforms_of_functions(model, x):
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p, image):
        return total(functional_call(model, p, (image[None],)))

    per_sample = vmap(grad(loss), in_dims=(None, 0))
    expected = plain(lambda: per_sample(parameters, x))
    pushed = plain(lambda: jvp(model, (x,), (torch.ones_like(x),)))
    mapped = plain(lambda: vmap(model)(x[:, None]))
    with fused():
        assert_same(per_sample(parameters, x), expected)
        assert_same(jvp(model, (x,), (torch.ones_like(x),)), pushed)
        assert_same(vmap(model)(x[:, None]), mapped)
        assert_same(vmap(freeze(model))(x[:, None]), mapped)
    with asked_for(), pytest.raises(BackendError, match=r"transforms of torch\.func"):
        vmap(model)(x[:, None])


MAPS = pytest.mark.skipif(compat.TORCH < (2, 5), reason="how an op is mapped cannot be said")


@MAPS
@pytest.mark.parametrize("norm_eval", [True, False])
def test_batched_gradients(norm_eval, x):
    torch.manual_seed(0)
    model = VoVNet(TINY["depthwise"], norm_eval=norm_eval).to(DOUBLE)
    twin = copy.deepcopy(model)

    def gradients(net):
        [y, *_] = net(x)
        torch.manual_seed(1)
        douts = torch.randn(3, *y.shape, dtype=DOUBLE)
        parameters = [p for p in net.parameters() if p.requires_grad]
        return torch.autograd.grad(y, parameters, douts, is_grads_batched=True, allow_unused=True)

    expected = plain(lambda: gradients(twin))
    with fused():
        found = gradients(model)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@MAPS
def test_gradients_under_vmap(model, x):
    """As ``is_grads_batched``, by the transform of torch.func around ``torch.autograd.grad``."""
    parameters = list(model.parameters())
    fc = torch.randn(8, 8, dtype=DOUBLE, requires_grad=True)
    z = torch.randn(1, 8, 4, 4, dtype=DOUBLE, requires_grad=True)

    def each(y, inputs):
        torch.manual_seed(1)
        pull = lambda g: torch.autograd.grad(y, inputs, g, retain_graph=True)  # noqa: E731
        return vmap(pull)(torch.randn(3, *y.shape, dtype=DOUBLE))

    bias = torch.zeros(8, dtype=DOUBLE)
    expected = plain(lambda: each(model(x)[-1], parameters))
    gated = each(reference.ese(z, fc[:, :, None, None], bias), (z, fc))
    with fused():
        assert_same(each(model(x)[-1], parameters), expected)
        assert_same(each(ops.ese(z, fc, bias), (z, fc)), gated)


def test_a_trace_holds_no_constants(model, x):
    model.eval().requires_grad_(False)
    other = torch.randn_like(x)
    expected = plain(lambda: model(other))
    with fused():
        for net in (model, freeze(model)):
            assert_same(torch.jit.trace(net, x, check_trace=False)(other), expected)
            assert_same(make_fx(net)(x)(other), expected)


def test_ops_refuse_what_they_would_drop(x):
    weight, bias = torch.randn(3, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    layer = ops.fold(torch.randn(3, 3, 3, 3, dtype=DOUBLE), None, None, None, bias, bias**2, 1e-5)
    calls = {
        "ese": lambda x: ops.ese(x, weight, bias),
        "max_pool": ops.max_pool,
        "conv_bn_relu": lambda x: ops.conv_bn_relu(x, layer),
    }
    for name, call in calls.items():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match=f"{name} has no rule for forward-mode"):
                call(dual)
            call(x)  # Nothing is dropped here.
        with pytest.raises(NotImplementedError, match=rf"{name} has no rule for .* torch\.func"):
            vmap(call)(x[:, None])


def test_gates_are_called_as_modules(model, x):
    """Whatever is in the place of ``fc``, FSDP's or a quantised one."""
    gate = next(model.stage3.children()).ese
    called = []
    gate.fc.register_forward_hook(lambda *_: called.append(1))
    features = torch.randn(1, 24, 5, 5, dtype=DOUBLE)
    y = gate(features)
    assert called == [1]
    torch.testing.assert_close(y, reference.ese(features, gate.fc.weight, gate.fc.bias))


def test_a_subclass_of_tensor_sees_plain_functions(model, x):
    seen = []

    class Noted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    expected = plain(lambda: model(x))
    with fused():
        found = model(x.as_subclass(Noted))
    assert torch.nn.functional.relu in seen
    assert_same([y.as_subclass(torch.Tensor) for y in found], list(expected))


def test_every_subset_of_features_leaves_what_eager_leaves(x):
    """A parameter on which no feature in use depends has no gradient, not one of zeros."""
    names = ("stem_2", "stem", "stage2", "stage3")
    for wanted in (names[:1], names[:2], names[1:3], names):
        for used in range(len(wanted)):
            grads = []
            for context in (fused(), use_backend("reference")):
                torch.manual_seed(0)
                model = VoVNet(TINY["detectron2"], out_features=wanted).to(DOUBLE)
                with context:
                    total([model(x)[used]]).backward()
                grads.append({n: p.grad for n, p in model.named_parameters()})
            for name, expected in grads[1].items():
                assert (grads[0][name] is None) == (expected is None), (wanted, used, name)
                if expected is not None:
                    torch.testing.assert_close(grads[0][name], expected)


def test_a_chain_of_layers_leaves_none_as_well(x):
    torch.manual_seed(0)
    model = VoVNet(TINY["detectron2"]).to(DOUBLE)
    with fused():
        second, _ = model.stem(x)
        total([second]).backward()
    grads = {name: p.grad is not None for name, p in model.stem.named_parameters()}
    assert grads == {name: not name.startswith("stem_3") for name in grads}


def test_instances_with_a_forward_of_their_own_are_called_as_such(model, x):
    """As wrappers do that stream parameters in: they know ``forward(x)`` alone."""
    stem, block = model.stem, next(model.stage3.children())
    for module in (stem, block):
        original = module.forward
        module.forward = types.MethodType(lambda self, x, o=original: o(x), module)
    expected = plain(lambda: model(x))
    with fused():
        assert_same(model(x), expected)
