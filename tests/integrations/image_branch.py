"""The image branch of PETR, StreamPETR, DETR3D and BEVFormer, in whichever mmdet3d is there.

That is mmdet3d 1.1 and newer on mmengine, or mmdet3d 1.0 on mmcv 1.x; where mmcv has no operators,
their names do. Without mmdet3d, a registry of its scope and a detector of a few lines stand for
it, beside mmdet 3.x. What no package brings, the parts of those repositories' plugins, are doubles
of their published interface, and a test's alone. Raises ImportError where none of this is there.

Attributes:
    Config: what reads configs there.
    OLD, WHICH: whether that is on mmcv 1.x, and which it is.
    MODELS: the registry that a config's types are looked for in.
"""

import contextlib
import importlib.util
import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from tests import straight_line
from vovnet_fast.compat import zip

if importlib.util.find_spec("mmdet3d") is not None:
    from tests.integrations import mmcv_operators  # noqa: F401

import mmcv
from mmcv.cnn import ConvModule

OLD = mmcv.__version__.startswith("1.")

if OLD:
    import mmdet3d
    from mmcv import Config
    from mmcv.parallel import MMDataParallel
    from mmcv.runner import BaseModule, EpochBasedRunner, build_optimizer
    from mmdet3d.models.builder import MODELS
    from mmdet3d.models.detectors.mvx_two_stage import MVXTwoStageDetector
else:
    from mmengine.config import Config
    from mmengine.model import BaseModel, BaseModule
    from mmengine.registry import MODELS as ROOT
    from mmengine.registry import DefaultScope, Registry
    from mmengine.runner import Runner

    try:
        import mmdet3d
    except ModuleNotFoundError:
        import mmdet.models  # noqa: F401  (registers FPN and ResNet)

        mmdet3d, MODELS = None, Registry("model", parent=ROOT, scope="mmdet3d")

        class MVXTwoStageDetector(BaseModel):
            def __init__(self, img_backbone, img_neck):
                super().__init__()
                self.img_backbone = MODELS.build(img_backbone)
                self.img_neck = MODELS.build(img_neck)

            def forward(self, inputs, data_samples=None, mode="tensor"):
                run = {"loss": self.loss, "predict": self.predict, "tensor": self._forward}
                return run[mode](inputs, data_samples)
    else:
        from mmdet3d.models.detectors.mvx_two_stage import MVXTwoStageDetector
        from mmdet3d.registry import MODELS

__all__ = ["MODELS", "OLD", "WHICH", "Config", "scope", "train"]

WHICH = "no mmdet3d" if mmdet3d is None else f"mmdet3d {mmdet3d.__version__}"


def scope():
    """A context in which types are looked for as mmdet3d's configs ask, whatever ran before it."""
    return contextlib.nullcontext() if OLD else DefaultScope.overwrite_default_scope("mmdet3d")


# --- Parts of the plugins -------------------------------------------------------------------------


class VoVNet(BaseModule):
    """As in DETR3D, by its arguments."""

    with_cp = False

    def __init__(
        self, spec_name, input_ch=3, out_features=None, frozen_stages=-1, norm_eval=True,
        pretrained=None, init_cfg=None,
    ):  # fmt: skip
        super().__init__(init_cfg)
        assert input_ch == 3
        assert pretrained is None
        self.out_features, self.frozen_stages = out_features, frozen_stages
        self.norm_eval = norm_eval
        net = straight_line.build(spec_name)
        for name, child in net.named_children():
            self.add_module(name, child)
        self._net = [net]  # No child: the names are those of the parts.

    def train(self, mode=True):
        super().train(mode)
        for name in ("stem", *(f"stage{i}" for i in range(2, 6)))[: self.frozen_stages + 1]:
            getattr(self, name).eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and self.norm_eval:
                module.eval()
        return self

    def forward(self, x):
        def run(x):
            return self._net[0](x)

        use_cp = self.with_cp and self.training
        features = checkpoint(run, x, use_reentrant=False) if use_cp else run(x)
        return [f for i, f in enumerate(features, 2) if f"stage{i}" in self.out_features]


class VoVNetCP(VoVNet):
    """As in PETR: with activation checkpointing in training, always."""

    with_cp = True


class CPFPN(BaseModule):
    """As in PETR: FPN without the 3x3 convolutions of all levels but the first."""

    def __init__(self, in_channels, out_channels, num_outs):
        super().__init__(dict(type="Xavier", layer="Conv2d", distribution="uniform"))
        assert isinstance(in_channels, list)
        self.in_channels, self.num_outs = in_channels, num_outs
        self.lateral_convs = nn.ModuleList(
            ConvModule(channels, out_channels, 1, act_cfg=None, inplace=False)
            for channels in in_channels
        )
        self.fpn_convs = nn.ModuleList(
            [ConvModule(out_channels, out_channels, 3, padding=1, act_cfg=None, inplace=False)]
        )

    def forward(self, inputs):
        assert len(inputs) == len(self.in_channels)
        levels = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] += F.interpolate(levels[i], size=levels[i - 1].shape[2:], mode="nearest")
        levels[0] = self.fpn_convs[0](levels[0])
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return tuple(levels)


