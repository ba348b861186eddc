"""Reading files of ``torch.save``: where in them their storages lie.

Since PyTorch 1.6 that is a zip archive, in which nothing is compressed: ``data.pkl``, and a member
``data/KEY`` for each storage. Before, it was five pickles one after another, and the storages after
them. A storage is memory of its own or a window on the file, and of the former only those are read
that the wanted part of the file lies in: a trainer's file is three times as large as its weights.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .tensors import REMEDY, Reader, Storage

ZIP = b"PK\x03\x04"
_LOCAL_HEADER = 30
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def load(path: Path, *, mmap: bool, part: Callable[[Any], Any]) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Args:
        path: the file.
        mmap: storages are windows on the file, where it has them as this machine would.
        part: picks what is wanted out of what the file holds.

    Returns:
        that part: numbers, strings, bytes, tuples, lists, dicts, tensors, and an
        :class:`~.tensors.Inert` for everything else.

    Raises:
        ValueError: it is damaged, which the message describes; it names something that is there
            to do harm; it is a program, or compressed, or of before PyTorch 0.2.
    """
    with open(path, "rb") as file:
        head = file.read(len(ZIP))
        file.seek(0)
        source = (_Zip if head == ZIP else _Legacy)(file, path, mmap)
        found = part(source.content())
        source.fill(found)
        return found


class _Source:
    """Storages by key.

    Args:
        file: is read from.
        path: its name.
        mmap: whether storages may be windows on it.
    """

    def __init__(self, file: IO[bytes], path: Path, mmap: bool) -> None:
        self.file, self.path, self.mmap = file, path, mmap
        self.size = self.room = os.path.getsize(path)
        self.order = "little"
        self.storages: dict[str, Storage] = {}
        self.offsets: dict[str, int] = {}

    def content(self) -> Any:
        """What the file holds, in storages that are yet to be filled."""
        raise NotImplementedError

    def locate(self, key: str, size: int) -> int | None:
        """Where a storage lies, None where that is not known yet."""
        raise NotImplementedError

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> Storage:
        if key not in self.storages:
            size = numel * dtype.itemsize
            self.room -= size
            if self.room < 0:
                raise ValueError(
                    f"its storages are larger than the file, the last of them {key[:40]!r} of "
                    f"{size} bytes: it is damaged"
                )
            self.storages[key] = Storage(self._memory(key, size, dtype), dtype, numel)
        found = self.storages[key]
        if found[1:] != (dtype, numel):
            raise ValueError(
                f"storage {key[:40]!r} has {found.numel} elements of {found.dtype}, and {numel} of "
                f"{dtype} elsewhere: it is damaged"
            )
        return found

    def _memory(self, key: str, size: int, dtype: torch.dtype) -> torch.UntypedStorage:
        offset = self.locate(key, size)
        if offset is not None and size:
            if self.mmap and self.order == sys.byteorder and offset % dtype.itemsize == 0:
                return self._window[offset : offset + size]
            self.offsets[key] = offset
        return torch.UntypedStorage(size)  # Of which no page is there before it is written to.

    @functools.cached_property
    def _window(self) -> torch.UntypedStorage:
        """All of the file. Writing to it does not change the file."""
        window: Any = torch.UntypedStorage.from_file(str(self.path), False, self.size)
        return window

    def fill(self, part: Any) -> None:
        """Read the storages that tensors in ``part`` lie in."""
        wanted = _memories(part)
        for key, storage in self.storages.items():
            if key in self.offsets and storage.numel and storage.memory.data_ptr() in wanted:
                self._read(key, storage)

    def _read(self, key: str, storage: Storage) -> None:
        raw = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage.memory)
        self.file.seek(self.offsets[key])
        if self.file.readinto(raw.numpy().data) != len(raw):  # type: ignore[attr-defined]
            raise ValueError(f"storage {key[:40]!r} goes beyond its end: it was cut")
        if self.order != sys.byteorder:
            width = storage.dtype.itemsize // (2 if storage.dtype.is_complex else 1)
            raw.copy_(raw.view(-1, width).flip(1).flatten())


def _memories(part: Any) -> set[int]:
    """Where the storages begin of all tensors in a value."""
    found, seen, waiting = set(), set(), [part]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if not value.is_meta:
                found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
            if isinstance(value, OrderedDict):
                waiting.extend(vars(value).values())
    return found


