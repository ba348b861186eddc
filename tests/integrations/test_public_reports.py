"""What people reported about VoVNet in their detectors, each made again from tensors of our own."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("mmcv.ops", exc_type=Exception)
pytest.importorskip("mmdet.registry", exc_type=Exception)

from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.model import BaseModel, BaseModule
from mmengine.optim import OptimWrapper
from mmengine.runner import load_checkpoint

import vovnet_fast.mmdet  # noqa: F401  (registers VoVNetFast)
from tests import straight_line
from vovnet_fast import checkpoints
from vovnet_fast.checkpoints import CheckpointError
from vovnet_fast.compat import zip
from vovnet_fast.tools import cli

register_all_modules()

NAME = "V-19-slim-dw-eSE"
LEVELS = ("stage4", "stage5")
CHANNELS = [384, 512]


@pytest.fixture(scope="module")
def net():
    return straight_line.build(NAME)


def backbone(**options):
    """As PETR's configs write it, but for the type."""
    return MODELS.build(
        dict(
            type="VoVNetFast",
            spec_name=NAME,
            norm_eval=True,
            frozen_stages=-1,
            input_ch=3,
            out_features=LEVELS,
            **options,
        )
    )


class Plain(nn.Module):
    """A detector of somebody's own."""

    def __init__(self, img_backbone):
        super().__init__()
        self.img_backbone = img_backbone
        self.img_neck = neck()
        self.pts_bbox_head = nn.Conv2d(8, 4, 1)


class Detector(BaseModel):
    """The image branch of PETR and its relatives, and a head of one layer."""

    def __init__(self, img_backbone):
        super().__init__()
        self.img_backbone = img_backbone
        self.img_neck = neck()
        self.pts_bbox_head = nn.Conv2d(8, 4, 1)

    def extract_feat(self, images):
        """Features of ``[B, cameras, 3, H, W]``."""
        return self.img_neck(self.img_backbone(images.flatten(0, 1)))

    def forward(self, images, mode="tensor"):
        features = self.extract_feat(images)
        if mode == "loss":
            return {"loss": sum(self.pts_bbox_head(f).square().mean() for f in features)}
        return features


def neck():
    torch.manual_seed(5)
    return MODELS.build(dict(type="FPN", in_channels=CHANNELS, out_channels=8, num_outs=2))


def same(module, net):
    state = net.state_dict()
    return all(
        torch.equal(v, state[k]) for k, v in module.state_dict().items() if "num_batches" not in k
    )


def images():
    torch.manual_seed(1)
    return torch.randn(1, 2, 3, 64, 96)


# --- A file of DD3D, whose backbone is under backbone.bottom_up., in "model" ----------------------


@pytest.fixture
def dd3d(net, tmp_path):
    state = {f"backbone.bottom_up.{k}": v for k, v in net.state_dict().items()}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    state["backbone.fpn_lateral5.weight"] = torch.zeros(256, 512, 1, 1)
    state["fcos3d_head.scales_depth.0.scale"] = torch.ones(1)
    torch.save({"model": state, "iteration": 9, "optimizer": {}}, tmp_path / "dd3d.pth")
    return tmp_path / "dd3d.pth"


@pytest.mark.parametrize("whole", [Plain, Detector])
@pytest.mark.parametrize("manner", ["init_cfg", "pretrained", "load", "convert"])
def test_dd3d_fills_an_image_backbone(net, tmp_path, dd3d, whole, manner):
    options = {
        "init_cfg": dict(init_cfg=dict(type="Pretrained", checkpoint=str(dd3d))),
        "pretrained": dict(pretrained=str(dd3d)),
    }.get(manner, {})
    detector = whole(backbone(**options))
    assert not same(detector.img_backbone, net)
    if manner == "load":
        assert checkpoints.load(detector.img_backbone, dd3d).prefix == "backbone.bottom_up."
    elif manner == "convert":
        out = tmp_path / "img_backbone.pth"
        words = ["convert", str(dd3d), str(out), "--spec", NAME, "--add-prefix", "img_backbone."]
        assert cli.main(words) == 0
        load_checkpoint(detector, str(out), map_location="cpu")
    else:
        (detector if whole is Detector else detector.img_backbone).init_weights()
    assert same(detector.img_backbone, net)


# --- What was given as load_from and fits no detector, of which nothing was said ------------------


