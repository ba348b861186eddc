"""The backbones as classes of other code bases, under those code bases' own conventions.

=============  ======================================================================
:mod:`.mmdet`  mmdetection 3.x and what builds on mmengine; configs import it as
               ``vovnet_fast.mmdet``
:mod:`.timm`   timm; imported as ``vovnet_fast.timm``
=============  ======================================================================

Nothing else in the package imports them, nor the code bases that they are for.
"""
