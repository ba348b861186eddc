"""Carrying Triton's cache to another machine, and what was found in it there.

A packed cache is one file: of each kernel the binary and its description, the C modules that
launch them, and a manifest of what they were made by and for. Only where all of that fits
would Triton look for these very kernels.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import lzma
import re
import sys
import sysconfig
import tarfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .. import _provenance as provenance
from .._files import replacing
from .._version import __version__
from . import jobs

FORMAT = 1
ENDING = ".tar.xz"
MARKER = "vovnet_fast-"
"""How names of files begin that :mod:`vovnet_fast.first_use` keeps in the cache."""

_MANIFEST = "manifest.json"
_MODULES = ("cuda_utils", "__triton_launcher")
_MEMBER = re.compile(rf"[A-Z2-7]+/\w[\w.-]*|{MARKER}\w+\.json")


class CacheMismatch(ValueError):
    """A packed cache was made by or for something else."""


class Contents(NamedTuple):
    """What is in a packed cache.

    Attributes:
        manifest: what it was made by and for, as JSON has it.
        kernels: names by key, which is the folder's name in Triton's cache.
        modules: C modules, for one version of Python.
        size: bytes of the file.
    """

    manifest: dict[str, Any]
    kernels: dict[str, str]
    modules: int
    size: int

    def __str__(self) -> str:
        archs = ", ".join(self.manifest["compiler"]) or "no architecture"
        return (
            f"{len(self.kernels)} kernels for {archs} and {self.modules} modules for "
            f"{self.manifest['python']}, {self.size / 1e6:.1f} MB"
        )


def kernels(folder: Path) -> dict[str, str]:
    """The kernels of a cache folder: names by key. None, where there is no folder."""
    found = {}
    for path in sorted(folder.glob("*/__grp__*.json")):
        found[path.parent.name] = path.name.removeprefix("__grp__").removesuffix(".json")
    return found


def pack(folder: Path, file: Path, keys: Collection[str] | None = None) -> Contents:
    """Write the kernels of a cache folder into one file, the same bytes for the same kernels.

    Args:
        folder: Triton's cache (``TRITON_CACHE_DIR``).
        file: to write, ``.tar.xz``.
        keys: of the kernels (:func:`kernels`); all by default.

    Raises:
        ValueError: another ending, a key that is not there, or nothing to pack.
        OSError: a file cannot be read or written.
    """
    if not file.name.endswith(ENDING):
        raise ValueError(f"a packed cache ends in {ENDING}, got {file}")
    found = kernels(folder)
    absent = set(keys or ()) - set(found)
    if absent:
        raise ValueError(f"{folder} has no kernels {', '.join(sorted(absent)[:3])}: compile first")
    chosen = {key: name for key, name in found.items() if keys is None or key in keys}
    if not chosen:
        raise ValueError(f"{folder} has no kernels to pack: compile first")
    members: dict[str, bytes] = {}
    archs = set()
    for key, name in chosen.items():
        description = json.loads((folder / key / f"{name}.json").read_text(encoding="utf-8"))
        archs.add(f"sm_{description['target']['arch']}")
        # Where the machine that compiled it has its libraries is nobody's concern.
        description["extern_libs"] = [[n, Path(p).name] for n, p in description["extern_libs"]]
        members[f"{key}/{name}.json"] = json.dumps(description).encode()
        members[f"{key}/{name}.cubin"] = (folder / key / f"{name}.cubin").read_bytes()
    modules = [path for name in _MODULES for path in folder.glob(f"*/{name}{_module_ending()}")]
    for path in [*sorted(modules), *sorted(folder.glob(f"{MARKER}*.json"))]:
        members[str(path.relative_to(folder))] = path.read_bytes()
    manifest = {
        "format": FORMAT,
        "package": __version__,
        "commit": provenance.sources()["commit"],
        **_made_by(archs),
        "kernels": chosen,
    }
    members = {_MANIFEST: json.dumps(manifest, indent=1).encode(), **members}
    with (
        replacing(file) as temporary,
        lzma.open(temporary, "wb", preset=9) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for name, content in members.items():
            archive.addfile(_member(name, content), io.BytesIO(content))
    return Contents(manifest, chosen, len(modules), file.stat().st_size)


def _member(name: str, content: bytes) -> tarfile.TarInfo:
    """With no time and no owner, so that the same contents are the same file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info


