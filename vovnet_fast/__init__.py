"""VoVNet and VoVNetV2 backbones: every published architecture, one drop-in class.

>>> import torch, vovnet_fast
>>> model = vovnet_fast.VoVNet("V-39-eSE", out_features=("stage4", "stage5"))
>>> stage4, stage5 = model(torch.randn(1, 3, 224, 224))
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import ops, specs
from ._version import __version__
from .backends import BackendError, available_backends, use_backend
from .network.model import VoVNet
from .specs import VoVNetSpec

if TYPE_CHECKING:
    from . import checkpoints
    from .deploy.file import load_frozen
    from .deploy.freeze import FrozenVoVNet, freeze
    from .quantization.file import load_quantized
    from .quantization.quantize import QuantizedVoVNet, quantize

__all__ = [
    "BackendError",
    "FrozenVoVNet",
    "QuantizedVoVNet",
    "VoVNet",
    "VoVNetSpec",
    "__version__",
    "available_backends",
    "checkpoints",
    "freeze",
    "load_frozen",
    "load_quantized",
    "ops",
    "quantize",
    "specs",
    "use_backend",
]

_DEFERRED = {
    "FrozenVoVNet": ".deploy.freeze",
    "freeze": ".deploy.freeze",
    "load_frozen": ".deploy.file",
    "load_quantized": ".quantization.file",
    "QuantizedVoVNet": ".quantization.quantize",
    "quantize": ".quantization.quantize",
}
"""Imported when they are first asked for, as :mod:`.checkpoints` is. The ops are not: a program
that was exported with them finds them once the package is imported."""


def __getattr__(name: str) -> Any:
    if name == "checkpoints":
        return importlib.import_module(".checkpoints", __name__)
    if name not in _DEFERRED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_DEFERRED[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
