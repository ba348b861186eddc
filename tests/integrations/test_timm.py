"""timm's names with ``_fast``: what timm's own networks compute, through all of timm's doors."""

import contextlib
import copy
import re

import pytest
import torch
from torch import nn

from tests import straight_line
from tests.fused import fused
from vovnet_fast import _optional, freeze, specs, use_backend
from vovnet_fast.checkpoints import CheckpointError
from vovnet_fast.compat import zip

_reason = _optional.why_not("timm")
if _reason is not None:
    pytest.skip(_reason, allow_module_level=True)

import timm  # noqa: E402
import timm.data  # noqa: E402
import timm.optim  # noqa: E402

from vovnet_fast.timm import NAMES  # noqa: E402

pytestmark = pytest.mark.versions

SMALL = "ese_vovnet19b_slim_dw"
DEEP = "ese_vovnet39b"  # Of several blocks a stage.


@pytest.fixture(autouse=True)
def plain():
    torch.manual_seed(0)
    with use_backend("reference"):
        yield


def theirs(name, **options):
    model = timm.create_model(name, **options)
    return straight_line.randomise(model).double().eval()


def ours(name, source=None, **options):
    model = timm.create_model(f"{name}_fast", **options).double().eval()
    if source is not None:
        model.load_state_dict(source.state_dict())
    return model


def images(*shape):
    return torch.randn(shape or (2, 3, 64, 96), dtype=torch.float64)


# --------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------


def test_every_name_of_timms_is_there():
    own = {f"{name}_fast" for name in specs.names("timm")}
    assert set(NAMES) == own
    assert own <= set(timm.list_models("*vovnet*_fast"))
    assert all(timm.is_model(name) for name in own)
    left = {n for n in timm.list_models("*vovnet*") if f"{n}_fast" not in own} - own
    assert left <= {"eca_vovnet39b", "ese_vovnet39b_evos"}  # Another attention, other norms.


def test_a_dot_would_choose_weights():
    """Why the names do not end in ``.fast``."""
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(fast\) for ese_vovnet39b"):
        timm.create_model(f"{DEEP}.fast")
    model = timm.create_model(f"{SMALL}_fast.untrained")
    assert model.pretrained_cfg["tag"] == "untrained"


def test_weights_are_timms():
    """The same configurations in the same order of tags, and every address as it was."""
    for name in specs.names("timm"):
        fast, own = (timm.models.get_pretrained_cfg(n) for n in (f"{name}_fast", name))
        assert fast.architecture == f"{name}_fast"
        for field in ("tag", "url", "hf_hub_id", "input_size", "crop_pct", "mean", "num_classes"):
            assert getattr(fast, field) == getattr(own, field), field
        pretrained = timm.models.is_model_pretrained(name)
        assert timm.models.is_model_pretrained(f"{name}_fast") == pretrained
    assert "ese_vovnet39b_fast.ra_in1k" in timm.list_pretrained("ese_vovnet39b_fast*")


# --------------------------------------------------------------------------------------
# The function
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", specs.names("timm"))
def test_equals_timms_own(name):
    """Logits, pooled features and all five feature maps, in fp64: not one bit differs."""
    net = theirs(name, num_classes=7)
    model = ours(name, net, num_classes=7)
    x = images(1, 3, 65, 70)
    backbone = timm.create_model(f"{name}_fast", features_only=True).double().eval()
    found = backbone.load_state_dict(net.state_dict(), strict=False)
    assert set(found.unexpected_keys) == {"head.fc.weight", "head.fc.bias"}
    assert not found.missing_keys
    with torch.no_grad():
        logits, maps = net(x), net.forward_features(x)
        assert logits.std() > 0
        assert torch.equal(model(x), logits)
        assert torch.equal(model.forward_features(x), maps)
        pooled = net.forward_head(maps, pre_logits=True)
        assert torch.equal(model.forward_head(maps, pre_logits=True), pooled)
        expected, y = [net.stem[:2](x)], net.stem(x)
        for stage in net.stages:
            y = stage(y)
            expected.append(y)
        features = backbone(x)
    assert type(features) is list
    for a, b in zip(features, expected, strict=True):
        assert torch.equal(a, b)
    listed = timm.create_model(name, features_only=True)
    for what in ("channels", "reduction"):
        assert getattr(backbone.feature_info, what)() == getattr(listed.feature_info, what)()
    assert backbone.feature_info.channels() == [f.shape[1] for f in features]


@pytest.mark.parametrize("name", [SMALL, "vovnet39a"])
def test_gradients_are_timms(name):
    """In training: norms of the batch, every parameter, running statistics."""
    net = theirs(name, num_classes=5)
    model = ours(name, net, num_classes=5)
    x = images()
    for network in (net, model):
        network.train()
        network(x).square().mean().backward()
    for key, value in model.timm_state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[key], rtol=1e-9, atol=1e-9)
    for p in model.parameters():
        p.data = p.grad  # To see gradients under timm's names.
    found = model.timm_state_dict()
    for key, p in net.named_parameters():
        torch.testing.assert_close(found[key], p.grad, rtol=1e-6, atol=1e-6 * p.grad.abs().max())


