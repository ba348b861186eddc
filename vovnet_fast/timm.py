"""timm's VoVNets as networks of this package, under names that end in ``_fast``.

>>> import timm, vovnet_fast.timm
>>> model = timm.create_model("ese_vovnet39b_fast", features_only=True)

This name stays. The classes, and their registration, which importing it does once, are in
:mod:`vovnet_fast.integrations.timm`.
"""

from .integrations.timm import NAMES, VoVNetFast, VoVNetFastFeatures

__all__ = ["NAMES", "VoVNetFast", "VoVNetFastFeatures"]
