"""VoVNet for detectron2, CenterMask2, AdelaiDet and DD3D, by the name that scripts import it by.

::

    import vovnet_fast.detectron2

    vovnet_fast.detectron2.add_vovnet_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_vovnet_fast_fpn_backbone"

This name stays. The builders, and their registration, which importing it does once, are in
:mod:`vovnet_fast.integrations.detectron2`.
"""

from .integrations.detectron2 import (
    VoVNetFast,
    add_vovnet_config,
    build_fcos_vovnet_fast_fpn_backbone,
    build_fcos_vovnet_fast_fpn_backbone_p6,
    build_retinanet_vovnet_fast_fpn_backbone,
    build_vovnet_fast_backbone,
    build_vovnet_fast_fpn_backbone,
)

__all__ = [
    "VoVNetFast",
    "add_vovnet_config",
    "build_fcos_vovnet_fast_fpn_backbone",
    "build_fcos_vovnet_fast_fpn_backbone_p6",
    "build_retinanet_vovnet_fast_fpn_backbone",
    "build_vovnet_fast_backbone",
    "build_vovnet_fast_fpn_backbone",
]
