"""Every config trains and infers, and ``VoVNetFast`` behaves as a backbone of mmdet 3.x."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

pytest.importorskip("mmcv.ops", exc_type=Exception)
pytest.importorskip("mmdet.registry", exc_type=Exception)

import mmcv.ops
import mmdet.registry
import mmengine.registry
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import BaseModule, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict

import vovnet_fast
from vovnet_fast.checkpoints import CheckpointError
from vovnet_fast.compat import zip
from vovnet_fast.mmdet import VoVNetFast

CONFIGS = Path(__file__).parents[2] / "configs"
SNIPPET = CONFIGS / "petr" / "vovnet-99-ese_img-backbone_snippet.py"

SEED_CONFIGS = {
    f"{detector.replace('-', '_')}/{detector}_vovnet-{depth}_fpn_1x_coco.py": f"vovnet-{depth}"
    for detector in ("faster-rcnn", "mask-rcnn", "cascade-rcnn", "cascade-mask-rcnn")
    for depth in (19, 39, 57, 99)
}
LIGHT = "mask_rcnn/mask-rcnn_vovnet-19-slim-dw1_fpn-96_1x_coco.py"
SEED_CONFIGS[LIGHT] = "vovnet-19-slim-dw1"
ESE_CONFIGS = {
    "fcos/fcos_v-39-ese_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py": "V-39-eSE",
    "retinanet/retinanet_v-39-ese_fpn_1x_coco.py": "V-39-eSE",
}
SPEC_OF = SEED_CONFIGS | ESE_CONFIGS

# Each detector and each depth once. The others differ in nothing that these do not show.
RUN = {
    "faster_rcnn/faster-rcnn_vovnet-19_fpn_1x_coco.py",
    "mask_rcnn/mask-rcnn_vovnet-39_fpn_1x_coco.py",
    "cascade_rcnn/cascade-rcnn_vovnet-57_fpn_1x_coco.py",
    "cascade_mask_rcnn/cascade-mask-rcnn_vovnet-99_fpn_1x_coco.py",
    LIGHT,
    *ESE_CONFIGS,
}
runs = pytest.mark.parametrize(
    "detector",
    [pytest.param(n, marks=[] if n in RUN else [pytest.mark.slow]) for n in SPEC_OF],
    indirect=True,
)

# Two shapes, so that the batch is padded: to 64x64, which is 2x2 in stage5.
IMAGE_SHAPES = [(3, 48, 64), (3, 64, 48)]


@pytest.fixture(scope="module", autouse=True)
def _mmdet_scope() -> None:
    register_all_modules(init_default_scope=True)


@functools.cache
def load_config(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


def build_detector(name: str) -> nn.Module:
    model = copy.deepcopy(load_config(name).model)
    # An untrained detector is sure of nothing; without a threshold it still has results.
    test_cfg = model.test_cfg.get("rcnn", model.test_cfg)
    test_cfg.update(score_thr=0.0, max_per_img=10)
    if "rpn_head" in model:
        # The heads run once per proposal: a few dozen show what thousands would.
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 32
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 16
    torch.manual_seed(0)
    return mmdet.registry.MODELS.build(model)


def make_batch(detector: nn.Module) -> dict[str, Any]:
    return demo_mm_inputs(
        batch_size=2,
        image_shapes=IMAGE_SHAPES,
        num_items=[2, 3],
        num_classes=80,
        with_mask=getattr(detector, "with_mask", False),
    )


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


# --- The config files -----------------------------------------------------------------------


def test_the_expected_configs_are_there() -> None:
    assert set(SPEC_OF) >= RUN
    assert {SPEC_OF[name] for name in RUN} == set(SPEC_OF.values())
    assert {name.split("/")[0] for name in RUN} == {name.split("/")[0] for name in SPEC_OF}
    found = {
        path.relative_to(CONFIGS).as_posix()
        for path in CONFIGS.glob("**/*.py")
        if path.relative_to(CONFIGS).parts[0] not in ("_base_", "digits") and path != SNIPPET
    }
    assert found == set(SPEC_OF)
    assert len(SEED_CONFIGS) == 17


def _types(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key that holds the dict, its type) for every dict with a type."""
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield key, node["type"]
        for child_key, child in node.items():
            yield from _types(child, child_key)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _types(child, key)


