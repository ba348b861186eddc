"""``VoVNetFast`` for mmdetection, under the name that configs import it by.

In a config::

    custom_imports = dict(imports=["vovnet_fast.mmdet"], allow_failed_imports=False)

This name stays. The class, and its registration, which importing it does once, are in
:mod:`vovnet_fast.integrations.mmdet`; ``VoVNetFastQuantized``, a backbone in eight bits, in
:mod:`vovnet_fast.integrations.quantized`.
"""

from .integrations.mmdet import VoVNetFast
from .integrations.quantized import VoVNetFastQuantized

__all__ = ["VoVNetFast", "VoVNetFastQuantized"]
