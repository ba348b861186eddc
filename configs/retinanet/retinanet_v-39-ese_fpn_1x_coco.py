# RetinaNet with VoVNetV2-39.
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["vovnet_fast.mmdet"], allow_failed_imports=False)

model = dict(
    # What vovnet-detectron2 feeds its pretrained file (detectron2's defaults): BGR, and no
    # division by the standard deviation.
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(
        _delete_=True,
        type="VoVNetFast",
        spec_name="V-39-eSE",
        # RetinaNet starts at stride 8: stage2 is not handed out, and the neck skips no level.
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

# Half of the two-stage detectors' rate, as mmdet trains RetinaNet.
optim_wrapper = dict(optimizer=dict(lr=0.01))