def test_ops_run_it():
    """The fused path, in training and in inference, against plain modules."""
    net = ours(SMALL, theirs(SMALL, num_classes=5), num_classes=5)
    model, x, found = copy.deepcopy(net), images(), []
    for network, path in ((net, contextlib.nullcontext()), (model, fused())):
        with path:
            assert network.backbone.stem.decide(x).op == (network is model)
            network.train()(x).square().mean().backward()
            with torch.no_grad():
                logits = network.eval()(x)
        found.append((logits, [p.grad for p in network.parameters()], list(network.buffers())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [dict(global_pool="catavgmax"), dict(global_pool="max")])
def test_pools(options):
    net = theirs(SMALL, num_classes=3, **options)
    model = ours(SMALL, net, num_classes=3, **options)
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), net(x))
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape[1] == model.head_hidden_size


def test_no_classifier_and_a_new_one():
    net = theirs(SMALL)
    x = images()
    for make in (lambda: ours(SMALL, num_classes=0, global_pool=""), lambda: ours(SMALL, net)):
        model = make()
        model.reset_classifier(0, "")
        assert model.num_classes == 0
        assert isinstance(model.get_classifier(), nn.Identity)
        model.load_state_dict(net.state_dict(), strict=False)
        with torch.no_grad():
            assert torch.equal(model(x), net.forward_features(x))
        model.reset_classifier(11, "avg")
        assert model.num_classes == 11
        assert model.get_classifier() is model.head.fc
        assert model.get_classifier().weight.dtype == torch.float64
        assert model(x).shape == (2, 11)


def test_dropout():
    model, maps = ours(SMALL, drop_rate=0.5, num_classes=0), torch.ones(2, 512, 2, 3)
    assert model.drop_rate == 0.5
    assert (model.forward_head(maps) == 1).all()
    dropped = (model.train().forward_head(maps) == 0).double().mean()
    assert 0.3 < dropped < 0.7


# --------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "taken"),
    [((4, 1), (1, 4)), ((-1,), (4,)), (2, (3, 4)), ((0, -3), (0, 2)), ((0,), (0,))],
)
def test_indices(given, taken):
    model = timm.create_model(f"{SMALL}_fast", features_only=True, out_indices=given)
    features = model.double().eval()(images())
    assert model.out_indices == taken
    channels, strides = (64, 112, 256, 384, 512), (2, 4, 8, 16, 32)
    assert model.feature_info.channels() == [channels[i] for i in taken]
    assert model.feature_info.reduction() == [strides[i] for i in taken]
    assert [tuple(f.shape) for f in features] == [
        (2, channels[i], 64 // strides[i], 96 // strides[i]) for i in taken
    ]
    model.train()
    sum(f.sum() for f in model(images())).backward()
    for name, p in model.named_parameters():  # As DDP wants it.
        assert p.requires_grad == (p.grad is not None), name
    names = [name for name, _ in timm.create_model(f"{SMALL}_fast").named_modules()]
    assert set(model.feature_info.module_name()) <= set(names)


def test_intermediates():
    net, x = theirs(DEEP), images(1, 3, 64, 64)
    model = ours(DEEP, net)
    with torch.no_grad():
        last, features = model.forward_intermediates(x, indices=[1, 3])
        assert torch.equal(last, net.forward_features(x))
        assert [f.shape[1] for f in features] == [256, 768]
        two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert torch.equal(two[1], last)
        assert torch.equal(two[0], features[1])
        if hasattr(net, "forward_intermediates"):
            _, expected = net.forward_intermediates(x)
            for a, b in zip(model.forward_intermediates(x)[1], expected, strict=True):
                assert torch.equal(a, b)
    assert model(x).shape == (1, 1000)  # It is as it was.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(output_stride=16), ValueError, "output_stride=32 alone, got 16"),
        (dict(drop_path_rate=0.1), ValueError, "drop_path_rate=0 alone, got 0.1"),
        (dict(norm_layer="gn", act_layer="gelu"), TypeError, "no act_layer, norm_layer: timm's"),
        (dict(features_only=True, out_indices=(0, 5)), ValueError, r"0 to 4, .*got \(0, 5\)"),
        (dict(features_only=True, out_indices=(1, -4)), ValueError, "each once"),
        (dict(features_only=True, feature_cls="hook"), ValueError, "takes no feature_cls"),
    ],
)
def test_what_it_has_not_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(f"{SMALL}_fast", **options)


# --------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------


