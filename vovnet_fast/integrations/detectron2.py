"""VoVNet as a backbone of detectron2, and of what builds on it: CenterMask2, AdelaiDet, DD3D.

The builders are registered in detectron2's ``BACKBONE_REGISTRY``, and read the keys that configs of
vovnet-detectron2, CenterMask2 and AdelaiDet have (DD3D's where it is said):

==========================================  ==================================================
``build_vovnet_fast_backbone``              the backbone alone
``build_vovnet_fast_fpn_backbone``          with an FPN, and p6 by max pooling
``build_retinanet_vovnet_fast_fpn_backbone``  p6 and p7 from stage5
``build_fcos_vovnet_fast_fpn_backbone``     0, 1 or 2 levels from p5 (``MODEL.FCOS.TOP_LEVELS``)
``build_fcos_vovnet_fast_fpn_backbone_p6``  DD3D's: ``FE.BACKBONE`` and ``FE.FPN``, p6 from p5
==========================================  ==================================================

===================================  ==========================================================
``MODEL.VOVNET.CONV_BODY``           an architecture (``FE.BACKBONE.NAME`` in DD3D)
``MODEL.VOVNET.OUT_FEATURES``        names of features: ``stem``, ``stage2`` to ``stage5``
``MODEL.VOVNET.NORM``                ``FrozenBN``, ``BN``, ``SyncBN`` or ``GN``
``MODEL.VOVNET.STAGE_WITH_DCN``      AdelaiDet's: refused, there are no deformable convolutions
``MODEL.VOVNET.OUT_CHANNELS``, ``BACKBONE_OUT_CHANNELS``  read by nobody, as in the originals
``MODEL.VOVNET.WITH_CP``             of our own: activation checkpointing of every block
``MODEL.BACKBONE.FREEZE_AT``         0: nothing; k: the stem and stages 2 to k have no gradients,
                                     and all norms are ``FrozenBN``, as in vovnet-detectron2
===================================  ==========================================================

Keys of a checkpoint are those of vovnet-detectron2, ``backbone.bottom_up.stem.stem_1/conv.weight``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu

from ..network.model import STAGE_NAMES
from ..network.norms import NormCfg
from ..specs import NUM_STAGES
from .whole import Guarded

try:
    from detectron2.config import CfgNode
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
except Exception as error:  # Built for another torch it raises more than ImportError.
    raise ImportError(
        f"vovnet_fast.detectron2 needs detectron2, and importing it failed with: "
        f"{type(error).__name__}: {error}. It is built from its sources, after torch: pip install "
        '--no-build-isolation "git+https://github.com/facebookresearch/detectron2"'
    ) from error

_NORMS = {"BN": "BN", "SyncBN": "SyncBN", "nnSyncBN": "SyncBN", "FrozenBN": "FrozenBN", "GN": "GN"}


def add_vovnet_config(cfg: Any) -> None:
    """Put vovnet-detectron2's keys and defaults into a config. What is there already stays."""
    defaults = {
        "CONV_BODY": "V-39-eSE",
        "OUT_FEATURES": list(STAGE_NAMES),
        "NORM": "FrozenBN",
        "OUT_CHANNELS": 256,
        "BACKBONE_OUT_CHANNELS": 256,
        "WITH_CP": False,
    }
    if "VOVNET" not in cfg.MODEL:
        cfg.MODEL.VOVNET = CfgNode()
    for key, value in defaults.items():
        if key not in cfg.MODEL.VOVNET:
            cfg.MODEL.VOVNET[key] = value


