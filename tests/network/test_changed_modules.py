"""A module that was changed after it was built computes what it says now, or an error says why."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.fused import asked_for, fused, needs_traces
from tests.tiny import FIRST, TINY
from vovnet_fast import VoVNet, freeze, ops, use_backend
from vovnet_fast.backends import BackendError
from vovnet_fast.compat import zip
from vovnet_fast.network import decision
from vovnet_fast.network.blocks import OSABlock
from vovnet_fast.network.layers import ESE, ConvNormReLU


def block_of(model):
    return model.stage3._modules["OSA3_2"]


def layer_of(model):
    return block_of(model).layers[0]


def conv_of(model):
    return layer_of(model)._modules["OSA3_2_0/conv"]


def norm_of(model):
    return layer_of(model)._modules["OSA3_2_0/norm"]


def with_attributes(find, **values):
    def change(model):
        for name, value in values.items():
            setattr(find(model), name, value)

    return change


def with_own_forward(find):
    def change(model):
        module = find(model)
        original = module.forward
        module.forward = types.MethodType(lambda self, *a, **k: doubled(original(*a, **k)), module)

    return change


def doubled(outputs):
    return tuple(2 * y for y in outputs) if isinstance(outputs, tuple) else 2 * outputs


def as_subclass(find):
    """Of a class that overrides ``forward`` with the signature that is public."""

    def change(model):
        module = find(model)
        cls = type(module)
        forward = lambda self, x: doubled(cls.forward(self, x))  # noqa: E731
        module.__class__ = type(f"My{cls.__name__}", (cls,), {"forward": forward})

    return change


def in_place_of(find_owner, name, make):
    def change(model):
        owner = find_owner(model)
        owner._modules[name] = make(owner._modules[name])

    return change


class LowRank(nn.Module):
    """What a LoRA makes of a convolution."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False).to(base.weight)

    def forward(self, x):
        return self.base(x) + self.down(x).mean(1, keepdim=True)


def weight_twice(model):
    conv = conv_of(model)
    conv.weight = nn.Parameter(conv.weight.detach().repeat(1, 1, 1, 1) * 2)


def narrow(model):
    """Structured pruning: the last layer of a block and what reads it lose channels."""
    block = block_of(model)
    last, concat = block.layers[1], block.concat
    conv, norm = last._modules["OSA3_2_1/conv"], last._modules["OSA3_2_1/norm"]
    mix = concat._modules["OSA3_2_concat/conv"]
    conv.weight = nn.Parameter(conv.weight[:5].detach().clone())
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(getattr(norm, name)[:5].detach().clone()))
    norm.running_mean, norm.running_var = norm.running_mean[:5], norm.running_var[:5]
    mix.weight = nn.Parameter(mix.weight[:, :-3].detach().clone())


