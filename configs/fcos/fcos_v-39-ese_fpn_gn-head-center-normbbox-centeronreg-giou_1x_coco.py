# FCOS with VoVNetV2-39. mmdet's recipe already feeds BGR images without dividing by the standard
# deviation, which is what vovnet-detectron2 feeds its pretrained file (detectron2's defaults).
_base_ = "mmdet::fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py"
custom_imports = dict(imports=["vovnet_fast.mmdet"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VoVNetFast",
        spec_name="V-39-eSE",
        # FCOS starts at stride 8: stage2 is not handed out, and the neck skips no level.
        out_features=("stage3", "stage4", "stage5"),
        # The ImageNet file's batch norm stays as it is, as in vovnet-detectron2 (FrozenBN).
        # To train without that file: init_cfg=None, norm_eval=False, requires_grad=True.
        norm_cfg=dict(type="BN", requires_grad=False),
        norm_eval=True,
        # As linked by vovnet-detectron2; a path to a file of your own works as well.
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://dl.dropbox.com/s/q98pypf96rhtd8y/vovnet39_ese_detectron2.pth",
        ),
    ),
    neck=dict(in_channels=[512, 768, 1024], start_level=0),
)