@functools.cache  # Some twenty registries are asked, by configs that name the same types.
def _resolves(key: str, type_name: str) -> bool:
    if key in ("nms", "roi_layer"):  # Looked up among mmcv's ops, not in a registry.
        return hasattr(mmcv.ops, type_name)
    registries = [
        value
        for value in vars(mmdet.registry).values()
        if isinstance(value, mmengine.registry.Registry)
    ]
    return any(registry.get(type_name) is not None for registry in registries)


@pytest.mark.parametrize("name", SPEC_OF)
def test_every_type_in_the_config_resolves(name: str) -> None:
    found = set(_types(load_config(name).to_dict()))
    assert {"model", "dataset", "optimizer"} <= {key for key, _ in found}
    assert [item for item in sorted(found) if not _resolves(*item)] == []
    assert not _resolves("backbone", "NoSuchBackbone")


@pytest.mark.parametrize("name", SPEC_OF)
def test_config_names_the_backbone(name: str) -> None:
    config = load_config(name)
    assert config.custom_imports["imports"] == ["vovnet_fast.mmdet"]
    backbone = config.model.backbone
    assert backbone.type == "VoVNetFast"
    assert backbone.get("model_name", backbone.get("spec_name")) == SPEC_OF[name]
    # Nothing of the base's ResNet may be left, least of all its weights.
    assert "depth" not in backbone
    assert "torchvision" not in str(backbone)


@pytest.mark.parametrize("name", SEED_CONFIGS)
def test_seed_recipe(name: str) -> None:
    config = load_config(name)
    model = config.model
    assert config.optim_wrapper.clip_grad == dict(max_norm=35, norm_type=2)
    assert config.optim_wrapper.optimizer.lr == 0.02
    assert config.param_scheduler[0].start_factor == pytest.approx(1 / 3)
    assert config.train_cfg.max_epochs == 12
    assert model.data_preprocessor.mean == [123.675, 116.28, 103.53]
    assert model.data_preprocessor.std == [58.395, 57.12, 57.375]
    assert model.data_preprocessor.bgr_to_rgb
    # From noise, with statistics that are never updated, nothing would be normalised.
    assert model.backbone.norm_eval is False
    assert "init_cfg" not in model.backbone
    assert model.rpn_head.loss_bbox == dict(type="SmoothL1Loss", beta=1 / 9, loss_weight=1.0)
    assert model.train_cfg.rpn.allowed_border == 0
    assert model.train_cfg.rpn_proposal.max_per_img == 2000
    cascade = name.startswith("cascade")
    heads = model.roi_head.bbox_head if cascade else [model.roi_head.bbox_head]
    assert len(heads) == (3 if cascade else 1)
    for head in heads:
        assert head.loss_bbox == dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0)
        assert head.reg_class_agnostic is cascade
    assert ("mask_head" in model.roi_head) == ("mask" in name)
    dataset_step = config.train_dataloader.dataset.pipeline[1]
    assert dataset_step.get("with_mask", False) == ("mask" in name)


def test_light_config_is_thin_everywhere() -> None:
    model = load_config(LIGHT).model
    roi_head = model.roi_head
    widths = {
        model.neck.out_channels,
        model.rpn_head.in_channels,
        model.rpn_head.feat_channels,
        roi_head.bbox_roi_extractor.out_channels,
        roi_head.bbox_head.in_channels,
        roi_head.mask_roi_extractor.out_channels,
        roi_head.mask_head.in_channels,
    }
    assert widths == {96}
    assert roi_head.bbox_head.fc_out_channels == 384
    assert roi_head.mask_head.conv_out_channels == 128


