"""Imported before mmdet 2.x: mmcv 1.x's operators, or names. ImportError under mmcv 2.x."""

import mmcv

if not mmcv.__version__.startswith("1."):
    raise ImportError(f"mmcv is {mmcv.__version__}, expected 1.x")

from tests.integrations import mmcv_operators  # noqa: F401
