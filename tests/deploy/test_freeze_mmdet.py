"""A frozen backbone in a detector of mmdet."""

import copy

import pytest
import torch

pytest.importorskip("mmcv.ops", exc_type=Exception)
pytest.importorskip("mmdet.registry", exc_type=Exception)

from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict

import vovnet_fast.mmdet  # noqa: F401  (registers VoVNetFast)
from tests import straight_line
from tests.tiny import TINY
from vovnet_fast.compat import zip
from vovnet_fast.deploy.freeze import freeze

register_all_modules()


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    channels = list(TINY["detectron2"].out_channels)
    detector = MODELS.build(
        dict(
            type="RetinaNet",
            data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
            backbone=dict(type="VoVNetFast", spec_name=TINY["detectron2"]),
            neck=dict(type="FPN", in_channels=channels, out_channels=16, num_outs=5),
            bbox_head=dict(
                type="RetinaHead",
                num_classes=3,
                in_channels=16,
                feat_channels=16,
                stacked_convs=1,
                anchor_generator=dict(
                    type="AnchorGenerator",
                    ratios=[1.0],
                    octave_base_scale=4,
                    scales_per_octave=1,
                    strides=[4, 8, 16, 32, 64],
                ),
                bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
            ),
            train_cfg=ConfigDict(
                assigner=dict(
                    type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0
                ),
                sampler=dict(type="PseudoSampler"),
                allowed_border=-1,
                pos_weight=-1,
            ),
            test_cfg=ConfigDict(
                nms_pre=50, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=5
            ),
        )
    )
    straight_line.randomise(detector.backbone)
    return detector.eval()


def predict(detector):
    inputs = demo_mm_inputs(2, [[3, 96, 128]] * 2, num_classes=3)
    with torch.no_grad():
        data = detector.data_preprocessor(inputs, False)
        return [sample.pred_instances for sample in detector(**data, mode="predict")]


@pytest.mark.parametrize("mode", [True, False])
def test_predictions_are_those_of_the_original(original, mode):
    detector = copy.deepcopy(original)
    detector.backbone.train(mode)
    detector.backbone = freeze(detector.backbone)
    for found, expected in zip(predict(detector), predict(original), strict=True):
        assert len(found) == len(expected) > 0
        torch.testing.assert_close(found.scores, expected.scores)
        torch.testing.assert_close(found.bboxes, expected.bboxes, rtol=1e-4, atol=1e-2)
        assert torch.equal(found.labels, expected.labels)


def test_half_precision_under_a_neck_in_fp32(original):
    detector = copy.deepcopy(original)
    detector.backbone = freeze(detector.backbone, torch.bfloat16, out_dtype=torch.float32)
    for found, expected in zip(predict(detector), predict(original), strict=True):
        assert found.scores.dtype == torch.float32
        torch.testing.assert_close(found.scores, expected.scores, rtol=0.1, atol=0.05)


def test_the_rest_of_the_detector_can_be_trained(original):
    detector = copy.deepcopy(original)
    detector.backbone = freeze(detector.backbone)
    before = copy.deepcopy(detector.backbone.state_dict())
    detector.train()
    assert not detector.backbone.training
    inputs = demo_mm_inputs(2, [[3, 96, 128]] * 2, num_classes=3)
    data = detector.data_preprocessor(inputs, True)
    loss, _ = detector.parse_losses(detector(**data, mode="loss"))
    loss.backward()
    assert all(p.grad is not None for p in detector.parameters())
    for name, tensor in detector.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
