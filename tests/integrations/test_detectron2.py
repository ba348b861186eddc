"""The builders for detectron2, against it where it is installed and otherwise its interface."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import straight_line
from tests.integrations import detectron2_double
from vovnet_fast import VoVNet, checkpoints
from vovnet_fast.checkpoints import CheckpointError
from vovnet_fast.compat import zip
from vovnet_fast.network.norms import FrozenBatchNorm2d
from vovnet_fast.specs import UnknownSpecError
from vovnet_fast.tools import cli

ROOT = Path(__file__).parents[2]
NAME = "V-19-slim-dw-eSE"
OURS = ("vovnet_fast.detectron2", "vovnet_fast.integrations.detectron2")


@pytest.fixture(scope="module")
def ours():
    """``vovnet_fast.detectron2``, and detectron2 only as long as the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        if not detectron2_double.installed():
            for name, module in detectron2_double.modules().items():
                patch.setitem(sys.modules, name, module)
        for name in OURS:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(OURS[0])
        for name in OURS:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def d2(ours):
    class D2:
        backbone = importlib.import_module("detectron2.modeling.backbone")
        CfgNode = importlib.import_module("detectron2.config").CfgNode
        ShapeSpec = importlib.import_module("detectron2.layers").ShapeSpec

    return D2


@pytest.fixture
def config(ours, d2):
    """As CenterMask2's: detectron2's keys, FCOS's, and vovnet-detectron2's."""

    def node(**values):
        cfg = d2.CfgNode()
        for key, value in values.items():
            cfg[key] = value
        return cfg

    fpn = dict(OUT_CHANNELS=8, NORM="", FUSE_TYPE="sum")
    cfg = node(
        MODEL=node(
            BACKBONE=node(FREEZE_AT=0, NAME="build_vovnet_fast_backbone"),
            FPN=node(IN_FEATURES=["stage3", "stage4", "stage5"], **fpn),
            FCOS=node(TOP_LEVELS=2),
        )
    )
    ours.add_vovnet_config(cfg)
    cfg.MODEL.VOVNET.CONV_BODY = NAME
    cfg.MODEL.VOVNET.OUT_FEATURES = ["stage3", "stage4", "stage5"]
    # DD3D's.
    cfg.FE = node(
        BACKBONE=node(NAME=NAME, OUT_FEATURES=["stage2", "stage3", "stage4", "stage5"], NORM="BN"),
        FPN=node(IN_FEATURES=["stage3", "stage4", "stage5"], **fpn),
    )
    return cfg


@pytest.fixture
def build(d2):
    def build(cfg, name=None, channels=3):
        builder = d2.backbone.BACKBONE_REGISTRY.get(name or cfg.MODEL.BACKBONE.NAME)
        torch.manual_seed(0)
        return builder(cfg, d2.ShapeSpec(channels=channels))

    return build


def images(channels=3):
    torch.manual_seed(1)
    return torch.randn(2, channels, 64, 96)


def norms(module):
    return [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]


def test_the_defaults_are_the_originals(ours, d2):
    cfg = d2.CfgNode()
    cfg.MODEL = d2.CfgNode()
    ours.add_vovnet_config(cfg)
    assert dict(cfg.MODEL.VOVNET) == {
        "CONV_BODY": "V-39-eSE",
        "OUT_FEATURES": ["stage2", "stage3", "stage4", "stage5"],
        "NORM": "FrozenBN",
        "OUT_CHANNELS": 256,
        "BACKBONE_OUT_CHANNELS": 256,
        "WITH_CP": False,
    }
    cfg.MODEL.VOVNET.NORM = "SyncBN"
    cfg.MODEL.VOVNET.pop("WITH_CP")
    ours.add_vovnet_config(cfg)  # In AdelaiDet the keys are there already.
    assert cfg.MODEL.VOVNET.NORM == "SyncBN"
    assert cfg.MODEL.VOVNET.WITH_CP is False