class GridMask(nn.Module):
    """As in PETR and BEVFormer, without rotation and offset, which none of them asks for."""

    def __init__(self, use_h, use_w, rotate=1, offset=False, ratio=0.5, mode=0, prob=1.0):
        super().__init__()
        assert rotate == 1
        assert not offset
        self.use_h, self.use_w, self.ratio, self.mode, self.prob = use_h, use_w, ratio, mode, prob

    def forward(self, x):
        """One grid of stripes for ``[N, C, H, W]``, all cameras alike."""
        if np.random.rand() > self.prob or not self.training:
            return x
        period = np.random.randint(2, x.shape[2])
        rows = self._stripes(x.shape[2], period, self.use_h)
        columns = self._stripes(x.shape[3], period, self.use_w)
        kept = ~(rows[:, None] | columns[None])
        return x * torch.from_numpy(~kept if self.mode == 1 else kept).to(x)

    def _stripes(self, size, period, used):
        length = min(max(int(period * self.ratio + 0.5), 1), period - 1)
        start, at = np.random.randint(period), np.arange(int(1.5 * size))
        stripes = (at >= start) & ((at - start) % period < length) & used
        return stripes[(len(at) - size) // 2 :][:size]


class ImageBranch(MVXTwoStageDetector):
    """What all of them do with images of ``[B, cameras, 3, H, W]``, and a head of one layer."""

    def __init__(self, use_grid_mask=False, *, img_backbone, img_neck):
        super().__init__(img_backbone=img_backbone, img_neck=img_neck)
        self.use_grid_mask = use_grid_mask
        self.grid_mask = GridMask(True, True, rotate=1, offset=False, ratio=0.5, mode=1, prob=0.7)
        self.pts_bbox_head = nn.Conv2d(img_neck["out_channels"], 4, 1)

    def extract_feat(self, images):
        images = images.flatten(0, 1)
        if self.use_grid_mask:
            images = self.grid_mask(images)
        features = self.img_backbone(images)
        return self.img_neck(list(features.values()) if isinstance(features, dict) else features)

    def losses(self, images):
        outputs = [self.pts_bbox_head(feature) for feature in self.extract_feat(images)]
        return {"loss": sum(output.square().mean() for output in outputs)}

    def forward_train(self, img, img_metas):  # mmcv 1.x
        return self.losses(img)

    def loss(self, inputs, data_samples=None):  # mmengine
        return self.losses(inputs["imgs"])

    def predict(self, inputs, data_samples=None):
        return self.extract_feat(inputs["imgs"])

    _forward = predict


for name, module in (("VoVNet", VoVNet), ("VoVNetCP", VoVNetCP), ("CPFPN", CPFPN)):
    MODELS.register_module(name=name, module=module)
for name in ("PETR", "Petr3D", "Detr3D", "BEVFormer"):
    MODELS.register_module(name=name, module=ImageBranch)


# --- Training -------------------------------------------------------------------------------------


class Batches(Dataset):
    """One sample of two cameras; its grid and images are the same in every epoch."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        np.random.seed(index)
        images = torch.randn(1, 2, 3, 64, 96, generator=torch.Generator().manual_seed(index))
        if OLD:
            return dict(img=images, img_metas=[{}])
        return dict(inputs=dict(imgs=images), data_samples=[])


PARTS = dict(custom_keys=dict(img_backbone=dict(lr_mult=0.1)))
ADAMW = dict(type="AdamW", lr=2e-4, weight_decay=0.01)
CLIP = dict(max_norm=35, norm_type=2)


def train(detector, folder, epochs, *, load_from=None, resume=None):
    """As the code bases' own ``tools/train.py``: by their runner, with PETR's optimiser."""
    loader = DataLoader(Batches(), batch_size=1, collate_fn=lambda samples: samples[0])
    file = load_from if resume is None else resume
    if not OLD:
        Runner(
            detector, str(folder), loader, train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(optimizer=ADAMW, paramwise_cfg=PARTS, clip_grad=CLIP),
            load_from=None if file is None else str(file),
            resume=resume is not None, experiment_name=folder.name, default_scope="mmdet3d",
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
            log_level="ERROR",
        ).train()  # fmt: skip
        return

    class OnTheCPU(MMDataParallel):
        def train_step(self, *args, **kwargs):
            return self.module.train_step(*args, **kwargs)

    detector.init_weights()
    runner = EpochBasedRunner(
        OnTheCPU(detector, device_ids=[-1]),
        optimizer=build_optimizer(detector, dict(ADAMW, paramwise_cfg=PARTS)),
        work_dir=str(folder), logger=logging.getLogger("image_branch"), max_epochs=epochs, meta={},
    )  # fmt: skip
    runner.register_training_hooks(
        dict(policy="fixed"), dict(grad_clip=CLIP), checkpoint_config=dict(interval=1)
    )
    if resume is not None:
        runner.resume(str(resume), map_location="cpu")
    elif load_from is not None:
        runner.load_checkpoint(str(load_from), map_location="cpu")
    runner.run([loader], [("train", 1)])
