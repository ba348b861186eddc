"""How a detector's backbone gets its weights, through mmengine's own machinery."""

import pytest
import torch

pytest.importorskip("mmcv.ops", exc_type=Exception)
pytest.importorskip("mmdet.registry", exc_type=Exception)

from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner import load_checkpoint

import vovnet_fast.mmdet  # noqa: F401  (registers VoVNetFast)
from tests import straight_line
from vovnet_fast import checkpoints

register_all_modules()

NAME = "V-19-slim-dw-eSE"


@pytest.fixture(scope="module")
def net():
    return straight_line.build(NAME)


def same(backbone, net):
    state = net.state_dict()
    return all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())


def build(**options):
    return MODELS.build(dict(type="VoVNetFast", spec_name=NAME, **options))


@pytest.mark.parametrize("prefix", ["", "img_backbone."])
@pytest.mark.parametrize("layout", ["detectron2", "timm"])
def test_init_cfg(net, tmp_path, layout, prefix):
    state = checkpoints.convert(net.state_dict(), NAME, layout, add_prefix=prefix)
    checkpoints.write({**state, "head.weight": torch.zeros(1)}, tmp_path / "w.pth")
    for options in (
        dict(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth"))),
        dict(init_cfg=[dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth"), prefix=prefix)]),
        dict(init_cfg=dict(type=PretrainedInit, checkpoint=str(tmp_path / "w.pth"))),
        dict(pretrained=str(tmp_path / "w.pth")),
    ):
        backbone = build(**options)
        assert not same(backbone, net)
        backbone.init_weights()
        assert same(backbone, net)
        with torch.no_grad():
            next(backbone.parameters()).zero_()
        backbone.init_weights()  # Only the first call does anything.
        assert next(backbone.parameters()).abs().max() == 0


def test_init_cfg_inside_a_detector(net, tmp_path):
    """mmengine calls init_weights from the top; others initialise around the backbone."""
    checkpoints.write(net.state_dict(), tmp_path / "w.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth"))
    detector = MODELS.build(
        dict(
            type="RPN",
            backbone=dict(type="VoVNetFast", spec_name=NAME, init_cfg=init_cfg),
            neck=dict(type="FPN", in_channels=[112, 256, 384, 512], out_channels=16, num_outs=5),
            rpn_head=dict(type="RPNHead", in_channels=16, feat_channels=16),
            train_cfg=None,
            test_cfg=dict(rpn=dict()),
        )
    )
    detector.init_weights()
    assert same(detector.backbone, net)


def test_init_cfg_that_does_not_fit_is_an_error(tmp_path):
    checkpoints.write(straight_line.build("V-19-slim-eSE").state_dict(), tmp_path / "w.pth")
    backbone = build(pretrained=str(tmp_path / "w.pth"))
    with pytest.raises(checkpoints.CheckpointError, match="It fits V-19-slim-eSE"):
        backbone.init_weights()
    with pytest.raises(ValueError, match="pretrained and init_cfg"):
        build(pretrained="a", init_cfg=dict(type="Pretrained", checkpoint="a"))


def test_other_init_cfgs_are_mmengines():
    backbone = build(init_cfg=dict(type="Constant", layer="Conv2d", val=0.5, bias=0.25))
    backbone.init_weights()
    assert (backbone.first_weight == 0.5).all()


def test_a_whole_detectors_checkpoint(net, tmp_path):
    """load_from and resume go past init_cfg; a partial backbone must not slip through."""
    detector = torch.nn.ModuleDict({"backbone": build(), "head": torch.nn.Linear(2, 2)})
    state = {f"backbone.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "detector.pth")
    load_checkpoint(detector, str(tmp_path / "detector.pth"), map_location="cpu")
    assert same(detector["backbone"], net)
    state.pop("backbone.stage2.OSA2_1.ese.fc.bias")
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "detector.pth")
    with pytest.raises(checkpoints.CheckpointError, match=r"fills \d+ of the backbone's"):
        load_checkpoint(detector, str(tmp_path / "detector.pth"), map_location="cpu")
    with pytest.warns(UserWarning, match=r"nothing for the backbone .*no key like 'backbone\.stem"):
        detector.load_state_dict({"head.weight": torch.zeros(2, 2)}, strict=False)


def test_what_is_no_weight_leaves_the_backbone_as_it_was(net, tmp_path):
    """mmengine's own loader goes past ``load_state_dict`` and converts whatever it can."""
    detector = torch.nn.ModuleDict({"backbone": build()})
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    key = "stage5.OSA5_1.concat.OSA5_1_concat/conv.weight"
    weight = net.state_dict()[key]
    for value, words in (
        (weight.to(torch.int8), r"is torch\.int8, expected one of"),
        (weight.to_sparse(), r"is torch\.sparse_coo, expected torch\.strided"),
        (weight.double() * 1e300, r"infinite in torch\.float32"),
        (weight[:-1], r"is \[511, .*, expected \[512, "),
    ):
        state = {f"backbone.{k}": v for k, v in {**net.state_dict(), key: value}.items()}
        torch.save({"state_dict": state}, tmp_path / "detector.pth")
        with pytest.raises(checkpoints.CheckpointError, match=rf"backbone\.{key}' .*{words}"):
            load_checkpoint(detector, str(tmp_path / "detector.pth"), map_location="cpu")
        assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
        torch.save(state, tmp_path / "detector.pth")
        backbone = build(pretrained=str(tmp_path / "detector.pth"))
        with pytest.raises(checkpoints.CheckpointError):
            backbone.init_weights()
