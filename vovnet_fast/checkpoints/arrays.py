"""Reading pickles of NumPy arrays, as detectron2's ``.pkl`` files are, without unpickling.

The names that NumPy writes for arrays are recognised, and this file makes tensors where they stand;
every other name is refused. See :mod:`.pickles`.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pickles import STEPS, Machine

_TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""What ``torch.save`` put at the beginning before PyTorch 1.6."""

_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")

_REMEDY = (
    "Load it once where it was written, and save the weights alone, as tensors by name with "
    "torch.save or as numpy arrays by name with pickle"
)


class _Named(Enum):
    """What a pickle of arrays names, by what it is for."""

    ARRAY_CLASS = "class of arrays"
    RECONSTRUCT = "array"
    FROM_BUFFER = "array of a buffer"
    DTYPE = "dtype"
    SCALAR = "scalar"
    ENCODE = "string of bytes"
    NO_BYTES = "empty string of bytes"
    ORDERED = "OrderedDict"


_NAMES = {
    "numpy ndarray": _Named.ARRAY_CLASS,
    "numpy dtype": _Named.DTYPE,
    "_codecs encode": _Named.ENCODE,
    "__builtin__ bytes": _Named.NO_BYTES,
    "builtins bytes": _Named.NO_BYTES,
    "collections OrderedDict": _Named.ORDERED,
    **{
        f"numpy.{core}.{name}": named
        for core in ("core", "_core")  # NumPy 2 has renamed it, and reads both.
        for name, named in (
            ("multiarray _reconstruct", _Named.RECONSTRUCT),
            ("multiarray scalar", _Named.SCALAR),
            ("numeric _frombuffer", _Named.FROM_BUFFER),
        )
    },
}


class _Dtype:
    """A dtype, whose byte order is told after its kind."""

    def __init__(self, code: str) -> None:
        self.code = code


class _Array:
    """An array, whose contents are told after its class."""

    tensor: Tensor | None = None


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins so is a pickle that was not written by ``torch.save``."""
    return head[:1] in (b"\x80", b"(", b"}", b"c") and _TORCH_MAGIC not in head


def load(path: Path) -> Any:
    """Read a pickle of arrays, of any protocol, of Python 2 too. It is read whole.

    Returns:
        what it holds: numbers, strings, bytes, tuples, lists, dicts, and tensors where arrays were.

    Raises:
        ValueError: it is damaged; it names something that is no part of an array, which the
            message names; an array has another number of bytes than its shape and dtype say; it
            uses the same bytes again and again, and would be many times as large as the file.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Reader(3 * os.path.getsize(path)).run(content)


class _Reader(Machine):
    """Which makes arrays. Text becomes bytes, and bytes become arrays, each at most once."""

    steps = STEPS
    remedy = _REMEDY

    def finished(self, value: Any) -> Any:
        """An array as a tensor."""
        value = super().finished(value)
        if not isinstance(value, _Array):
            return value
        if value.tensor is None:
            raise ValueError("it has an array without contents: it is damaged")
        return value.tensor

    def named(self, name: str) -> _Named:
        if name not in _NAMES:
            raise ValueError(
                f"it names {name.replace(' ', '.')[:200]}, which is no part of an array and was "
                f"not run. {_REMEDY}"
            )
        return _NAMES[name]

    def called(self, named: Any, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(named, _Named):
            raise ValueError(f"it calls a {type(named).__name__}. {_REMEDY}")
        try:
            return _CALLS[named](self, *arguments)
        except (TypeError, AttributeError, KeyError) as error:  # Of other kinds, or not as many.
            raise ValueError(f"its {named.value} is not as NumPy writes one") from error

    def built(self, value: Any, state: Any) -> None:
        if isinstance(value, _Array) and isinstance(state, tuple) and len(state) in (4, 5):
            shape, dtype, fortran, data = state[-4:]
            value.tensor = self.tensor(data, dtype, shape, bool(fortran))
        elif isinstance(value, _Dtype) and isinstance(state, tuple) and state[1:2]:
            if state[1] not in ("<", ">", "=", "|"):
                raise ValueError("the byte order of a dtype is none")
            value.code = state[1] + value.code.lstrip("<>=|")
        elif not isinstance(value, dict):  # Whose attributes are no weights.
            raise ValueError(f"it sets the state of a {type(value).__name__}. {_REMEDY}")

    def tensor(self, data: Any, dtype: Any, shape: Any, fortran: bool) -> Tensor:
        if isinstance(data, str):  # Python 2 had one kind of string.
            self.spend(len(data))
            data = data.encode("latin-1")
        if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
            raise ValueError(f"an array's contents are a {type(data).__name__}, expected bytes")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array's shape is no tuple of sizes")
        kind = np.dtype(dtype.code)
        size = math.prod(shape) * kind.itemsize
        if size != len(data):
            raise ValueError(
                f"an array of shape {list(shape[:8])} and dtype {kind} has {len(data)} bytes, "
                f"expected {size}"
            )
        self.spend(size)
        array = np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(np.array(array, kind.newbyteorder("="), order="C"))


# --------------------------------------------------------------------------------------
# What is called: NumPy's functions for its arrays
# --------------------------------------------------------------------------------------


def _reconstruct(reader: _Reader, kind: object, shape: object, code: object) -> _Array:
    if kind is not _Named.ARRAY_CLASS:
        raise ValueError("it has an array of another class than numpy.ndarray")
    return _Array()


def _from_buffer(reader: _Reader, data: object, dtype: object, shape: object, order: str) -> _Array:
    array = _Array()
    array.tensor = reader.tensor(data, dtype, shape, order == "F")
    return array


def _dtype(reader: _Reader, code: str, align: object = False, copy: object = True) -> _Dtype:
    if not _DTYPE.fullmatch(code):
        raise ValueError(f"it has an array of dtype {code[:40]!r}, expected one of numbers")
    return _Dtype(code)


def _scalar(reader: _Reader, dtype: object, data: object) -> Any:
    return reader.tensor(data, dtype, (), False).item()


def _encode(reader: _Reader, text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("it has bytes that are written in another way than pickles have")
    reader.spend(len(text))
    return text.encode("latin-1")


def _no_bytes(reader: _Reader) -> bytes:
    return b""


def _ordered(reader: _Reader, pairs: Any = ()) -> dict[Any, Any]:
    reader.spend(len(pairs))
    reader.push({})
    reader.update([part for key, value in pairs for part in (key, value)])
    return reader.pop()


_CALLS: dict[_Named, Callable[..., Any]] = {
    _Named.RECONSTRUCT: _reconstruct,
    _Named.FROM_BUFFER: _from_buffer,
    _Named.DTYPE: _dtype,
    _Named.SCALAR: _scalar,
    _Named.ENCODE: _encode,
    _Named.NO_BYTES: _no_bytes,
    _Named.ORDERED: _ordered,
}
