# VoVNetFast as the image backbone of PETR, StreamPETR, DETR3D and BEVFormer (mmdet3d 1.x).
#
# Not a config to train: mmdet3d is needed for the rest of the model. The shortest way to use it
# is a config of your own that inherits the published one and swaps the type; all the arguments
# of VoVNetCP are understood as they stand:
#
#     _base_ = "./petr_vovnet_gridmask_p4_800x320.py"
#     # A list in a config replaces the inherited one: repeat what the base imports.
#     custom_imports = dict(
#         imports=["projects.PETR.petr", "vovnet_fast.mmdet"], allow_failed_imports=False)
#     model = dict(img_backbone=dict(type="VoVNetFast", with_cp=True))
#
# Code bases on mmcv 1.x and mmdet 2.x (StreamPETR's own repository) write the same; where they
# import plugins by `plugin = True`, custom_imports works beside it.
custom_imports = dict(imports=["vovnet_fast.mmdet"], allow_failed_imports=False)

# PETR and StreamPETR. Strides 16 and 32, 768 and 1024 channels: CPFPN stays as it is, with
# in_channels=[768, 1024].
img_backbone = dict(
    type="VoVNetFast",
    spec_name="V-99-eSE",
    norm_eval=True,
    frozen_stages=-1,
    input_ch=3,
    out_features=("stage4", "stage5"),
    # VoVNetCP always checkpoints activations in training; here it is a choice. It saves the memory
    # of the blocks' activations and pays by running the blocks twice: leave it out if all fits.
    with_cp=True,
)
model = dict(img_backbone=img_backbone)

# DETR3D: strides 4 to 32, FPN in_channels=[256, 512, 768, 1024]. frozen_stages counts as there:
# 1 freezes the stem and stage2.
detr3d_img_backbone = dict(
    img_backbone, frozen_stages=1, out_features=("stage2", "stage3", "stage4", "stage5")
)

# BEVFormer, which takes strides 8 to 32 and lets FPN add one more (num_outs=4):
# in_channels=[512, 768, 1024], start_level=0. bevformer_small takes out_features=("stage5",)
# alone, with in_channels=[1024]; those of its ResNet were [2048].
bevformer_img_backbone = dict(img_backbone, out_features=("stage3", "stage4", "stage5"))

# The weights. Either the file is loaded into the whole detector; its keys begin with
# "img_backbone.", and one that fills only part of the backbone is refused:
load_from = "ckpts/fcos3d_vovnet_imgbackbone-remapped.pth"

# or the backbone alone is filled from a detector's file (drop load_from then):
img_backbone_from_detector = dict(
    img_backbone,
    init_cfg=dict(type="Pretrained", checkpoint=load_from, prefix="img_backbone"),
)

# Mean, standard deviation and channel order belong to the weights, not to the backbone: keep
# those of the config that you start from. PETR and DETR3D feed BGR, StreamPETR feeds RGB.
