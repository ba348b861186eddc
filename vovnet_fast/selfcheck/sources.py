"""What computes a function of a backend, and a digest of it.

A verdict holds for the code that it was passed on. That is what the backend says in its
``sources``, and for kernels what their files import from each other. Files are read once, when
a verdict about them is first asked for.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .calls import backend_module

_PACKAGE = Path(__file__).parents[1]
_IMPORTS = re.compile(r"^\s*from \.(?:(\w+) import| import \(?([^()\n]+)|)", re.MULTILINE)


@functools.cache
def digest(backend: str, function: str) -> str:
    """Of all that :func:`files` finds; versions of a working copy have one number."""
    found = hashlib.sha256()
    for path in files(backend, function):
        found.update(_read(path).digest)
    return found.hexdigest()[:12]


def files(backend: str, function: str) -> list[Path]:
    """The files that compute a function of a backend with static choices, sorted."""
    found: set[Path] = set()
    waiting = list(_paths(backend_module(backend).sources(function)))
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _read(path).imported
    return sorted(found)


def _paths(names: Iterable[str]) -> Iterator[Path]:
    """Of modules, by their names in the package; the extension is one."""
    for name in names:
        stem = _PACKAGE.joinpath(*name.split("."))
        yield from [stem.with_suffix(".py")] if name != "_C" else _PACKAGE.glob("_C.*")


class _File(NamedTuple):
    """The digest of a file, and the kernels' modules that it imports, if it is one itself."""

    digest: bytes
    imported: tuple[Path, ...]


@functools.cache
def _read(path: Path) -> _File:
    content = path.read_bytes()
    found = _IMPORTS.findall(content.decode()) if path.parent.name == "kernels" else []
    parts = [part.split() for one, several in found for part in (one or several).split(",")]
    imported = tuple(path.with_name(f"{words[0]}.py") for words in parts if words)
    return _File(hashlib.sha256(content).digest(), imported)
