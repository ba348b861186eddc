"""The backbones as classes of other code bases, under those code bases' own conventions.

===================  =================================================================
:mod:`.detectron2`   detectron2, CenterMask2, AdelaiDet and DD3D; imported as
                     ``vovnet_fast.detectron2``
:mod:`.mmdet`        mmdetection 3.x and what builds on mmengine, mmdetection 2.x on
                     mmcv 1.x; configs import it as ``vovnet_fast.mmdet``
:mod:`.quantized`    the same in eight bits, for detectors that predict
:mod:`.openmmlab`    what that takes of whichever of them is installed
:mod:`.installed`    which are installed, and whether they go together
:mod:`.whole`        a detector's state dict, and whether the backbone is in it
:mod:`.timm`         timm; imported as ``vovnet_fast.timm``
===================  =================================================================

Nothing else in the package imports them, nor the code bases that they are for, but the
doctor, which asks what is installed.
"""
