"""No kernel is given a pointer of a tensor that has no memory, whatever modes are active."""

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.extension_cases import require
from tests.tiny import TINY
from vovnet_fast import VoVNet, freeze, use_backend
from vovnet_fast.backends import _extension, conv_sm90, cpu
from vovnet_fast.backends._extension import fields
from vovnet_fast.backends.cpu import convolution, packing
from vovnet_fast.compat import zip

SHAPE = (1, 2, 2, 8)


@pytest.fixture(autouse=True)
def _built():
    require("cpu")
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------
# Tensors without memory
# --------------------------------------------------------------------------------------


def on_meta(use, x):
    use(x.to("meta"))


def fake(use, x):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        use(mode.from_tensor(x))


def left_over(use, x):
    """Made within the mode, used after it."""
    use(FakeTensorMode().from_tensor(x))


def batched(use, x):
    torch.func.vmap(lambda each: use(each) or each)(torch.stack((x, x)))


def differentiated(use, x):
    torch.func.grad(lambda each: use(each) or each.sum())(x)


def sparse(use, x):
    use(x.to_sparse())


def resized(use, x):
    x.untyped_storage().resize_(0)
    use(x)


def functional(use, x):
    torch.func.functionalize(lambda each: use(each) or each)(x)


ALL = [on_meta, fake, left_over, batched, differentiated, sparse, resized, functional]
without_memory = pytest.mark.parametrize("given", ALL)


@without_memory
def test_every_kind_of_field_is_refused(given):
    ordinary = torch.rand(SHAPE)
    uses = {
        "view": lambda x: fields.view("x", x, ordinary, *SHAPE),
        "packed": lambda x: fields.packed("x", x, torch.float32, *SHAPE),
        "array": lambda x: fields.array("x", x, *SHAPE),
        "pointer": lambda x: fields.pointer("x", x),
        "sm90": lambda x: conv_sm90._view("x", x),
    }
    for use in uses.values():
        with pytest.raises(TypeError, match="x must be a plain tensor, with memory"):
            given(use, torch.rand(SHAPE))


@without_memory
def test_every_other_pointer_is_refused(given):
    """Those that are not fields of images: filters in any layout, weights to pack."""
    ops, filters = _extension.CPU, torch.rand(8, 3, 3, 8)
    uses = [
        ("weight", lambda x: ops.pack(x, None, torch.empty(8, 3, 3, 8))),
        ("weight", lambda x: ops.pack_transposed(x, None, torch.empty(8, 3, 3, 8))),
        ("products", lambda x: ops.pack_backward(x, filters, None)),
        *(("weight", lambda x, e=e: packing.pack(e, x)) for e in convolution.engines()),
    ]
    for name, use in uses:
        with pytest.raises((TypeError, RuntimeError)) as caught:
            given(lambda x, use=use: use(x) and None, filters.clone())
        if given in (on_meta, fake, left_over, resized):
            assert caught.type is TypeError
            assert "must be a plain tensor" in str(caught.value), name


def test_a_tensor_without_elements_has_no_address():
    assert fields.pointer("x", torch.empty(0)) == 0
    assert fields.view("x", torch.empty(0, 2, 2, 8), torch.empty(0), 0, 2, 2, 8)[0] == 0


def test_a_parameter_and_a_view_have_one():
    x = torch.rand(SHAPE)
    assert fields.pointer("x", torch.nn.Parameter(x)) == x.data_ptr()
    assert fields.pointer("x", x[..., 4:]) == x.data_ptr() + 16


# --------------------------------------------------------------------------------------
# Another default device
# --------------------------------------------------------------------------------------


@pytest.fixture(params=["mode", "default"])
def meta_default(request):
    """New tensors lie on the meta device, unless somebody says where."""
    if request.param == "mode":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def step(model, x):
    """Features, and gradients where there are any."""
    found = list(model(x))
    if torch.is_grad_enabled():
        sum(feature.square().mean() for feature in found).backward()
        found += [p.grad for p in model.parameters() if p.grad is not None]
    return [each.detach().clone() for each in found]


MODEL, IMAGE = VoVNet(TINY["detectron2"]), torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
def test_results_do_not_depend_on_the_default_device(mode, meta_default, request):
    with torch.device("cpu"):
        model = copy.deepcopy(MODEL).train(mode == "train")
        expected_of = copy.deepcopy(model)
        if mode == "frozen":
            model, expected_of = freeze(model), freeze(expected_of)
        with use_backend("cpu"), torch.set_grad_enabled(mode == "train"):
            expected = [step(expected_of, IMAGE) for _ in range(3)]
    with use_backend("cpu"), torch.set_grad_enabled(mode == "train"):
        found = [step(model, IMAGE) for _ in range(3)]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours.device.type == "cpu"
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(found[2], expected[2], strict=True):  # From a recording, if frozen.
        torch.testing.assert_close(ours, theirs)


def test_the_cpu_backend_says_which_tensor():
    x = torch.empty(SHAPE, device="meta")
    with pytest.raises(TypeError, match=r"x must be a plain tensor, .* meta"):
        cpu.max_pool(x, x, "padded")
