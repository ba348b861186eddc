"""``VoVNetFast`` in mmdet 2.x on mmcv 1.x: config, weights and training of that generation.

Runs where those are installed (mmdet 2.28 and mmcv 1.7, with or without its operators).
"""

import contextlib
import logging

import pytest
import torch
import torch.distributed
from torch import nn

pytest.importorskip("mmcv.runner", exc_type=Exception)
pytest.importorskip("tests.integrations.mmcv1_operators", exc_type=Exception)
pytest.importorskip("mmdet.models", exc_type=Exception)

import mmcv.cnn
import mmdet.models.builder
from mmcv import Config
from mmcv.parallel import MMDataParallel, MMDistributedDataParallel
from mmcv.runner import (
    BaseModule,
    EpochBasedRunner,
    Fp16OptimizerHook,
    OptimizerHook,
    load_checkpoint,
    wrap_fp16_model,
)
from mmdet.models import build_detector

import vovnet_fast
from tests import straight_line
from vovnet_fast import checkpoints
from vovnet_fast.checkpoints import CheckpointError
from vovnet_fast.mmdet import VoVNetFast

NAME = "V-19-slim-dw-eSE"

CONFIG = """
custom_imports = dict(imports=["vovnet_fast.mmdet"], allow_failed_imports=False)
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    type="RetinaNet",
    backbone=dict(
        type="VoVNetFast", spec_name="V-19-slim-dw-eSE", frozen_stages=-1, norm_eval=True,
        norm_cfg=norm_cfg, out_features=("stage3", "stage4", "stage5"),
    ),
    neck=dict(type="FPN", in_channels=[256, 384, 512], out_channels=16, num_outs=5),
    bbox_head=dict(
        type="RetinaHead", num_classes=3, in_channels=16, stacked_convs=1, feat_channels=16,
        anchor_generator=dict(
            type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
        ),
    ),
    train_cfg=dict(
        assigner=dict(
            type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0,
            ignore_iof_thr=-1,
        ),
        allowed_border=-1, pos_weight=-1, debug=False,
    ),
    test_cfg=dict(
        nms_pre=10, min_bbox_size=0, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5),
        max_per_img=5,
    ),
)
"""


@pytest.fixture(scope="module")
def net():
    return straight_line.build(NAME)


@pytest.fixture
def detector(tmp_path):
    def build(**options):
        (tmp_path / "config.py").write_text(CONFIG)
        config = Config.fromfile(str(tmp_path / "config.py"))
        config.model.backbone.update(options)
        torch.manual_seed(0)
        return build_detector(config.model)

    return build


def backbone(**options):
    return mmdet.models.builder.build_backbone(dict(type="VoVNetFast", spec_name=NAME, **options))


def batch():
    torch.manual_seed(1)
    meta = dict(
        img_shape=(64, 96, 3), pad_shape=(64, 96, 3), ori_shape=(64, 96, 3), scale_factor=1.0,
        filename="", flip=False,
    )  # fmt: skip
    return dict(
        img=torch.randn(2, 3, 64, 96),
        img_metas=[meta, meta],
        gt_bboxes=[torch.tensor([[4.0, 4.0, 40.0, 40.0]])] * 2,
        gt_labels=[torch.tensor([1])] * 2,
    )


def same(module, net):
    state = net.state_dict()
    return all(
        torch.equal(v, state[k]) for k, v in module.state_dict().items() if "num_batches" not in k
    )


def test_registered_in_mmdet_and_in_the_root():
    assert mmdet.models.builder.BACKBONES.get("VoVNetFast") is VoVNetFast
    assert mmcv.cnn.MODELS.get("VoVNetFast") is VoVNetFast
    assert issubclass(VoVNetFast, BaseModule)
    assert issubclass(VoVNetFast, vovnet_fast.VoVNet)


def test_a_config_with_custom_imports(detector):
    model = detector()
    assert type(model.backbone) is VoVNetFast
    features = model.extract_feat(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape) for f in features[:3]] == [(1, 16, 8, 12), (1, 16, 4, 6), (1, 16, 2, 3)]


