"""Imported before what imports all of mmcv's operators: they are there, or names.

What tests call of them is nothing.
"""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec


def _name(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return None


if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:
    names = types.ModuleType("mmcv._ext")
    names.__spec__ = ModuleSpec("mmcv._ext", None)
    names.__getattr__ = _name
    sys.modules["mmcv._ext"] = names
