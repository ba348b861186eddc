# RetinaNet with VoVNet-19-slim-dw-eSE on scenes of handwritten digits, from scratch.
#
# `make demo` trains it and shows the result. With mmdet's own tools, write the
# scenes first:
#
#   python demo/scenes.py --out data/digits
#   python tools/train.py configs/digits/retinanet_vovnet_digits.py
#
# Everything is small: 128x128 images, 64 channels in neck and head, two
# convolutions a branch. Two CPU cores train it in minutes.

custom_imports = dict(imports=["vovnet_fast.mmdet"], allow_failed_imports=False)
default_scope = "mmdet"

spec = "V-19-slim-dw-eSE"
data_root = "data/digits"
classes = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
image_size = 128
batch_size = 8
max_iters = 1000
warmup_iters = 100

norm_cfg = dict(type="BN", requires_grad=True)

model = dict(
    type="RetinaNet",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    # From scratch the batch norms have to learn their statistics: norm_eval=False.
    backbone=dict(type="VoVNetFast", spec_name=spec, out_indices=(1, 2, 3), norm_eval=False),
    neck=dict(
        type="FPN",
        in_channels=[256, 384, 512],
        out_channels=64,
        num_outs=3,
        norm_cfg=norm_cfg,
    ),
    bbox_head=dict(
        # The convolutions are shared by the levels, their batch norms are not: one norm's
        # running statistics would be a mixture that fits none of the levels.
        type="RetinaSepBNHead",
        num_ins=3,
        num_classes=len(classes),
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        # Anchors of 24 and 34 pixels at stride 8, 48 and 68 at 16, 96 and 136 at
        # 32, taller than wide as digits are.
        anchor_generator=dict(
            type="AnchorGenerator",
            octave_base_scale=3,
            scales_per_octave=2,
            ratios=[1.6],
            strides=[8, 16, 32],
        ),
        bbox_coder=dict(
            type="DeltaXYWHBBoxCoder",
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[0.1, 0.1, 0.2, 0.2],
        ),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="SmoothL1Loss", beta=0.11, loss_weight=0.3),
    ),
    train_cfg=dict(
        assigner=dict(
            type="MaxIoUAssigner",
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0,
            ignore_iof_thr=-1,
        ),
        # Focal loss needs every anchor; PseudoSampler leaves them all in.
        sampler=dict(type="PseudoSampler"),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type="nms", iou_threshold=0.5),
        max_per_img=100,
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    # No flip: a mirrored digit is no digit.
    dict(type="Resize", scale=(image_size, image_size), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(image_size, image_size), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]

# Images are small and quick to read: workers would only take cores from the training.
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="train.json",
        data_prefix=dict(img="train/"),
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="val.json",
        data_prefix=dict(img="val/"),
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=data_root + "/val.json", metric="bbox", classwise=True
)
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=warmup_iters),
    dict(
        type="CosineAnnealingLR",
        by_epoch=False,
        begin=warmup_iters,
        end=max_iters,
        T_max=max_iters - warmup_iters,
        eta_min=0.0,
    ),
]

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=max_iters, max_keep_ckpts=1),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="DetVisualizationHook"),
)
custom_hooks = [dict(type="CheckInvalidLossHook", interval=50)]
visualizer = dict(
    type="DetLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer"
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
