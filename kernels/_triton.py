"""What older versions of Triton lack, each with the version at which it can go."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton 3.3, which has no bulk copies that a launch describes.
    TensorDescriptor = None

ROUNDS_TO_TF32 = hasattr(TensorDescriptor, "round_f32_to_tf32")
"""Whether bulk copies can round, as they can since Triton 3.7. Tensor cores only truncate."""

VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))

AHEAD = VERSION >= (3, 6)
"""Whether kernels can be compiled before they are launched, where the launch finds them."""

_knobs: Any = getattr(triton, "knobs", None)  # Triton 3.3 has environment variables alone.


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which was decided when it was imported."""
    if _knobs is None:
        return os.environ.get("TRITON_INTERPRET", "0") == "1"
    return bool(_knobs.runtime.interpret)


if interpreted() and VERSION < (3, 6):
    TensorDescriptor = None  # The interpreter takes the strides of a descriptor for bytes.


def packed(
    kernel: Any, backend: Any, binder: Any, arguments: dict[str, Any], options: dict[str, int]
) -> tuple[dict[str, str], dict[Any, Any], Any]:
    """Types, constants and what may be assumed of arguments, as ``ASTSource`` takes them.

    ``binder`` is what ``create_function_from_signature`` made of the kernel.
    """
    bound, *found = binder(**arguments)
    if VERSION >= (3, 5):
        every = {**arguments, **options}
        _, types, constants, assumed = kernel._pack_args(backend, every, bound, found[0], options)
        return types, constants, assumed
    values = list(bound.values())
    if VERSION < (3, 3):
        names = [p.name for p in kernel.params if not p.is_constexpr]
        types = dict(zip(names, found[0]))
        attributes = backend.get_attrs_descriptor(kernel.params, tuple(values))
        fixed = attributes.get_constants()
        constants = {
            p.name: value
            for p, value in zip(kernel.params, values)
            if p.is_constexpr or p.num in fixed or value is None
        }
        return {k: "*i8" if v == "none" else v for k, v in types.items()}, constants, attributes
    from triton._utils import find_paths_if, get_iterable_path

    types, assumed = zip(*found[0])
    signature = dict(zip((p.name for p in kernel.params), types))
    paths = find_paths_if(types, lambda _, kind: kind == "constexpr")
    constants = {path: get_iterable_path(values, path) for path in paths}
    paths = find_paths_if(assumed, lambda _, what: isinstance(what, str))
    return (
        signature,
        constants,
        {path: backend.parse_attr(get_iterable_path(assumed, path)) for path in paths},
    )


def cache_folder() -> Path:
    """Triton's cache: ``TRITON_CACHE_DIR``, by default ``~/.triton/cache``."""
    if _knobs is None:
        from triton.runtime.cache import default_cache_dir

        return Path(os.environ.get("TRITON_CACHE_DIR") or default_cache_dir()).absolute()
    return Path(_knobs.cache.dir).absolute()
