"""Reading the pickles of ``torch.save``: tensors by key, and placeholders for everything else.

PyTorch's own names for tensors are recognised, and this file makes tensors where they stand. What
else a trainer has put beside the weights (buffers of logs, NumPy's arrays, dates, whole modules)
becomes an :class:`Inert`, and what is done to that does nothing. See :mod:`.pickles`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .pickles import STEPS, Machine

REMEDY = "Load it once where it was written, and save its state_dict alone"

_BLOCKED_MODULES = frozenset(
    ("os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "runpy", "socket", "ctypes")
)
_BLOCKED = frozenset(
    f"{module} {name}"
    for module in ("builtins", "__builtin__", "io", "_io")
    for name in ("eval", "exec", "execfile", "compile", "__import__", "open", "breakpoint", "input")
)
"""What no trainer writes. It would not run here, but who has such a file should know."""

_END = 1 << 62
_AXES = 64
_AT_LEAST = 1 << 26
"""Bytes that expanded tensors of the smallest file may take."""


class Inert:
    """Stands for something that a file names and that weights do not need."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, which was not made>"

    def why_no_weight(self) -> str:
        """What it is in the place of a weight, and what to do."""
        for part, what, remedy in _NO_WEIGHTS:
            if part in self.name:
                return f"is {what}, expected a plain tensor: {remedy} it, and save it again"
        return f"is {self}: save a plain tensor, on the CPU"


_NO_WEIGHTS = (
    ("rebuild_sparse", "a sparse tensor", "to_dense()"),
    ("rebuild_qtensor", "a quantised tensor", "dequantize()"),
)
"""What a function of torch's makes, by a part of its name, and what makes a plain tensor of it."""


class Storage(NamedTuple):
    """Memory in which tensors lie."""

    memory: torch.UntypedStorage
    dtype: torch.dtype
    numel: int


class _Kind(NamedTuple):
    """A class of storages."""

    dtype: torch.dtype


class _Function(NamedTuple):
    """One of PyTorch's, and what is done instead of calling it."""

    name: str
    make: Callable[..., Any]