@pytest.mark.parametrize("name", ESE_CONFIGS)
def test_ese_configs_feed_what_the_pretrained_file_expects(name: str) -> None:
    model = load_config(name).model
    assert not model.data_preprocessor.bgr_to_rgb
    assert model.data_preprocessor.mean == [103.53, 116.28, 123.675]
    assert model.data_preprocessor.std == [1.0, 1.0, 1.0]
    assert model.backbone.init_cfg.type == "Pretrained"
    assert model.backbone.norm_eval
    # stage2 would be computed for nothing.
    assert model.backbone.out_features == ("stage3", "stage4", "stage5")
    assert model.neck.start_level == 0


# --- The detectors. One at a time is alive; inference comes before the step that moves it. ---


@pytest.fixture(scope="module")
def detector(request: pytest.FixtureRequest) -> nn.Module:
    model = build_detector(request.param)
    model.config_name = request.param
    return model


@pytest.mark.parametrize("detector", SPEC_OF, indirect=True)
def test_levels_match(detector: nn.Module) -> None:
    backbone = detector.backbone
    assert type(backbone) is VoVNetFast
    assert backbone.spec.name == SPEC_OF[detector.config_name]
    channels = backbone.spec.feature_channels()
    assert detector.neck.in_channels == [channels[name] for name in backbone.out_features]
    strides = list(backbone.feature_strides)
    if hasattr(detector, "rpn_head"):
        roi_head = detector.roi_head
        extractors = roi_head.bbox_roi_extractor
        extractors = extractors if isinstance(extractors, nn.ModuleList) else [extractors]
        assert [extractor.featmap_strides for extractor in extractors] == [strides] * len(
            extractors
        )
        head = detector.rpn_head
    else:
        head = detector.bbox_head
    assert [s[0] for s in head.prior_generator.strides[: len(strides)]] == strides


@runs
def test_inference(detector: nn.Module) -> None:
    detector.eval()
    with torch.no_grad():
        results = detector.test_step(make_batch(detector))
    assert len(results) == 2
    for result, (_, height, width) in zip(results, IMAGE_SHAPES, strict=True):
        instances = result.pred_instances
        assert len(instances) == 10
        assert instances.bboxes.isfinite().all()
        assert instances.scores.isfinite().all()
        if getattr(detector, "with_mask", False):
            assert instances.masks.shape == (10, height, width)


@runs
def test_one_training_step(detector: nn.Module) -> None:
    config = load_config(detector.config_name)
    backbone = detector.backbone
    detector.train()
    optim_wrapper = build_optim_wrapper(detector, config.optim_wrapper)
    gradients: dict[str, float] = {}

    def remember(name: str, parameter: Tensor) -> None:
        gradients[name] = parameter.grad.abs().max().item()

    trained = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    hooks = [
        p.register_post_accumulate_grad_hook(functools.partial(remember, n))
        for n, p in trained.items()
    ]
    probe = backbone.stem._modules["stem_1/conv"].weight
    before = probe.detach().clone()
    running_mean = norms(backbone)[-1].running_mean.clone()

    losses = detector.train_step(make_batch(detector), optim_wrapper)

    for hook in hooks:
        hook.remove()
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values()), losses
    assert losses["loss"] > 0
    # A parameter without a gradient would stop DistributedDataParallel.
    assert sorted(set(trained) - set(gradients)) == []
    assert all(value < float("inf") for value in gradients.values())
    for stage in ("stem", "stage5"):
        convs = [n for n in trained if n.startswith(f"backbone.{stage}.") and "conv" in n]
        assert convs
        assert all(gradients[n] > 0 for n in convs if n.endswith("weight")), stage
    assert not torch.equal(probe, before)
    learns_statistics = not config.model.backbone.norm_eval
    assert torch.equal(norms(backbone)[-1].running_mean, running_mean) != learns_statistics


def test_init_weights_of_a_detector_keeps_the_original_initialisation() -> None:
    detector = build_detector(LIGHT)
    before = {k: v.clone() for k, v in detector.backbone.state_dict().items()}
    fc = detector.roi_head.bbox_head.fc_cls.weight.detach().clone()
    detector.init_weights()
    assert detector.backbone.is_init
    assert not torch.equal(fc, detector.roi_head.bbox_head.fc_cls.weight)  # It did run.
    after = detector.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