def test_the_backbone(ours, d2, config, build):
    config.MODEL.VOVNET.OUT_FEATURES = ["stage5", "stem", "stage3"]
    backbone = build(config)
    assert isinstance(backbone, d2.backbone.Backbone)
    assert isinstance(backbone, (VoVNet, ours.VoVNetFast))
    shapes = backbone.output_shape()
    assert all(type(shape) is d2.ShapeSpec for shape in shapes.values())
    found = {name: (shape.channels, shape.stride) for name, shape in shapes.items()}
    assert found == {"stem": (64, 4), "stage3": (256, 8), "stage5": (512, 32)}
    assert backbone.size_divisibility == 0
    assert backbone.padding_constraints == {}
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 97, 131))
    assert list(features) == ["stem", "stage3", "stage5"]
    assert [tuple(f.shape[1:]) for f in features.values()] == [
        (64, 25, 33),
        (256, 12, 16),
        (512, 3, 4),
    ]


def test_features_are_those_of_the_weights(config, build):
    net = straight_line.build(NAME)
    backbone = build(config).eval()
    checkpoints.load(backbone, net.state_dict())
    with torch.no_grad():
        features, expected = backbone(images()), net(images())[-3:]
    for name, theirs in zip(("stage3", "stage4", "stage5"), expected, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(features[name], theirs, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("FrozenBN", FrozenBatchNorm2d),
        ("GN", nn.GroupNorm),
    ],
)
@pytest.mark.parametrize("freeze_at", [-1, 0, 1, 2, 5])
def test_norms_and_freezing(config, build, norm, kind, freeze_at):
    """From FREEZE_AT 1 on the originals turn every norm of the network into a frozen one."""
    config.MODEL.VOVNET.NORM = norm
    config.MODEL.BACKBONE.FREEZE_AT = freeze_at
    if norm == "GN":
        config.MODEL.VOVNET.CONV_BODY = "V-19-eSE"
    backbone = build(config).train()
    if freeze_at > 0 and norm != "GN":
        kind = FrozenBatchNorm2d
    layer = backbone.stage5.OSA5_1.concat._modules["OSA5_1_concat/norm"]
    assert type(layer) is kind
    assert all(m.training for m in norms(backbone))
    parts = [backbone.stem, *(getattr(backbone, f"stage{i}") for i in range(2, 6))]
    for i, part in enumerate(parts):
        assert {p.requires_grad for p in part.parameters()} == {i >= freeze_at}


def test_keys_are_the_originals(config, build):
    config.MODEL.VOVNET.NORM = "FrozenBN"
    fpn = build(config, "build_fcos_vovnet_fast_fpn_backbone")
    net = straight_line.build(NAME).state_dict()
    expected = {f"bottom_up.{k}" for k in net if not k.endswith("num_batches_tracked")}
    keys = set(fpn.state_dict())
    assert {k for k in keys if k.startswith("bottom_up.")} == expected
    assert "bottom_up.stem.stem_1/conv.weight" in keys
    assert {"fpn_lateral5.weight", "top_block.p6.weight", "top_block.p7.bias"} <= keys


@pytest.mark.parametrize(
    ("builder", "levels", "top_levels", "divisibility"),
    [
        ("build_vovnet_fast_fpn_backbone", "p3 p4 p5 p6", None, 32),
        ("build_retinanet_vovnet_fast_fpn_backbone", "p3 p4 p5 p6 p7", None, 32),
        ("build_fcos_vovnet_fast_fpn_backbone", "p3 p4 p5", 0, 32),
        ("build_fcos_vovnet_fast_fpn_backbone", "p3 p4 p5 p6", 1, 32),
        ("build_fcos_vovnet_fast_fpn_backbone", "p3 p4 p5 p6 p7", 2, 32),
        ("build_fcos_vovnet_fast_fpn_backbone_p6", "p3 p4 p5 p6", None, 64),
    ],
)
def test_pyramids(config, build, builder, levels, top_levels, divisibility):
    if top_levels is not None:
        config.MODEL.FCOS.TOP_LEVELS = top_levels
    config.MODEL.VOVNET.NORM = "BN"
    fpn = build(config, builder).train()
    assert fpn.size_divisibility == divisibility
    found = fpn(torch.randn(2, 3, 128, 64))
    assert list(found) == levels.split()
    for name, level in found.items():
        stride = 2 ** int(name[1])
        assert level.shape == (2, 8, max(128 // stride, 1), max(64 // stride, 1))
    sum(level.square().mean() for level in found.values()).backward()
    assert all(p.grad is not None for p in fpn.parameters())


def test_dd3d_freezes_nothing(config, build):
    config.MODEL.BACKBONE.FREEZE_AT = 2
    fpn = build(config, "build_fcos_vovnet_fast_fpn_backbone_p6")
    assert all(p.requires_grad for p in fpn.parameters())
    assert norms(fpn)


def test_other_images_and_checkpointing(config, build):
    config.MODEL.VOVNET.NORM = "BN"
    config.MODEL.VOVNET.WITH_CP = True
    backbone = build(config, channels=4).train()
    assert all(block.with_cp for block in backbone.stage5.children())
    sum(f.mean() for f in backbone(images(4)).values()).backward()


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("STAGE_WITH_DCN", (False, False, True, True), ValueError, "deformable convolutions"),
        ("NORM", "naiveSyncBN", ValueError, r"NORM must be one of BN, SyncBN.*'naiveSyncBN'"),
        ("NORM", "", ValueError, "NORM must be one of"),
        ("CONV_BODY", "V-40-eSE", UnknownSpecError, "V-39-eSE"),
        ("OUT_FEATURES", ["res5"], ValueError, "res5"),
    ],
)
def test_what_cannot_be_built_is_named(config, build, key, value, error, words):
    config.MODEL.VOVNET[key] = value
    with pytest.raises(error, match=words):
        build(config)