class Reader(Machine):
    """What is in a pickle of ``torch.save``.

    Args:
        size: bytes of the file. Expanded tensors may be larger than what they lie in, but all
            together not many times as large as the file.
        storage: gives a storage by its key, dtype and number of elements.
    """

    remedy = REMEDY

    def __init__(self, size: int, storage: Callable[[str, torch.dtype, int], Storage]) -> None:
        super().__init__(3 * size + _AT_LEAST)
        self._storage = storage

    def named(self, name: str) -> Any:
        if name.partition(" ")[0].partition(".")[0] in _BLOCKED_MODULES or name in _BLOCKED:
            raise ValueError(
                f"it names {_dotted(name)}, for which weights have no use, and which was not run. "
                "Its author may have meant it to run on your machine: do not open it with "
                "anything else"
            )
        known = _NAMES.get(name)
        return Inert(_dotted(name)) if known is None else known

    def called(self, named: Any, arguments: tuple[Any, ...]) -> Any:
        if isinstance(named, Inert):
            return Inert(named.name)
        if not isinstance(named, _Function):
            raise ValueError(f"it calls {named!r:.80}, expected a function: it is damaged")
        if any(isinstance(argument, Inert) for argument in arguments):
            return Inert(named.name)  # A dtype, say, that this PyTorch does not know.
        try:
            return named.make(self, *arguments)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"it calls {named.name} with other arguments than PyTorch does: {error}"
            ) from error

    def built(self, value: Any, state: Any) -> None:
        if isinstance(value, OrderedDict):  # What Module.state_dict says of versions.
            if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
                value._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif not isinstance(value, Inert):
            raise ValueError(f"it sets the state of a {type(value).__name__}: it is damaged")

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.top(), Inert):
            super().extend(values)

    def update(self, values: list[Any]) -> None:
        if not isinstance(self.top(), Inert):
            super().update(values)

    def key(self, key: Any) -> bool:
        """No weights have other keys, of which some cannot be hashed and some not safely."""
        return key is None or isinstance(key, (str, int, float))

    def persistent(self, what: Any) -> Any:
        """A storage, of which a pickle says ``("storage", kind, key, device, numel)``."""
        if not isinstance(what, tuple) or not what or not isinstance(what[0], str):
            raise ValueError("it refers to something in another way than PyTorch does")
        if what[0] != "storage":  # A module's sources, once.
            return Inert(what[0][:200])
        if len(what) not in (5, 6) or type(what[2]) is not str or type(what[4]) is not int:
            raise ValueError("it refers to a storage in another way than PyTorch does")
        _, kind, key, _, numel = what[:5]
        if what[5:] not in ((), (None,)):
            raise ValueError(f"storage {key[:40]!r} is a part of another. {REMEDY}")
        if not isinstance(kind, _Kind):
            raise ValueError(f"storage {key[:40]!r} is of the class {kind!r:.200}, which is none")
        if not 0 <= numel < _END // kind.dtype.itemsize:
            raise ValueError(f"storage {key[:40]!r} has {numel} elements")
        return self._storage(key, kind.dtype, numel)

    def object(self, named: Any) -> None:
        """A placeholder for an object of a class."""
        self.push(Inert(named.name if isinstance(named, (Inert, _Function)) else "an object"))

    def add(self, values: list[Any]) -> None:
        """To a set, which is not made."""
        if not isinstance(self.top(), Inert):
            raise ValueError(f"it adds to a {type(self.top()).__name__}: it is damaged")

    def tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype
    ) -> Tensor:
        if not isinstance(storage, Storage):
            raise ValueError(f"a tensor lies in a {type(storage).__name__}, expected a storage")
        size, stride = _numbers(size, "shape"), _numbers(stride, "strides")
        if len(size) != len(stride):
            raise ValueError(f"a tensor has {len(size)} axes and {len(stride)} strides")
        room = storage.numel * storage.dtype.itemsize // dtype.itemsize
        empty = 0 in size
        steps = 1 + sum((size[i] - 1) * stride[i] for i in range(len(size)))
        last = _END if empty else room - steps
        if type(offset) is not int or not 0 <= offset <= last:
            raise ValueError(
                f"a tensor of shape {[*size[:8]]} and strides {[*stride[:8]]} begins at element "
                f"{offset!s:.40} of a storage that has {room}: it is damaged"
            )
        larger = 0 if empty else math.prod(size) - room
        self.spend(max(larger, 0) * dtype.itemsize)
        return torch.empty(0, dtype=dtype, device="cpu").set_(
            storage.memory, offset, tuple(size), tuple(stride)
        )


def _dotted(name: str) -> str:
    return name.replace(" ", ".")[:200]


def _numbers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _AXES:
        raise ValueError(f"a tensor's {what} are no tuple of at most {_AXES} numbers")
    if not all(type(n) is int and 0 <= n < _END for n in values):
        raise ValueError(f"a tensor's {what} are {[*values[:8]]!s:.80}, expected none below 0")
    return tuple(values)


# --------------------------------------------------------------------------------------
# What is called: PyTorch's functions for its tensors
# --------------------------------------------------------------------------------------