# --- The snippet for mmdet3d ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "strides"),
    [
        ("img_backbone", (768, 1024), (16, 32)),
        ("bevformer_img_backbone", (512, 768, 1024), (8, 16, 32)),
        ("detr3d_img_backbone", (256, 512, 768, 1024), (4, 8, 16, 32)),
        ("img_backbone_from_detector", (768, 1024), (16, 32)),
    ],
)
def test_snippet(name: str, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    config = Config.fromfile(SNIPPET)
    assert config.model.img_backbone == config.img_backbone
    backbone = mmengine.registry.MODELS.build(copy.deepcopy(config[name]))
    assert type(backbone) is VoVNetFast
    assert backbone.spec.name == "V-99-eSE"
    assert backbone.with_cp
    assert backbone.feature_channels == channels
    assert backbone.feature_strides == strides
    assert backbone.frozen_stages == (1 if name.startswith("detr3d") else -1)
    assert bool(backbone.init_cfg) == (name == "img_backbone_from_detector")


# --- VoVNetFast -----------------------------------------------------------------------------


def build_backbone(**config: Any) -> VoVNetFast:
    torch.manual_seed(0)
    return mmdet.registry.MODELS.build(dict(type="VoVNetFast", **config))


def small(**config: Any) -> VoVNetFast:
    return build_backbone(spec_name="V-19-slim-dw-eSE", **config)


def test_registered_in_mmdet_and_in_the_root() -> None:
    assert mmdet.registry.MODELS.get("VoVNetFast") is VoVNetFast
    assert mmengine.registry.MODELS.get("VoVNetFast") is VoVNetFast


def test_found_from_the_scope_of_another_code_base() -> None:
    root = mmengine.registry.MODELS
    scope = "vovnet_fast_test_scope"
    other = mmengine.registry.Registry("model", parent=root, scope=scope)
    try:
        backbone = other.build(dict(type="VoVNetFast", spec_name="V-19-slim-dw-eSE"))
    finally:
        root.children.pop(scope)
    assert type(backbone) is VoVNetFast


def test_is_a_base_module_and_a_vovnet() -> None:
    backbone = small()
    assert isinstance(backbone, BaseModule)
    assert isinstance(backbone, vovnet_fast.VoVNet)


def test_petr_dialect() -> None:
    backbone = build_backbone(
        spec_name="V-99-eSE",
        norm_eval=True,
        frozen_stages=-1,
        input_ch=3,
        out_features=("stage4", "stage5"),
    )
    with torch.no_grad():
        features = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert isinstance(features, tuple)
    assert [tuple(f.shape) for f in features] == [(1, 768, 4, 6), (1, 1024, 2, 3)]


def test_seed_dialect() -> None:
    backbone = build_backbone(model_name="vovnet-39")
    with torch.no_grad():
        features = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert isinstance(features, tuple)
    assert [tuple(f.shape[1:]) for f in features] == [
        (256, 16, 24),
        (512, 8, 12),
        (768, 4, 6),
        (1024, 2, 3),
    ]


@pytest.mark.parametrize("kind", ["BN", "SyncBN"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_mmdet_dialect(kind: str, requires_grad: bool) -> None:
    backbone = small(
        out_indices=(1, 3),
        frozen_stages=1,
        norm_cfg=dict(type=kind, requires_grad=requires_grad),
        norm_eval=True,
        with_cp=True,
        init_cfg=dict(type="Pretrained", checkpoint="nowhere.pth"),  # Read by init_weights only.
    )
    assert backbone.out_features == ("stage3", "stage5")
    expected = nn.SyncBatchNorm if kind == "SyncBN" else nn.BatchNorm2d
    layers = norms(backbone.stage5)
    assert layers
    assert all(type(layer) is expected for layer in layers)
    assert {p.requires_grad for layer in layers for p in layer.parameters()} == {requires_grad}
    assert all(block.with_cp for block in backbone.stage5.children())
    with torch.no_grad():
        features = backbone.eval()(torch.randn(1, 3, 64, 64))
    assert isinstance(features, tuple)
    assert [f.shape[1] for f in features] == [256, 512]


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_freezing_survives_train(frozen_stages: int, norm_eval: bool) -> None:
    detector = nn.Sequential(small(frozen_stages=frozen_stages, norm_eval=norm_eval))
    backbone = detector[0]
    for mode in (True, False, True):
        detector.train(mode)  # The trainer calls it on the detector, before every epoch.
    parts = [backbone.stem, *(getattr(backbone, f"stage{i}") for i in (2, 3, 4, 5))]
    for i, part in enumerate(parts):
        frozen = i <= frozen_stages
        assert all(p.requires_grad != frozen for p in part.parameters())
        assert part.training != frozen
        assert all(layer.training == (not frozen and not norm_eval) for layer in norms(part))


def test_with_cp_changes_memory_and_not_results() -> None:
    plain, checkpointed = small(norm_eval=False), small(norm_eval=False, with_cp=True)
    checkpointed.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    outcomes = []
    for backbone in (plain, checkpointed):
        backbone.train()
        features = backbone(image)
        sum(f.square().mean() for f in features).backward()
        outcomes.append((features, backbone))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0])
    for (name, expected), actual in zip(
        plain.named_parameters(), checkpointed.parameters(), strict=True
    ):
        torch.testing.assert_close(actual.grad, expected.grad, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict())


def test_revert_sync_batchnorm() -> None:
    """What mmdet's tools do with a SyncBN config when there is one device."""
    plain = small(norm_eval=False)
    reverted = revert_sync_batchnorm(small(norm_cfg=dict(type="SyncBN"), norm_eval=False))
    assert type(reverted) is VoVNetFast
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in reverted.modules())
    assert len(norms(reverted)) == len(norms(plain))
    reverted.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        plain.train(mode)
        reverted.train(mode)
        with vovnet_fast.use_backend("reference"):  # The ops know no norm of the reverted one.
            torch.testing.assert_close(reverted(image), plain(image))
    torch.testing.assert_close(reverted.state_dict(), plain.state_dict())
    reverted.norm_eval = True
    reverted.train()
    assert not any(layer.training for layer in norms(reverted))


