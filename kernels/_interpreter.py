"""What has to be stepped around in Triton's interpreter."""

from __future__ import annotations

import functools

import triton


def repair() -> None:
    """Make scalars of Triton 3.6 usable as Python's with NumPy 2.4 and newer.

    It holds them as arrays with one element and one axis, and calls ``int()`` on them, which
    NumPy now refuses. Triton 3.7 does not: this can go when 3.6 is no longer supported.
    """
    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    @functools.wraps(patch_tensor)
    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
