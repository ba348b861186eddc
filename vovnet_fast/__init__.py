"""VoVNet and VoVNetV2 backbones: every published architecture, one drop-in class.

>>> import torch, vovnet_fast
>>> model = vovnet_fast.VoVNet("V-39-eSE", out_features=("stage4", "stage5"))
>>> stage4, stage5 = model(torch.randn(1, 3, 224, 224))
"""

from . import checkpoints, ops, specs
from ._version import __version__
from .backends import BackendError, available_backends, use_backend
from .deploy.freeze import FrozenVoVNet, freeze
from .network.model import VoVNet
from .specs import VoVNetSpec

__all__ = [
    "BackendError",
    "FrozenVoVNet",
    "VoVNet",
    "VoVNetSpec",
    "__version__",
    "available_backends",
    "checkpoints",
    "freeze",
    "ops",
    "specs",
    "use_backend",
]