def unpack(file: Path, folder: Path, arch: str | None = None) -> Contents:
    """Put the kernels of a packed cache into a cache folder, which is made if need be.

    Kernels that are there already stay. Modules for another version of Python are left out,
    and counted out.

    Args:
        file: what :func:`pack` wrote.
        folder: Triton's cache (``TRITON_CACHE_DIR``).
        arch: the GPU that is to run them, such as ``sm_90``.

    Raises:
        CacheMismatch: it was made by another Triton, of other sources, for other GPUs or with
            other settings; the message names all that differs.
        ValueError: it is no packed cache.
        OSError: a file cannot be read or written.
    """
    try:
        with tarfile.open(file, "r:xz") as archive:
            members = {info.name: _read(archive, info) for info in archive}
        manifest = json.loads(members.pop(_MANIFEST))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, expected {FORMAT}")
        wrong = [name for name in members if not _MEMBER.fullmatch(name)]
        if wrong:
            raise ValueError(f"it has a file {wrong[0]!r}")
    except (tarfile.TarError, lzma.LZMAError, KeyError, EOFError, ValueError) as error:
        raise ValueError(
            f"{file} is no packed cache: {error}; make one with vovnet-fast compile --pack"
        ) from error
    problems = mismatches(manifest, arch)
    if problems:
        raise CacheMismatch(f"{file} does not fit here: {'; '.join(problems)}")
    folder.mkdir(parents=True, exist_ok=True)
    modules = 0
    for name, content in members.items():
        if Path(name).name.startswith(_MODULES):
            if not name.endswith(_module_ending()):
                continue
            modules += 1
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            with replacing(path) as temporary:
                Path(temporary).write_bytes(content)
    for key, name in manifest["kernels"].items():
        _finish(folder / key, name)
    return Contents(manifest, manifest["kernels"], modules, file.stat().st_size)


def _read(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(info)
    if content is None:
        raise ValueError(f"{info.name} is no file")
    return content.read()


def _finish(folder: Path, name: str) -> None:
    """Write what Triton looks for first, and last: where the kernel's files are."""
    group = folder / f"__grp__{name}.json"
    if not group.exists():
        names = (f"{name}.cubin", f"{name}.json")
        files = {file: str(folder / file) for file in names}
        with replacing(group) as temporary:
            Path(temporary).write_text(json.dumps({"child_paths": files}), encoding="utf-8")


def mismatches(manifest: dict[str, Any], arch: str | None = None) -> list[str]:
    """What of a manifest does not fit this process, in words; Python's version may differ.

    Args:
        manifest: of :class:`Contents`.
        arch: the GPU that is to run the kernels.
    """
    here = _made_by(manifest["compiler"])
    found = []
    for name, what in (
        ("triton", "Triton's version"),
        ("build", "Triton's build"),
        ("compiler", "ptxas"),
        ("sources", "the kernels' sources"),
        ("settings", "Triton's environment variables"),
        ("platform", "the platform"),
    ):
        if manifest[name] != here[name]:
            found.append(f"{what} {manifest[name]}, here {here[name]}")
    if arch is not None and arch not in manifest["compiler"]:
        found.append(f"kernels for {', '.join(manifest['compiler'])}, wanted {arch}")
    return found


def _made_by(archs: Iterable[str]) -> dict[str, Any]:
    """What decides which kernels Triton looks for, and which modules Python can import."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime.build import platform_key
    from triton.runtime.cache import triton_key

    return {
        "sources": sources(),
        "triton": triton.__version__,
        "build": _short(triton_key()),
        "compiler": {arch: _compiler(arch) for arch in sorted(archs)},
        "settings": dict(get_cache_invalidating_env_vars()),
        "platform": platform_key(),
        "python": sys.implementation.cache_tag,
    }


@functools.cache
def sources() -> str:
    """A digest of the files that kernels are defined in."""
    folder = Path(__file__).parents[1] / "kernels"
    return _short("".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))))


def _compiler(arch: str) -> str:
    """Of the assembler that Triton uses for ``arch``."""
    from triton.compiler import make_backend

    return _short(make_backend(jobs.target(arch)).hash())


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _module_ending() -> str:
    ending: Any = sysconfig.get_config_var("EXT_SUFFIX")
    return str(ending)


class Log(NamedTuple):
    """Kernels that processes looked for, as ``VOVNET_FAST_COMPILE_LOG`` noted them.

    Attributes:
        found: how many times one was in Triton's cache.
        compiled: names of those that had to be compiled after all.
        seconds: that this took.
    """

    found: int
    compiled: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.found} kernels found in the cache, {len(self.compiled)} compiled after all, "
            f"in {self.seconds:.1f} s"
        )


def log(file: Path) -> Log:
    """Add up a log; an empty one, where nothing was logged.

    Raises:
        ValueError: it is no such log.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    try:
        rows = [json.loads(line) for line in lines]
        compiled = [(name, seconds) for name, found, seconds in rows if not found]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no log of kernels: {error}") from error
    names = tuple(name for name, _ in compiled)
    return Log(len(rows) - len(compiled), names, sum(seconds for _, seconds in compiled))
