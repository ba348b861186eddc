"""What is kept about modules is never older than they are."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from tests.fused import fused
from tests.tiny import TINY
from vovnet_fast import VoVNet, backends
from vovnet_fast.compat import zip
from vovnet_fast.network import decision, structure


def block_of(model):
    return next(model.stage4.children())


def conv_of(model):
    return block_of(model).layers[0]._modules["OSA4_1_0/conv"]


def norm_of(model):
    return block_of(model).layers[0]._modules["OSA4_1_0/norm"]


def replace_conv(model):
    class Other(nn.Conv2d):
        pass

    old = conv_of(model)
    block_of(model).layers[0]._modules["OSA4_1_0/conv"] = Other(
        old.in_channels, old.out_channels, 3, padding=1, bias=False
    )


def replace_norm(model):
    norm = norm_of(model)
    block_of(model).layers[0]._modules["OSA4_1_0/norm"] = nn.GroupNorm(1, norm.num_features)


CHANGES = {
    "a hook on a convolution": lambda model: conv_of(model).register_forward_hook(print),
    "a hook on a layer": lambda model: block_of(model).layers[0].register_forward_pre_hook(print),
    "another convolution": replace_conv,
    "another norm": replace_norm,
    "another class": lambda model: setattr(
        conv_of(model), "__class__", type("Conv", (nn.Conv2d,), {})
    ),
    "a norm that trains": lambda model: norm_of(model).train(),
    "a norm without statistics": lambda model: setattr(norm_of(model), "running_mean", None),
    "a parametrised weight": lambda model: nn.utils.parametrizations.weight_norm(conv_of(model)),
    "a gate that is wrapped": lambda model: setattr(
        block_of(model).ese, "fc", nn.Sequential(block_of(model).ese.fc)
    ),
}


@pytest.fixture
def model():
    return VoVNet(TINY["detectron2"]).eval()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(model, change):
    block = block_of(model)
    before = block.structure()
    assert before == (block.kinds, None)
    assert model.why_not_one_op() is None
    undo = change(model)
    after = block.structure()
    assert after == block._structure() != before
    assert model.why_not_one_op() == model._why_not_one_op() is not None
    if hasattr(undo, "remove"):
        undo.remove()
        assert block.structure() == before


def test_another_block_is_noticed(model):
    model.why_not_one_op()
    [(name, block)] = list(model.stage4.named_children())
    model.stage4._modules[name] = nn.Sequential(block)
    reason = f"stage4.{name}: the fused path knows OSABlock, not Sequential"
    assert model.why_not_one_op() == reason


def test_what_has_not_changed_is_not_found_out_again(model, monkeypatch):
    block, asked = block_of(model), []
    monkeypatch.setattr(
        type(block), "why_not_fused", lambda self: asked.append(self) and None, raising=True
    )
    for _ in range(3):
        block.structure()
    assert asked == [block]
    model.train()
    model.eval()
    block.structure()
    assert asked == [block]
    twin = copy.deepcopy(block)
    twin.structure()
    assert asked == [block, twin]


def test_nothing_is_kept_alive():
    model = VoVNet(TINY["detectron2"])
    block_of(model).structure()
    model.why_not_one_op()
    assert model in structure._kept
    gone = weakref.ref(model), weakref.ref(block_of(model))
    del model
    gc.collect()
    assert [found() for found in gone] == [None, None]


def test_a_decision_says_why():
    assert str(decision.OP) == "an op"
    assert str(decision.SMALL).startswith("modules: on maps as small as these")


@pytest.mark.parametrize("norm_eval", [True, False])
def test_no_images_are_what_plain_pytorch_makes_of_them(norm_eval):
    """A rank of a data-parallel training can be left without any."""
    x = torch.zeros(0, 3, 40, 40)
    model = VoVNet(TINY["detectron2"], norm_eval=norm_eval).train()
    twin = copy.deepcopy(model)
    with backends.use_backend("reference"):
        expected = twin(x)
        sum(y.sum() for y in expected).backward()
    with fused():
        found = model(x)
        sum(y.sum() for y in found).backward()
    assert [y.shape for y in found] == [y.shape for y in expected]
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, equal_nan=True, msg=name)