class _Zip(_Source):
    """Of PyTorch 1.6 and newer."""

    def content(self) -> Any:
        try:
            with zipfile.ZipFile(self.file) as archive:
                self._members = {member.filename: member for member in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ValueError(
                f"it is no whole zip archive ({error}): it may have been cut"
            ) from error
        roots = [name[: -len("data.pkl")] for name in self._members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(
                f"it is a zip archive with {len(roots)} members data.pkl, expected one as "
                "torch.save writes it"
            )
        self._root = roots[0]
        if f"{self._root}constants.pkl" in self._members:
            raise ValueError(
                "it is a program of TorchScript, expected tensors by name: torch.save its "
                "state_dict()"
            )
        if f"{self._root}byteorder" in self._members:
            order = self._bytes("byteorder", 16)
            if order not in (b"little", b"big"):
                raise ValueError(f"its member byteorder says {order!r}, expected little or big")
            self.order = order.decode()
        return Reader(self.size, self.storage).run(io.BytesIO(self._bytes("data.pkl", self.size)))

    def _bytes(self, name: str, most: int) -> bytes:
        offset, size = self._extent(name)
        if size > most:
            raise ValueError(f"its member {name} has {size} bytes, expected at most {most}")
        self.file.seek(offset)
        content = self.file.read(size)
        if len(content) != size:
            raise ValueError(f"its member {name} is shorter than it says: it was cut")
        return content

    def _extent(self, name: str) -> tuple[int, int]:
        """Where a member begins, and its bytes. None goes beyond the file."""
        member = self._members.get(self._root + name)
        if member is None:
            raise ValueError(f"it has no member {name[:80]}: it is damaged")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(
                f"its member {name[:80]} is compressed or encrypted, and torch.save does neither: "
                "unpack it, and pack it again without (zip -0)"
            )
        self.file.seek(member.header_offset)
        header = self.file.read(_LOCAL_HEADER)
        lengths = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        offset = member.header_offset + _LOCAL_HEADER + sum(lengths)
        if not header.startswith(ZIP) or offset + member.file_size > self.size:
            raise ValueError(f"its member {name[:80]} is not where it should be: it is damaged")
        return offset, member.file_size

    def locate(self, key: str, size: int) -> int:
        offset, there = self._extent(f"data/{key}")
        if there != size:
            raise ValueError(
                f"its member data/{key[:40]} has {there} bytes, expected {size}: it is damaged"
            )
        return offset


class _Legacy(_Source):
    """Of before PyTorch 1.6."""

    def content(self) -> Any:
        def plain() -> Any:
            return Reader(self.size, self._no_storage).run(self.file)

        try:
            magic = plain()
        except Exception as error:
            raise ValueError("it does not begin as a file of torch.save does") from error
        protocol, system = (plain(), plain()) if magic == _MAGIC else (None, None)
        if protocol != _PROTOCOL or not isinstance(system, dict):
            raise ValueError(f"it is no file of torch.save, or of before PyTorch 0.2. {REMEDY}")
        self.order = "little" if system.get("little_endian", True) else "big"
        content = Reader(self.size, self.storage).run(self.file)
        keys = plain()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its list of storages is none: it is damaged")
        for key in keys:
            self._pass(key)
        for key in self.storages:
            if key not in self.offsets:
                raise ValueError(
                    f"it has no storage {key[:40]!r}, in which tensors lie: it is damaged"
                )
        return content

    def _no_storage(self, key: str, dtype: torch.dtype, numel: int) -> Storage:
        raise ValueError(f"storage {key[:40]!r} is where no tensors are: it is damaged")

    def _pass(self, key: str) -> None:
        """The next storage: how many elements, and their bytes."""
        numel = int.from_bytes(self.file.read(8), self.order, signed=True)  # type: ignore[arg-type]
        storage = self.storages.get(key)
        if storage is None or storage.numel != numel:
            raise ValueError(f"storage {key[:40]!r} has {numel} elements, which nothing refers to")
        self.offsets[key] = self.file.tell()
        self.file.seek(numel * storage.dtype.itemsize, os.SEEK_CUR)
        if self.file.tell() > self.size:
            raise ValueError(f"storage {key[:40]!r} goes beyond its end: it was cut")

    def locate(self, key: str, size: int) -> None:
        return None
