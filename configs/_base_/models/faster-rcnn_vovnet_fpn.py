# Faster R-CNN with a VoVNet of the seed (mmdetection-vovnet, for mmdet 1.2). The configs that
# inherit it give the backbone its `model_name`.
#
# Losses, proposals and anchors at the border are the seed's. Where mmdet's values stay: RoIAlign
# with half-pixel alignment and adaptive sampling (seed: unaligned, two samples), boxes without the
# extra pixel of mmdet 1.x, the background as the last class and not the first, no low-quality
# matches in the RoI head.
_base_ = "mmdet::_base_/models/faster-rcnn_r50_fpn.py"
custom_imports = dict(imports=["vovnet_fast.mmdet"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VoVNetFast",
        # The seed came without weights (where it names torchvision://resnet50, no key matches), so
        # training starts from noise and batch norm has to learn its statistics. With weights in
        # init_cfg, norm_eval=True keeps theirs. On several GPUs with two images each,
        # norm_cfg=dict(type="SyncBN") makes the statistics less noisy.
        norm_eval=False,
    ),
    neck=dict(in_channels=[256, 512, 768, 1024]),
    rpn_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1.0 / 9.0)),
    roi_head=dict(bbox_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1.0))),
    train_cfg=dict(rpn=dict(allowed_border=0), rpn_proposal=dict(max_per_img=2000)),
)