def files(net, dd3d, tmp_path):
    """What people gave, and what is to be told of it."""
    bare = {k: v.clone() for k, v in net.state_dict().items()}
    timm = checkpoints.convert(bare, NAME, "timm", add_prefix="img_backbone.")
    resnet = {"img_backbone.layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    mine = {"img_backbone.module." + k: v for k, v in bare.items()}
    for name, content, words in (
        ("bare", {"state_dict": bare}, ""),
        ("timm", timm, r"under 'img_backbone\.' in timm keys, of ese_vovnet19b_slim_dw"),
        ("resnet", {"state_dict": resnet}, r"another network, 'img_backbone\.layer1\.0\.conv1"),
        ("deeper", {"state_dict": mine}, r"names begin with 'img_backbone\.module\.'"),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        yield tmp_path / f"{name}.pth", words
    yield dd3d, ""


def test_what_does_not_fill_the_backbone_is_refused(net, dd3d, tmp_path):
    detector = Detector(backbone())
    before = {k: v.clone() for k, v in detector.img_backbone.state_dict().items()}
    for path, words in files(net, dd3d, tmp_path):
        for prepare in (lambda: None, detector.init_weights):
            prepare()
            with pytest.raises(CheckpointError, match=words) as caught:
                load_checkpoint(detector, str(path), map_location="cpu")
            said = str(caught.value)
            tensors = sum(not key.endswith("num_batches_tracked") for key in before)
            assert f"nothing for the backbone {NAME}: of its {tensors} tensors none" in said
            assert "no key like 'img_backbone.stem.stem_1/conv.weight'" in said
            assert "init_cfg=dict(type='Pretrained', checkpoint=FILE)" in said
            assert "--add-prefix img_backbone." in said
    after = detector.img_backbone.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize("filled", ["init_cfg", "load", "random", "copy"])
def test_heads_alone_are_warned_about_where_the_backbone_is_filled(net, tmp_path, filled):
    checkpoints.write(net.state_dict(), tmp_path / "w.pth")
    cfgs = {
        "init_cfg": dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth")),
        "random": dict(type="Kaiming", layer="Conv2d"),
    }
    detector = Detector(backbone(init_cfg=cfgs.get(filled)))
    if filled in cfgs:
        detector.init_weights()
    else:
        checkpoints.load(detector.img_backbone, net.state_dict())
    if filled == "copy":
        detector = copy.deepcopy(detector)
    before = {k: v.clone() for k, v in detector.img_backbone.state_dict().items()}
    heads = {"pts_bbox_head.bias": torch.ones(4)}
    torch.save({"state_dict": heads}, tmp_path / "heads.pth")
    with pytest.warns(UserWarning, match="It keeps the weights that it has"):
        load_checkpoint(detector, str(tmp_path / "heads.pth"), map_location="cpu")
    assert detector.pts_bbox_head.bias.eq(1).all()
    assert all(torch.equal(v, before[k]) for k, v in detector.img_backbone.state_dict().items())


# --- detectron2's .pkl ----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_a_pickle_of_arrays_fills_an_image_backbone(net, tmp_path, prefix):
    arrays = {prefix + k: v.numpy() for k, v in net.state_dict().items() if "num_b" not in k}
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
    (tmp_path / "final.pkl").write_bytes(pickle.dumps(content))
    detector = Detector(backbone(pretrained=str(tmp_path / "final.pkl")))
    detector.init_weights()
    assert same(detector.img_backbone, net)


# --- A training that VoVNetCP began ---------------------------------------------------------------


class VoVNetCP(BaseModule):
    """As PETR's: every block under activation checkpointing, norms in evaluation mode."""

    def __init__(self, net):
        super().__init__()
        for name, child in net.named_children():
            self.add_module(name, child)
        self._net = [net]  # No child: the names are those of the parts.

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x):
        run = self._net[0]
        names = [f"stage{i}" for i in range(2, 6)]
        outputs = checkpoint(lambda x: run(x), x, use_reentrant=False)
        features = outputs[-len(names) :]
        return tuple(f for name, f in zip(names, features, strict=True) if name in LEVELS)


def step(detector, optimizer):
    detector.train()
    return detector.train_step({"images": images(), "mode": "loss"}, optimizer)


class Trained(Detector):
    def train_step(self, data, optim_wrapper):
        losses = self.parse_losses(self(**data))[0]
        optim_wrapper.update_params(losses)
        return float(losses.detach())


def wrapped(detector):
    sgd = torch.optim.SGD(detector.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-2)
    return OptimWrapper(sgd)


@pytest.mark.parametrize("with_cp", [True, False])
def test_a_training_of_vovnet_cp_is_resumed(net, tmp_path, with_cp):
    theirs = Trained(VoVNetCP(copy.deepcopy(net)))
    optimizer = wrapped(theirs)
    for _ in range(2):
        step(theirs, optimizer)
    content = dict(
        state_dict=theirs.state_dict(), optimizer=optimizer.state_dict(), meta=dict(epoch=1)
    )
    assert "img_backbone.stage5.OSA5_1.ese.fc.bias" in content["state_dict"]
    torch.save(content, tmp_path / "epoch_1.pth")

    ours = Trained(backbone(with_cp=with_cp))
    loaded = load_checkpoint(ours, str(tmp_path / "epoch_1.pth"), map_location="cpu", strict=True)
    resumed = wrapped(ours)
    resumed.load_state_dict(loaded["optimizer"])
    # Momentum is kept by the number of a parameter: the order must be the same.
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for model in (theirs, ours):
        model.eval()
    with torch.no_grad():
        for a, b in zip(ours(images()), theirs(images()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    losses = [step(theirs, optimizer), step(ours, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = float(b.abs().max()) or 1.0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale, msg=name)