def _tensor_v1(reader: Reader, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor lies in a {type(storage).__name__}, expected a storage")
    return reader.tensor(storage, offset, size, stride, storage.dtype)


def _tensor_v2(
    reader: Reader,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: object,
    metadata: Any = None,
) -> Tensor:
    x = _tensor_v1(reader, storage, offset, size, stride)
    return _as_it_was(x, requires_grad, metadata)


def _tensor_v3(
    reader: Reader,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: object,
    dtype: torch.dtype,
    metadata: Any = None,
) -> Tensor:
    x = reader.tensor(storage, offset, size, stride, dtype)
    return _as_it_was(x, requires_grad, metadata)


def _as_it_was(x: Tensor, requires_grad: Any, metadata: Any) -> Tensor:
    """With its bits: torch.save writes what a lazy conj() or negation is a view of."""
    for name, view in (("conj", torch.conj), ("neg", torch._neg_view)):
        if isinstance(metadata, dict) and metadata.get(name) is True:
            x = view(x)
    return x.requires_grad_() if requires_grad is True else x


def _meta(reader: Reader, dtype: torch.dtype, size: Any, stride: Any, requires_grad: Any) -> Tensor:
    sizes = _numbers(size, "shape"), _numbers(stride, "strides")
    return torch.empty_strided(*sizes, dtype=dtype, device="meta")


def _parameter(
    reader: Reader, x: Tensor, requires_grad: Any, hooks: object, state: object = None
) -> nn.Parameter:
    return nn.Parameter(x.detach(), requires_grad is True)


def _of_device(
    reader: Reader, x: Tensor, dtype: torch.dtype, device: object, requires_grad: Any
) -> Tensor:
    return _as_it_was(x.to(dtype), requires_grad, None)


def _with_attributes(
    reader: Reader, function: Any, kind: object, arguments: tuple[Any, ...], state: object
) -> Any:
    if kind is not Tensor:  # What its own class would make of its numbers is not known here.
        return Inert("a subclass of torch.Tensor")
    return reader.called(function, arguments)


def _ordered(reader: Reader, pairs: Any = ()) -> OrderedDict[Any, Any]:
    reader.push(OrderedDict())
    reader.update([part for key, value in pairs for part in (key, value)])
    made: OrderedDict[Any, Any] = reader.pop()
    return made


def _size(reader: Reader, size: Any = ()) -> torch.Size:
    return torch.Size(_numbers(size, "shape"))


_KINDS = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QUInt8Storage": torch.quint8,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}

_NAMES: dict[str, Any] = {
    **{f"torch {n}": value for n, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{
        f"{module} {name}": _Kind(dtype)
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in _KINDS.items()
    },
    **{
        name: _Function(_dotted(name), function)
        for name, function in (
            ("collections OrderedDict", _ordered),
            ("torch Size", _size),
            ("torch._utils _rebuild_tensor", _tensor_v1),
            ("torch._utils _rebuild_tensor_v2", _tensor_v2),
            ("torch._utils _rebuild_tensor_v3", _tensor_v3),
            ("torch._utils _rebuild_meta_tensor_no_storage", _meta),
            ("torch._utils _rebuild_parameter", _parameter),
            ("torch._utils _rebuild_parameter_with_state", _parameter),
            ("torch._utils _rebuild_device_tensor_from_cpu_tensor", _of_device),
            ("torch._tensor _rebuild_from_type_v2", _with_attributes),
        )
    },
    "torch Tensor": Tensor,
    "torch._tensor Tensor": Tensor,
}

# --------------------------------------------------------------------------------------
# Instructions
# --------------------------------------------------------------------------------------


def _instance(reader: Reader, name: str) -> None:
    reader.since_mark()
    reader.object(reader.named(name))


def _frozen(reader: Reader) -> None:
    reader.since_mark()
    reader.push(Inert("builtins.frozenset"))


def _of_marked(reader: Reader) -> None:
    values = reader.since_mark()
    reader.object(values[0] if values else None)


Reader.steps = {
    **STEPS,
    "BINPERSID": lambda reader, _: reader.push(reader.persistent(reader.pop())),
    "NEWOBJ": lambda reader, _: reader.object(reader.some(2)[0]),
    "NEWOBJ_EX": lambda reader, _: reader.object(reader.some(3)[0]),
    "INST": _instance,
    "OBJ": lambda reader, _: _of_marked(reader),
    "EMPTY_SET": lambda reader, _: reader.push(Inert("builtins.set")),
    "ADDITEMS": lambda reader, _: reader.add(reader.since_mark()),
    "FROZENSET": lambda reader, _: _frozen(reader),
}
