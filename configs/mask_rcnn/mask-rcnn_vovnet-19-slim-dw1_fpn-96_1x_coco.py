# The light one: the smallest VoVNet, and a neck and heads that do not dwarf it.
_base_ = [
    "../_base_/models/mask-rcnn_vovnet_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]

model = dict(
    backbone=dict(model_name="vovnet-19-slim-dw1"),
    neck=dict(in_channels=[56, 128, 192, 256], out_channels=96),
    rpn_head=dict(in_channels=96, feat_channels=96),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=96),
        bbox_head=dict(in_channels=96, fc_out_channels=384),
        mask_roi_extractor=dict(out_channels=96),
        mask_head=dict(in_channels=96, conv_out_channels=128),
    ),
)