def test_numbers_that_cannot_be(config, build):
    config.MODEL.VOVNET["STAGE_WITH_DCN"] = (False, False, False, False)  # AdelaiDet's default.
    build(config)
    config.MODEL.BACKBONE.FREEZE_AT = 6
    with pytest.raises(ValueError, match=r"FREEZE_AT must be 0 .* up to 5 .*got 6"):
        build(config)
    config.MODEL.FCOS.TOP_LEVELS = 3
    with pytest.raises(ValueError, match="TOP_LEVELS must be 0, 1 or 2, got 3"):
        build(config, "build_fcos_vovnet_fast_fpn_backbone")


# --------------------------------------------------------------------------------------
# Checkpoints of models
# --------------------------------------------------------------------------------------


class Model(nn.Module):
    """What detectron2 calls a meta architecture."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(8, 2, 1)


@pytest.mark.parametrize("ending", ["pth", "pkl"])
def test_published_files_of_models(config, build, tmp_path, ending):
    """As detectron2's checkpointer loads them: names that are missing are only printed there."""
    net = straight_line.build(NAME).state_dict()
    state = {f"backbone.bottom_up.{k}": v for k, v in net.items() if "num_batches" not in k}
    path = tmp_path / f"model_final.{ending}"
    if ending == "pth":
        torch.save({"model": state, "optimizer": {}, "scheduler": {}, "iteration": 9}, path)
    else:
        arrays = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    model = Model(build(config, "build_fcos_vovnet_fast_fpn_backbone"))
    model.load_state_dict(checkpoints.read(path), strict=False)
    own = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(v, net[k]) for k, v in own.items())
    assert checkpoints.load(model.backbone.bottom_up, path).prefix == "backbone.bottom_up."


def test_a_file_of_a_backbone_alone_does_not_pass_in_silence(config, build, tmp_path):
    """Which detectron2 loads into nothing unless its address asks for matching."""
    net = straight_line.build(NAME).state_dict()
    model = Model(build(config, "build_vovnet_fast_fpn_backbone"))
    with pytest.raises(CheckpointError, match="matching_heuristics=True") as caught:
        model.load_state_dict(net, strict=False)
    said = str(caught.value)
    assert "no key like 'backbone.bottom_up.stem.stem_1/conv.weight'" in said
    assert "--add-prefix backbone.bottom_up." in said
    torch.save(net, tmp_path / "bare.pth")
    out = tmp_path / "whole.pth"
    words = ["convert", str(tmp_path / "bare.pth"), str(out), "--spec", NAME]
    assert cli.main([*words, "--add-prefix", "backbone.bottom_up."]) == 0
    model.load_state_dict(torch.load(out), strict=False)
    own = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(v, net[k]) for k, v in own.items())
    partial = {k: v for k, v in model.state_dict().items() if ".stage5." not in k}
    with pytest.raises(CheckpointError, match="another architecture"):
        model.load_state_dict(partial, strict=False)


def test_without_detectron2_it_says_what_to_do():
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "try: import vovnet_fast.detectron2\n"
        "except ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "vovnet_fast.detectron2 needs detectron2" in done.stdout
    assert "pip install --no-build-isolation" in done.stdout
