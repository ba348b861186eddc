"""Reading pickles of NumPy arrays, as detectron2's ``.pkl`` files are, without unpickling.

A pickle is a program. Here it is read as a list of instructions, of which those that make numbers,
strings, lists, tuples, dicts and arrays are carried out by this file alone. Nothing that a pickle
names is imported or called: the names that NumPy writes for arrays are recognised, every other is
refused.
"""

from __future__ import annotations

import math
import mmap
import os
import pickletools
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""What ``torch.save`` put at the beginning before PyTorch 1.6."""

_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")

_REMEDY = (
    "Load it once where it was written, and save the weights alone, as tensors by name with "
    "torch.save or as numpy arrays by name with pickle"
)

_MARK = object()


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
        return _Reader(os.path.getsize(path)).run(content)


class _Reader:
    """The stack and the memo of a pickle.

    Args:
        size: bytes of the file. What is made of them is bounded by it: one string of bytes can be
            used many times.
    """

    def __init__(self, size: int) -> None:
        self._room = 3 * size  # Text becomes bytes, and bytes become arrays, each at most once.
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in _CONSTANTS:
                self._stack.append(argument)
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                raise ValueError(
                    f"it has the instruction {opcode.name}, for which arrays have no use. {_REMEDY}"
                )
        return _finished(self.pop())  # genops raises where there is no STOP.

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack:
            raise ValueError("it takes something from an empty stack: it is damaged")
        return self._stack.pop()

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def since_mark(self) -> list[Any]:
        found = []
        while (value := self.pop()) is not _MARK:
            found.append(_finished(value))
        return found[::-1]

    def some(self, number: int) -> list[Any]:
        return [_finished(self.pop()) for _ in range(number)][::-1]

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self.top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"it remembers nothing under the number {index}: it is damaged")
        self.push(self._memo[index])

    def extend(self, values: list[Any]) -> None:
        into = self.top()
        if not isinstance(into, list):
            raise ValueError(f"it appends to a {type(into).__name__}: it is damaged")
        into.extend(values)

    def update(self, values: list[Any]) -> None:
        into = self.top()
        if not isinstance(into, dict) or len(values) % 2:
            raise ValueError(f"it sets items of a {type(into).__name__}: it is damaged")
        for i in range(0, len(values), 2):
            key, value = values[i : i + 2]
            if not isinstance(key, (str, int)):
                raise ValueError(f"a dict has a {type(key).__name__} for a key, expected a string")
            into[key] = value

    def named(self, name: str) -> None:
        if name not in _NAMES:
            raise ValueError(
                f"it names {name.replace(' ', '.')[:200]}, which is no part of an array and was "
                f"not run. {_REMEDY}"
            )
        self.push(_NAMES[name])

    def call(self) -> None:
        arguments, named = self.pop(), self.pop()
        if not isinstance(named, _Named) or not isinstance(arguments, tuple):
            raise ValueError(f"it calls a {type(named).__name__}. {_REMEDY}")
        try:
            self.push(_CALLS[named](self, *arguments))
        except (TypeError, AttributeError, KeyError) as error:  # Of other kinds, or not as many.
            raise ValueError(f"its {named.value} is not as NumPy writes one") from error

    def build(self) -> None:
        state = self.pop()
        built = self.top()
        if isinstance(built, _Array) and isinstance(state, tuple) and len(state) in (4, 5):
            shape, dtype, fortran, data = state[-4:]
            built.tensor = self.tensor(data, dtype, shape, bool(fortran))
        elif isinstance(built, _Dtype) and isinstance(state, tuple) and state[1:2]:
            if state[1] not in ("<", ">", "=", "|"):
                raise ValueError("the byte order of a dtype is none")
            built.code = state[1] + built.code.lstrip("<>=|")
        elif not isinstance(built, dict):  # Whose attributes are no weights.
            raise ValueError(f"it sets the state of a {type(built).__name__}. {_REMEDY}")

    def spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise ValueError("it uses the same bytes again and again: it is no file of weights")

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


def _finished(value: Any) -> Any:
    """As it goes into a container: an array as a tensor."""
    if value is _MARK:
        raise ValueError("it takes a mark for a value: it is damaged")
    if not isinstance(value, _Array):
        return value
    if value.tensor is None:
        raise ValueError("it has an array without contents: it is damaged")
    return value.tensor


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


# --------------------------------------------------------------------------------------
# Instructions
# --------------------------------------------------------------------------------------


def _new_dict(reader: _Reader) -> None:
    values = reader.since_mark()
    reader.push({})
    reader.update(values)


def _stack_name(reader: _Reader) -> None:
    module, name = reader.some(2)
    reader.named(f"{module} {name}")


# Whose argument is the value.
_CONSTANTS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)

_STEPS: dict[str, Callable[[_Reader, Any], None]] = {
    "MARK": lambda reader, _: reader.push(_MARK),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "POP": lambda reader, _: (reader.pop(), None)[1],
    "POP_MARK": lambda reader, _: (reader.since_mark(), None)[1],
    "DUP": lambda reader, _: reader.push(reader.top()),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "DICT": lambda reader, _: _new_dict(reader),
    "LIST": lambda reader, _: reader.push(reader.since_mark()),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.since_mark())),
    "TUPLE1": lambda reader, _: reader.push(tuple(reader.some(1))),
    "TUPLE2": lambda reader, _: reader.push(tuple(reader.some(2))),
    "TUPLE3": lambda reader, _: reader.push(tuple(reader.some(3))),
    "APPEND": lambda reader, _: reader.extend(reader.some(1)),
    "APPENDS": lambda reader, _: reader.extend(reader.since_mark()),
    "SETITEM": lambda reader, _: reader.update(reader.some(2)),
    "SETITEMS": lambda reader, _: reader.update(reader.since_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Reader.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Reader.get),
    "GLOBAL": _Reader.named,
    "STACK_GLOBAL": lambda reader, _: _stack_name(reader),
    "REDUCE": lambda reader, _: reader.call(),
    "BUILD": lambda reader, _: reader.build(),
}