class VoVNetFast(Guarded, Backbone):
    """:class:`vovnet_fast.VoVNet` as a detectron2 ``Backbone``: features by name.

    Takes the arguments of :class:`~vovnet_fast.VoVNet`. Any size of image will do
    (``size_divisibility`` is 0); an FPN around it has needs of its own. ``vovnet_fast.freeze``
    takes a :class:`~vovnet_fast.VoVNet` with the same state dict: this one returns names too.
    """

    remedy = (
        "A file that holds a backbone alone is matched by MODEL.WEIGHTS: 'FILE?matching_heuristics="
        "True', and of any code base one that fits is made by: vovnet-fast convert FILE OUT.pth "
        "--add-prefix {prefix}"
    )
    on_purpose = "set its attribute filled to True"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The features of images ``[N, C, H, W]`` by name, ``[N, C', H', W']`` each."""
        features = super().forward(x)
        return {name: features[i] for i, name in enumerate(self.out_features)}

    def output_shape(self) -> dict[str, Any]:
        """Channels and strides of the features, a ``ShapeSpec`` each."""
        channels, strides = self.spec.feature_channels(), self.spec.feature_strides()
        return {n: ShapeSpec(channels=channels[n], stride=strides[n]) for n in self.out_features}


class LastLevels(nn.Module):
    """The coarsest levels of an FPN, p6 and maybe p7, by convolutions of stride 2.

    Args:
        in_channels: of what they are made of.
        out_channels: of each.
        in_feature: ``p5``, or a feature of the backbone.
        num_levels: 1 or 2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, in_feature: str, num_levels: int
    ) -> None:
        super().__init__()
        self.num_levels = num_levels  # Which detectron2's FPN reads, as the next one.
        self.in_feature = in_feature
        for level in range(num_levels):
            conv = nn.Conv2d(in_channels if level == 0 else out_channels, out_channels, 3, 2, 1)
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.add_module(f"p{level + 6}", conv)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The levels, from ``[N, in_channels, H, W]``."""
        levels: list[Tensor] = []
        for conv in self.children():
            levels.append(conv(relu(levels[-1]) if levels else x))
        return levels


# --------------------------------------------------------------------------------------
# Builders
# --------------------------------------------------------------------------------------


def _build(body: str, cfg: Any, input_shape: Any, freeze_at: int) -> VoVNetFast:
    """The backbone of a config's section."""
    if any(cfg.get("STAGE_WITH_DCN", ())):
        raise ValueError(
            f"STAGE_WITH_DCN={tuple(cfg.STAGE_WITH_DCN)} asks for deformable convolutions, which "
            "VoVNetFast does not have: set all to False, or stay with AdelaiDet's own "
            "build_vovnet_backbone for this model"
        )
    if cfg.NORM not in _NORMS:
        raise ValueError(f"NORM must be one of {', '.join(_NORMS)}, got {cfg.NORM!r}")
    if freeze_at > NUM_STAGES + 1:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT must be 0 (nothing), 1 (the stem) or up to {NUM_STAGES + 1} "
            f"(the stem and all stages), got {freeze_at}"
        )
    norm: NormCfg = {"type": _NORMS[cfg.NORM]}
    if freeze_at > 0 and cfg.NORM != "GN":
        norm = {"type": "FrozenBN"}
    return VoVNetFast(
        body,
        input_shape.channels,
        tuple(cfg.OUT_FEATURES),
        frozen_stages=max(freeze_at, 0) - 1,
        norm_eval=False,
        norm_cfg=norm,
        with_cp=bool(cfg.get("WITH_CP", False)),
    )


def _fpn(backbone: VoVNetFast, cfg: Any, top_block: nn.Module | None) -> Any:
    return FPN(
        bottom_up=backbone,
        in_features=list(cfg.IN_FEATURES),
        out_channels=cfg.OUT_CHANNELS,
        norm=cfg.NORM,
        top_block=top_block,
        fuse_type=cfg.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_vovnet_fast_backbone(cfg: Any, input_shape: Any) -> VoVNetFast:
    """The backbone that ``MODEL.VOVNET`` describes.

    Args:
        cfg: detectron2's config.
        input_shape: a ``ShapeSpec`` of the images.

    Raises:
        UnknownSpecError, ValueError: a value of a key cannot be built; the message names it.
    """
    section = cfg.MODEL.VOVNET
    return _build(section.CONV_BODY, section, input_shape, cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_vovnet_fast_fpn_backbone(cfg: Any, input_shape: Any) -> Any:
    """With an FPN, whose last level is pooled."""
    return _fpn(build_vovnet_fast_backbone(cfg, input_shape), cfg.MODEL.FPN, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_vovnet_fast_fpn_backbone(cfg: Any, input_shape: Any) -> Any:
    """With an FPN, whose last two levels are made of stage5, as RetinaNet has them."""
    backbone = build_vovnet_fast_backbone(cfg, input_shape)
    channels = backbone.spec.feature_channels()["stage5"]
    top = LastLevels(channels, cfg.MODEL.FPN.OUT_CHANNELS, "stage5", 2)
    return _fpn(backbone, cfg.MODEL.FPN, top)


@BACKBONE_REGISTRY.register()
def build_fcos_vovnet_fast_fpn_backbone(cfg: Any, input_shape: Any) -> Any:
    """FCOS's and CenterMask's: with as many levels from p5 as ``MODEL.FCOS.TOP_LEVELS`` says."""
    levels, channels = cfg.MODEL.FCOS.TOP_LEVELS, cfg.MODEL.FPN.OUT_CHANNELS
    if levels not in (0, 1, 2):
        raise ValueError(f"MODEL.FCOS.TOP_LEVELS must be 0, 1 or 2, got {levels!r}")
    top = LastLevels(channels, channels, "p5", levels) if levels else None
    return _fpn(build_vovnet_fast_backbone(cfg, input_shape), cfg.MODEL.FPN, top)


@BACKBONE_REGISTRY.register()
def build_fcos_vovnet_fast_fpn_backbone_p6(cfg: Any, input_shape: Any) -> Any:
    """DD3D's: of ``FE.BACKBONE`` (nothing is frozen) and ``FE.FPN``, with p6 from p5."""
    backbone = _build(cfg.FE.BACKBONE.NAME, cfg.FE.BACKBONE, input_shape, 0)
    channels = cfg.FE.FPN.OUT_CHANNELS
    fpn = _fpn(backbone, cfg.FE.FPN, LastLevels(channels, channels, "p5", 1))
    fpn._size_divisibility *= 2  # DD3D pads images for p6 too.
    return fpn