class Detector(BaseModule):
    """The least that has a backbone and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small()
        self.head = nn.Linear(2, 2)


def partial_state(detector: Detector) -> dict[str, Tensor]:
    return {k: v for k, v in detector.state_dict().items() if ".stage5." not in k}


def _torch_load(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state, strict=False)


def _mmengine_load(module: nn.Module, state: dict[str, Tensor]) -> None:
    mmengine_load_state_dict(module, state, strict=False)


LOADERS = pytest.mark.parametrize("load", [_torch_load, _mmengine_load])


@LOADERS
def test_partial_backbone_is_refused(load: Any) -> None:
    detector = Detector()
    with pytest.raises(CheckpointError, match=r"backbone\.stage5\..*V-19-slim-dw-eSE"):
        load(detector, partial_state(detector))


@LOADERS
def test_checkpoint_without_backbone_warns(load: Any) -> None:
    detector = Detector()
    before = {k: v.clone() for k, v in detector.backbone.state_dict().items()}
    state = {k: v for k, v in detector.state_dict().items() if k.startswith("head.")}
    with pytest.raises(CheckpointError, match=r"nothing for the backbone.*it would be noise"):
        load(detector, state)
    load(detector, detector.state_dict())
    with pytest.warns(UserWarning, match=r"nothing for the backbone"):
        load(detector, state)
    torch.testing.assert_close(detector.backbone.state_dict(), before)


@LOADERS
def test_whole_backbone_loads_in_silence(load: Any) -> None:
    source, target = Detector(), Detector()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    # num_batches_tracked is in no file of vovnet-detectron2, and the head may be another one.
    state = {
        k: v
        for k, v in source.state_dict().items()
        if k.startswith("backbone.") and not k.endswith("num_batches_tracked")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(target, state)
    torch.testing.assert_close(target.backbone.state_dict(), source.backbone.state_dict())


def test_a_copied_detector_guards_itself() -> None:
    """Mean teachers and averaged models are deep copies."""
    original = Detector()
    clone = copy.deepcopy(original)
    del original
    with pytest.raises(CheckpointError):
        clone.load_state_dict(partial_state(clone), strict=False)
