"""Whether an optional package can be used, or the reason why not."""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

_REMEDIES = {
    "PIL": "pip install pillow",
    "cudnn": 'pip install "vovnet-fast[cudnn]"',
    "matplotlib": 'pip install "vovnet-fast[bench]"',
    "mmcv": 'pip install "vovnet-fast[onedl]"',
    "mmdet": 'pip install "vovnet-fast[onedl]"',
    "onnx": 'pip install "vovnet-fast[onnx]"',
    "onnxruntime": 'pip install "vovnet-fast[onnx]"',
}
"""Other than to install the package by its name."""

_FOR_ONE_TORCH = ("timm", "torchvision")
"""Of which pip would take the newest, and upgrade torch to it."""

_LEAST = {
    "triton": (
        (3, 2),
        "the first that has what the kernels need: install torch 2.6 or newer, which brings it",
    ),
}
"""Versions before which a package counts as missing, and why."""


@functools.cache
def why_not(module: str) -> str | None:
    """The reason why a module of an optional package cannot be used here, or None.

    To find out, it is imported: a package may be there and broken, which a search for it does
    not see, by a version of something below it that does not fit, or by a library that its
    binaries lack. It then raises anything, and counts as missing.
    """
    package = module.partition(".")[0]
    try:
        found = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return f"{package} is not installed ({remedy(package)})"
        first = str(error).strip().partition("\n")[0][:200]
        return f"{module} cannot be imported: {type(error).__name__}: {first}"
    return _too_old(found)


def remedy(package: str) -> str:
    """How to install a package, with the torch that is there: some are for one torch alone."""
    if package in _FOR_ONE_TORCH:
        import torch

        return f'pip install {package} "torch=={torch.__version__.partition("+")[0]}"'
    return _REMEDIES.get(package, f"pip install {package}")


def _too_old(module: Any) -> str | None:
    name = module.__name__
    if name not in _LEAST:
        return None
    least, why = _LEAST[name]
    if tuple(map(int, re.findall(r"\d+", module.__version__)[:2])) >= least:
        return None
    return f"{name} {module.__version__} is older than {least[0]}.{least[1]}, {why}"