def test_pretrained_weights(tmp_path):
    """Through timm's own loading, as from its hub: whole files, for other classes and features."""
    net = theirs(SMALL).float()
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    x = images().float()
    model = timm.create_model(f"{SMALL}_fast", **overlay).eval()
    features = timm.create_model(f"{SMALL}_fast", features_only=True, **overlay).eval()
    with torch.no_grad():
        expected = net.forward_features(x)
        assert torch.equal(model(x), net(x))
        assert torch.equal(features(x)[-1], expected)
        few = timm.create_model(f"{SMALL}_fast", num_classes=5, **overlay).eval()
        assert torch.equal(few.forward_features(x), expected)
        assert few(x).shape == (2, 5)
        gray = dict(in_chans=1, **overlay)
        a, b = (timm.create_model(n, **gray).eval() for n in (f"{SMALL}_fast", SMALL))
        assert torch.equal(a(x[:, :1]), b(x[:, :1]))
    state = net.state_dict()
    del state["stages.3.blocks.0.conv_concat.bn.running_var"]
    torch.save(state, path)
    for options in ({}, dict(num_classes=5)):
        with pytest.raises(CheckpointError, match="1 parameters left unfilled: stage5"):
            timm.create_model(f"{SMALL}_fast", **overlay, **options)


def test_files_of_torch_hub_are_of_another_function(tmp_path):
    path = tmp_path / "vovnet39_torchvision.pth"
    torch.save(straight_line.build("V-39").state_dict(), path)
    with pytest.raises(CheckpointError, match="cannot be read as vovnet39a"):
        timm.create_model(
            "vovnet39a_fast", pretrained=True, pretrained_cfg_overlay=dict(file=str(path))
        )


def test_files_go_both_ways(tmp_path):
    net, x = theirs(DEEP, num_classes=4).float(), images(1, 3, 64, 64).float()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "timm.pth")
    model = timm.create_model(
        f"{DEEP}_fast", num_classes=4, checkpoint_path=str(tmp_path / "timm.pth")
    ).eval()
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    again = timm.create_model(
        f"{DEEP}_fast", num_classes=4, checkpoint_path=str(tmp_path / "ours.pth")
    ).eval()
    back = timm.create_model(DEEP, num_classes=4).eval()
    back.load_state_dict(model.timm_state_dict())
    inside = nn.ModuleDict({"module": timm.create_model(f"{DEEP}_fast", num_classes=4)}).eval()
    inside.load_state_dict({f"module.{key}": value for key, value in net.state_dict().items()})
    with torch.no_grad():
        for other in (model, again, back, inside["module"]):
            assert torch.equal(other(x), net(x))


def test_what_does_not_fit_changes_nothing():
    model = ours(SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = theirs(SMALL).state_dict()
    state["stages.0.blocks.0.conv_concat.conv.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"backbone\.stage2.*is \[3, 3\]"):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --------------------------------------------------------------------------------------
# What else timm does with its networks
# --------------------------------------------------------------------------------------


def test_groups_and_checkpointing():
    model = ours(DEEP, num_classes=3)
    groups = []
    for network in (model, theirs(DEEP, num_classes=3)):  # Learning rates by layer.
        optimizer = timm.optim.create_optimizer_v2(
            network, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8
        )
        groups.append(
            sorted(
                (g["lr_scale"], g["weight_decay"], sum(p.numel() for p in g["params"]))
                for g in optimizer.param_groups
            )
        )
    assert groups[0] == groups[1]
    assert len(groups[0]) == 16
    patterns = model.group_matcher(coarse=True).values()
    for name, _ in model.named_parameters():
        assert name.startswith("head.") or any(re.match(p, name) for p in patterns)
    features = timm.create_model(f"{SMALL}_fast", features_only=True)
    for network in (model, features):
        for enable in (True, False):
            network.set_grad_checkpointing(enable)
            assert all(b.with_cp == enable for b in network.backbone._blocks())


def test_images_are_prepared_as_timms_are():
    """The README's way to look at what a classifier says."""
    image = pytest.importorskip("PIL.Image").new("RGB", (300, 260), (200, 30, 60))
    net = theirs(SMALL).float()
    model = ours(SMALL, net.double()).float()
    net.float()
    configs = [timm.data.resolve_model_data_config(m) for m in (model, net)]
    assert configs[0] == configs[1]
    batch = timm.data.create_transform(**configs[0])(image)[None]
    with torch.no_grad():
        top, expected = (m(batch).softmax(1).topk(5) for m in (model, net))
    assert torch.equal(top.indices, expected.indices)
    assert torch.equal(top.values, expected.values)


def test_a_frozen_backbone_takes_the_backbones_place():
    model, x = ours(SMALL), images()
    with torch.no_grad():
        expected = model(x)
        model.backbone = freeze(model.backbone)
        torch.testing.assert_close(model(x), expected)
