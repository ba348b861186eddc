"""What people reported about VoVNet in their detectors, each made again from tensors of our own."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv.ops", exc_type=Exception)
pytest.importorskip("mmdet.registry", exc_type=Exception)

from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint

import vovnet_fast.mmdet  # noqa: F401  (registers VoVNetFast)
from tests import straight_line
from vovnet_fast import checkpoints
from vovnet_fast.checkpoints import CheckpointError
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