@pytest.mark.parametrize("layout", ["detectron2", "timm"])
def test_init_cfg(net, tmp_path, detector, layout):
    path = str(tmp_path / "w.pth")
    checkpoints.write(
        checkpoints.convert(net.state_dict(), NAME, layout, add_prefix="img_backbone."), path
    )
    for options in (
        dict(init_cfg=dict(type="Pretrained", checkpoint=path)),
        dict(init_cfg=[dict(type="Pretrained", checkpoint=path, prefix="img_backbone.")]),
        dict(pretrained=path),
    ):
        alone = backbone(**options)
        alone.init_weights()
        assert same(alone, net)
        whole = detector(**options)
        whole.init_weights()
        assert same(whole.backbone, net)
        assert not hasattr(whole.backbone, "_params_init_info")
    other = backbone(init_cfg=dict(type="Constant", layer="Conv2d", val=0.5))
    other.init_weights()
    assert (other.first_weight == 0.5).all()


def test_a_whole_detectors_checkpoint(net, tmp_path, detector):
    """mmcv 1.x shows a part the whole state dict: what lies elsewhere can be named."""
    model = detector()
    bare, whole = tmp_path / "bare.pth", tmp_path / "whole.pth"
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for content in (
        {"state_dict": state},
        {"model": {f"backbone.bottom_up.{k}": v for k, v in state.items()}},
    ):
        torch.save(content, bare)
        with pytest.raises(CheckpointError, match="nothing for the backbone") as caught:
            load_checkpoint(model, str(bare), map_location="cpu", logger=logging.getLogger("x"))
        prefix = "backbone.bottom_up." if "model" in content else ""
        found = f"There is a backbone elsewhere in native keys, of {NAME}, "
        assert f"{found}whose names begin with {prefix!r}" in str(caught.value)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, whole)
    load_checkpoint(model, str(whole), map_location="cpu", logger=logging.getLogger("x"))
    assert same(model.backbone, net)


def train(model, hook, tmp_path):
    """Two iterations by mmcv's own runner."""
    before = model.module.backbone.first_weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    logger = logging.getLogger("mmcv1")
    runner = EpochBasedRunner(
        model, optimizer=optimizer, work_dir=str(tmp_path), logger=logger, max_epochs=1, meta={}
    )
    runner.register_training_hooks(dict(policy="fixed"), optimizer_config=hook)
    runner.run([[batch(), batch()]], [("train", 1)])
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.module.backbone.first_weight, before)


class OnTheCPU(MMDataParallel):
    """mmcv's, whose inputs are where they are needed already.

    ``auto_fp16`` hands on images in half precision, and turns on autocast for GPUs alone.
    """

    autocast = contextlib.nullcontext()

    def train_step(self, data, *args, **kwargs):
        with self.autocast:
            return self.module.train_step(data, *args, **kwargs)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("with_cp", [False, True])
def test_mmcvs_runner_trains(tmp_path, detector, fp16, with_cp):
    model = detector(with_cp=with_cp)
    hook = Fp16OptimizerHook(loss_scale="dynamic") if fp16 else OptimizerHook()
    wrapped = OnTheCPU(model, device_ids=[-1])
    if fp16:
        wrapped.autocast = torch.autocast("cpu", torch.bfloat16)
    train(wrapped, hook, tmp_path)
    assert getattr(model, "fp16_enabled", False) == fp16


def test_wrap_fp16_model_leaves_the_backbone_to_autocast(detector):
    model = detector()
    wrap_fp16_model(model)
    assert {p.dtype for p in model.backbone.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        features = model.extract_feat(torch.randn(1, 3, 64, 96))
    assert all(f.isfinite().all() for f in features)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_distributed(tmp_path, detector, group, find_unused_parameters):
    model = MMDistributedDataParallel(
        detector(), find_unused_parameters=find_unused_parameters, broadcast_buffers=False
    )
    train(model, OptimizerHook(), tmp_path)


def test_freezing_survives_train(detector):
    model = detector(frozen_stages=1, norm_eval=False)
    model.train()
    parts = [model.backbone.stem, *(getattr(model.backbone, f"stage{i}") for i in (2, 3, 4, 5))]
    for i, part in enumerate(parts):
        norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(p.requires_grad == (i > 1) for p in part.parameters())
        assert all(norm.training == (i > 1) for norm in norms)
