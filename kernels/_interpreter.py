"""What has to be stepped around in Triton's interpreter."""

from __future__ import annotations

import functools
from typing import Any

from ._triton import VERSION


def repair() -> None:
    """Mend what kernels need of it, in the versions that lack it."""
    if VERSION < (3, 5):
        _multiply_fp64()
    if VERSION == (3, 6):
        _number_arrays_of_one()


def _multiply_fp64() -> None:
    """Let ``tl.dot`` take fp64, which before Triton 3.5 it refuses.

    NumPy, which multiplies here, takes any dtype. This can go when 3.4 is no longer supported.
    """
    import triton.language as tl
    from triton.language import semantic
    from triton.runtime.interpreter import interpreter_builder

    place: Any = getattr(semantic, "TritonSemantic", semantic)  # Triton 3.3 has functions alone.
    refusing, first = place.dot, int(place is not semantic)

    @functools.wraps(refusing)
    def dot(*args: Any) -> Any:
        lhs, rhs, acc = args[first : first + 3]
        if acc is None or {t.dtype for t in (lhs, rhs, acc)} != {tl.float64}:
            return refusing(*args)
        product = interpreter_builder.create_dot(lhs.handle, rhs.handle, acc.handle, None, 0)
        return tl.tensor(product, acc.type)

    place.dot = dot


def _number_arrays_of_one() -> None:
    """Make scalars of Triton 3.6 usable as Python's with NumPy 2.4 and newer.

    It holds them as arrays with one element and one axis, and calls ``int()`` on them, which
    NumPy now refuses. Triton 3.7 does not: this can go when 3.6 is no longer supported.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    @functools.wraps(patch_tensor)
    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
