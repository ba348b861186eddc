# mmdet's 1x schedule with the warm-up and the gradient clipping of the seed (mmdetection-vovnet).
_base_ = "mmdet::_base_/schedules/schedule_1x.py"

param_scheduler = [
    dict(type="LinearLR", start_factor=1.0 / 3.0, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
