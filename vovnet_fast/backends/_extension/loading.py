"""Finding the extension, and why it is not there."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from ..._version import __version__

NAME = "vovnet_fast._C"

ISA_ENVIRONMENT = "VOVNET_FAST_CPU_ISA"

_REBUILD = (
    "pip install --force-reinstall --no-binary vovnet-fast vovnet-fast, or in a working copy: "
    "python setup.py build_ext --inplace"
)


@functools.cache
def _loaded() -> tuple[ModuleType | None, str | None]:
    """The extension, or the reason why there is none. (torch is loaded: its OpenMP is shared.)"""
    # Not find_spec(): where a working copy is installed as well, setuptools would offer its own.
    if PathFinder.find_spec(NAME, sys.modules[__name__.partition(".")[0]].__path__) is None:
        return None, (
            f"the extension {NAME} is not built, which takes a C++ compiler at installation "
            f"({_REBUILD})"
        )
    try:
        module = importlib.import_module(NAME)
    except Exception as error:  # A missing symbol, or an unknown VOVNET_FAST_CPU_ISA.
        return None, f"the extension {NAME} cannot be loaded: {error} (to rebuild it: {_REBUILD})"
    built = module.build_info()["version"]
    if built not in ("", __version__):
        return None, (
            f"the extension {NAME} was built for vovnet_fast {built}, this is {__version__} "
            f"(to rebuild it: {_REBUILD})"
        )
    return module, None


def why_not(half: str) -> str | None:
    """The reason why a half of the extension, ``cpu`` or ``cuda``, is not there, or None."""
    module, reason = _loaded()
    if module is None or hasattr(module, half):
        return reason
    return (
        f"the extension {NAME} was built without its {half} half, which takes nvcc at "
        f"installation (VOVNET_FAST_CUDA=1 says why it is not built; {_REBUILD})"
    )


def refused_isa() -> str | None:
    """That the environment asks for an instruction set that is not to be had here, or None."""
    asked = os.environ.get(ISA_ENVIRONMENT)
    _, reason = _loaded()
    return reason if asked and reason and f"{ISA_ENVIRONMENT}={asked}" in reason else None


def build_info() -> dict[str, Any] | None:
    """How the extension was built (``csrc/bindings.cpp``); None where there is none."""
    module, _ = _loaded()
    return None if module is None else module.build_info()


def load(half: str) -> ModuleType:
    """A half of the extension.

    Raises:
        RuntimeError: it is not there.
    """
    module, _ = _loaded()
    reason = why_not(half)
    if module is None or reason is not None:
        raise RuntimeError(str(reason))
    found: ModuleType = getattr(module, half)
    return found
