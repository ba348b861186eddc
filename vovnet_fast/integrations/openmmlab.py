"""What ``VoVNetFast`` takes of OpenMMLab's packages, of whichever generation is installed.

Attributes:
    BaseModule, PretrainedInit, update_init_info: mmengine's, or mmcv 1.x's.
    REGISTRIES: where configs look for a backbone.

Raises:
    ImportError: they are missing, or do not go together; the message says what to do.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import installed


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # mmdet asserts that it likes mmcv's version.
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else "mmdet"
        raise ImportError(
            "vovnet_fast.mmdet needs mmdetection 3.x, or 2.x with mmcv 1.x, and importing "
            f"{module} failed with: {type(error).__name__}: {error}. {installed.remedy(missing)}"
        ) from error


_problems = installed.problems()
if _problems:
    raise ImportError("vovnet_fast.mmdet cannot be used here: " + ". Also, ".join(_problems))

if _import("mmdet").__version__.startswith("2."):
    _weight_init = _import("mmcv.cnn.utils.weight_init")
    BaseModule = _import("mmcv.runner").BaseModule
    REGISTRIES = (_import("mmdet.models.builder").MODELS, _import("mmcv.cnn").MODELS)
else:
    _weight_init = _import("mmengine.model.weight_init")
    BaseModule = _import("mmengine.model").BaseModule
    REGISTRIES = (_import("mmdet.registry").MODELS, _import("mmengine.registry").MODELS)

PretrainedInit = _weight_init.PretrainedInit
update_init_info = _weight_init.update_init_info
