"""Imported before mmdet 2.x, which imports all of mmcv 1.x's operators: they are there, or names.

What tests call of them is nothing. Raises ImportError under another generation of mmcv.
"""

import importlib.util
import sys
import types

import mmcv

if not mmcv.__version__.startswith("1."):
    raise ImportError(f"mmcv is {mmcv.__version__}, expected 1.x")


def _name(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return None


if importlib.util.find_spec("mmcv._ext") is None:
    names = types.ModuleType("mmcv._ext")
    names.__getattr__ = _name
    sys.modules["mmcv._ext"] = names
