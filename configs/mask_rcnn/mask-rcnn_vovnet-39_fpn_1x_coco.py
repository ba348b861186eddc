_base_ = [
    "../_base_/models/mask-rcnn_vovnet_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]

model = dict(backbone=dict(model_name="vovnet-39"))