class Wrapped(torch.Tensor):
    """What a quantisation puts in the place of a weight."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [a.as_subclass(torch.Tensor) * 3 if isinstance(a, Wrapped) else a for a in args]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def wrapped_weight(model):
    conv = conv_of(model)
    weight = conv.weight.detach()
    del conv._parameters["weight"]
    conv.weight = weight.as_subclass(Wrapped)


COUNTED = []


def pre_hook(module, args):
    COUNTED.append(type(module).__name__)
    return tuple(a + 1 for a in args)


CHANGES = {
    "padding": with_attributes(lambda m: m.stem._modules["stem_3/conv"], padding=(2, 2)),
    "dilation": with_attributes(conv_of, dilation=(2, 2), padding=(2, 2)),
    "padding as a number": with_attributes(conv_of, padding=1),
    "circular padding": lambda m: (
        setattr(conv_of(m), "padding_mode", "circular")
        or setattr(conv_of(m), "_reversed_padding_repeated_twice", [1, 1, 1, 1])
    ),
    "groups": lambda m: (
        setattr(conv_of(m), "groups", 2)
        or setattr(conv_of(m), "weight", nn.Parameter(conv_of(m).weight[:, :12].detach().clone()))
    ),
    "stride of the stem": lambda m: setattr(m.stem._modules["stem_2/conv"], "stride", (2, 2)),
    "strides that differ": lambda m: setattr(m.stem._modules["stem_1/conv"], "stride", (2, 1)),
    "eps": with_attributes(norm_of, eps=0.5),
    "a forward of a convolution": with_own_forward(conv_of),
    "a forward of a norm": with_own_forward(norm_of),
    "a forward of a layer": with_own_forward(layer_of),
    "a forward of a gate": with_own_forward(lambda m: block_of(m).ese),
    "a forward of a gate's fc": with_own_forward(lambda m: block_of(m).ese.fc),
    "a forward of a block": with_own_forward(block_of),
    "a forward of a stage": with_own_forward(lambda m: m.stage3),
    "a forward of the stem": with_own_forward(lambda m: m.stem),
    "another class of block": as_subclass(block_of),
    "another class of gate": as_subclass(lambda m: block_of(m).ese),
    "another class of layer": as_subclass(layer_of),
    "another class of stage": as_subclass(lambda m: m.stage3),
    "another class of stem": as_subclass(lambda m: m.stem),
    "another class of convolution": as_subclass(conv_of),
    "no gate": lambda m: setattr(block_of(m), "ese", None),
    "an identity for a gate": lambda m: setattr(block_of(m), "ese", nn.Identity()),
    "another nonlinearity": lambda m: setattr(block_of(m).ese, "gate", "sigmoid"),
    "an fc without bias": lambda m: setattr(block_of(m).ese.fc, "bias", None),
    "no pool": lambda m: setattr(m.stage3, "pool", None),
    "another pool": lambda m: setattr(m.stage3, "pool", "padded"),
    "a block in a row": in_place_of(lambda m: m.stage3, "OSA3_2", nn.Sequential),
    "a layer in a row": lambda m: setattr(
        block_of(m), "layers", nn.ModuleList([nn.Sequential(x) for x in block_of(m).layers])
    ),
    "a stage in a row": in_place_of(lambda m: m, "stage3", nn.Sequential),
    "one block more": lambda m: m.stage3.add_module("more", nn.ReLU6()),
    "one block less": lambda m: m.stage3._modules.popitem(),
    "a low-rank convolution": in_place_of(layer_of, "OSA3_2_0/conv", LowRank),
    "a low-rank gate": in_place_of(lambda m: block_of(m).ese, "fc", LowRank),
    "no norm": in_place_of(layer_of, "OSA3_2_0/norm", lambda _: nn.Identity()),
    "spectral norm": lambda m: parametrizations.spectral_norm(conv_of(m)),
    "weight norm of a gate": lambda m: parametrizations.weight_norm(block_of(m).ese.fc),
    "weight norm of old": lambda m: nn.utils.weight_norm(conv_of(m)),
    "pruned": lambda m: prune.l1_unstructured(conv_of(m), "weight", amount=0.5),
    "narrowed": narrow,
    "another weight": weight_twice,
    "a wrapped weight": wrapped_weight,
    "a hook of a convolution": lambda m: conv_of(m).register_forward_pre_hook(pre_hook),
    "a hook of a gate's fc": lambda m: block_of(m).ese.fc.register_forward_pre_hook(pre_hook),
    "a hook of a block": lambda m: block_of(m).register_forward_pre_hook(pre_hook),
    "a hook with keywords": lambda m: block_of(m).register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + len(kwargs) + 1,), kwargs), with_kwargs=True
    ),
    "a hook of a stage": lambda m: m.stage3.register_forward_hook(lambda *a: a[-1] + 1),
    "a hook of the stem": lambda m: m.stem.register_forward_hook(lambda *a: doubled(a[-1])),
}

FOLLOWED = {"eps", "another weight"}
"""What ops compute as well."""

IN_BLOCKS = {
    "no gate",
    "another nonlinearity",
    *(name for name in CHANGES if name.endswith(("of a block", "of a stage", "of the stem"))),
    *("no pool", "another pool", "a hook with keywords", "a block in a row", "a stage in a row"),
    *("one block more", "one block less", "another class of stage", "another class of stem"),
    *("another class of block",),
}
"""What a whole network as one op does not compute, and ops of its parts do."""


def outputs_of(model, x):
    return [y.detach().clone() for y in model(x)]


@pytest.fixture
def fused_everywhere(monkeypatch):
    """Without it maps are too small here for anything but plain modules."""
    monkeypatch.setattr(decision, "CPU_PIXELS", 0)
    monkeypatch.setattr(decision, "CPU_PIXELS_TRAINING", 0)
    monkeypatch.setattr(decision, "_said", set())


def changed(name, seed=0, **options):
    torch.manual_seed(seed)
    model = VoVNet(TINY["detectron2"], **options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    if name is not None:
        CHANGES[name](model)
    return model


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_what_runs_is_what_the_modules_are(name, training, fused_everywhere):
    model, x = changed(name), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = changed(None)
    with torch.set_grad_enabled(training):
        with fused():
            outputs_of(before, x)
            CHANGES[name](before)  # After it has run: answers are kept.
            found, later = outputs_of(model, x), outputs_of(before, x)
        with use_backend("reference"):
            expected = outputs_of(model, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    if "spectral" not in name:  # Its vectors are drawn at random.
        for a, b in zip(later, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted(set(CHANGES) - FOLLOWED))
def test_freeze_refuses_and_names_the_module(name):
    with pytest.raises(BackendError, match=r"^freeze: (OSA3_2|stage3|stem)\S*: "):
        freeze(changed(name))


@pytest.mark.parametrize("name", sorted(FOLLOWED))
def test_freeze_follows(name):
    model, x = changed(name), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(freeze(model)(x), model(x), strict=True):
        torch.testing.assert_close(a, b)


def test_freeze_refuses_a_model_that_does_something_else():
    model = changed(None)
    model.register_forward_hook(lambda *a: a[-1])
    with pytest.raises(BackendError, match="the model has hooks, which would be lost"):
        freeze(model)

    class Mine(VoVNet):
        def forward(self, x):
            return super().forward(x / 255)

    with pytest.raises(BackendError, match="this Mine has a forward of its own"):
        freeze(Mine(TINY["detectron2"]))


def test_a_backend_that_was_asked_for_says_what_it_cannot(fused_everywhere):
    model, x = changed("dilation"), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with (
        asked_for(),
        pytest.raises(BackendError, match=r"OSA3_2_0/conv: .*\(1, 1\)"),
    ):
        model(x)


def test_it_is_said_once(fused_everywhere, caplog):
    model, x = changed("a low-rank convolution"), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with fused():
        for _ in range(3):
            model(x)
    [message] = [r.getMessage() for r in caplog.records]
    assert message.startswith("OSA3_2_0/conv: the fused path knows Conv2d, not LowRank")
    assert "plain PyTorch" in message


def test_a_replaced_method_of_a_class_is_noticed(fused_everywhere, monkeypatch):
    model, x = changed(None), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    hooked = copy.deepcopy(model)  # In which nothing is fused.
    for module in hooked.modules():
        if module is not hooked:
            module.register_forward_hook(lambda *_: None)
    with fused():
        for cls in (ConvNormReLU, ESE, OSABlock, nn.Conv2d, nn.BatchNorm2d):
            original = cls.forward
            outputs_of(model, x)
            with monkeypatch.context() as patch:
                patch.setattr(cls, "forward", lambda self, x, o=original: doubled(o(self, x)))
                found = outputs_of(model, x)
                expected = outputs_of(hooked, x)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_a_fused_block_is_fused(fused_everywhere):
    """Otherwise nothing here would show anything."""
    model, x = changed(None), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    called = []
    conv_of(model).forward = types.MethodType(
        lambda self, x: called.append(1) or F.conv2d(x, self.weight, padding=1), conv_of(model)
    )
    twin = copy.deepcopy(model)
    del conv_of(twin).forward
    with fused(), torch.no_grad():
        assert not model.decide(x).op
        assert twin.decide(x).op
        assert block_of(twin).decide(torch.randn(1, 24, 8, 8, dtype=torch.float64)).op
        model(x)
    assert called


@needs_traces
@pytest.mark.parametrize("name", ["a forward of a convolution", "dilation"])
def test_a_compiled_model_notices_as_well(name, monkeypatch):
    """But for hooks: torch.compile looks for those when it traces, of plain modules too."""
    model = changed(None, out_features=FIRST)
    x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager")
    ran = []
    run = ops.features
    monkeypatch.setattr(ops, "features", lambda *args: ran.append(1) or run(*args))
    with torch.no_grad():
        with fused():
            compiled(x)
            assert ran
            CHANGES[name](model)
            found = compiled(x)
        with use_backend("reference"):
            expected = model(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_forward_of_another_instance_is_one_of_its_own():
    model, x = changed(None), torch.randn(1, 3, 40, 40, dtype=torch.float64)
    first, second = (layer._modules[f"{layer.name}/norm"] for layer in block_of(model).layers)
    first.forward = second.forward
    with use_backend("reference"):
        expected = model(x)
    with fused():
        for a, b in zip(model(x), expected, strict=True):
            torch.testing.assert_close(a, b)
