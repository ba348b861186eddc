"""What was compiled on another machine, for this one: a wheel of the extension, Triton's cache.

``python benchmarks/carry.py`` makes both. Here they are taken where they fit, and what does not fit
is compiled after all, which the summary says with the reason.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from .records import ROOT

COMPILE_LOG = "VOVNET_FAST_COMPILE_LOG"
"""Environment variable: where processes note the kernels that they found, and compiled."""

_SOURCES = ("csrc", "native_build")
_MODULE = "vovnet_fast/_C."


def digest() -> str:
    """Of everything that the extension is compiled of: twelve digits."""
    found = hashlib.sha256()
    for name in _SOURCES:
        for path in sorted((ROOT / name).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    found.update((ROOT / "vovnet_fast" / "_version.py").read_bytes())
    return found.hexdigest()[:12]


def build_tag() -> str:
    """What stands in a wheel's name for :func:`digest`; build tags begin with a digit."""
    return f"1_{digest()}"


def wheel_problem(wheel: Path) -> str | None:
    """The reason why a wheel's extension is not this machine's, or None."""
    if not wheel.is_file():
        return f"there is no wheel {wheel.name}"
    if len(parts := wheel.stem.split("-")) != 6:
        return f"{wheel.name} does not say of which sources it is"
    if parts[2] != build_tag():
        return f"the wheel is of other sources: {parts[2]}, these are {build_tag()}"
    try:
        module = _module(wheel)
    except zipfile.BadZipFile as error:
        return f"{wheel.name} is damaged: {error}"
    if module is None:
        return f"{wheel.name} holds no extension for {sys.implementation.cache_tag}"
    return None


def _module(wheel: Path) -> str | None:
    """The extension's name in a wheel, if this Python can load it."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            suffix = name.removeprefix(_MODULE[:-1])
            if name.startswith(_MODULE) and suffix in importlib.machinery.EXTENSION_SUFFIXES:
                return name
    return None


def place(wheel: Path, folder: Path) -> Path:
    """Put a wheel's extension into a package's folder; returns the file."""
    name = _module(wheel)
    assert name is not None, "ask wheel_problem first"
    target = folder / PurePosixPath(name).name
    with zipfile.ZipFile(wheel) as archive:
        # Not over the old file, which a process may have loaded.
        part = target.with_name(f"{target.name}.part")
        part.write_bytes(archive.read(name))
        part.chmod(0o755)
        part.replace(target)
    return target


def kernels(log: Path) -> str:
    """How many kernels were found compiled, and how many were compiled after all; or nothing."""
    if not log.exists():
        return ""
    entries = []
    for line in log.read_text().splitlines():
        name, found, seconds = json.loads(line)
        entries.append((name, bool(found), float(seconds)))
    hits = sum(found for _, found, _ in entries)
    seconds = sum(seconds for _, found, seconds in entries if not found)
    return (
        f"kernels: {hits} times one was found compiled, {len(entries) - hits} were compiled "
        f"after all, in {seconds:.0f} s of a core"
    )


# --------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------


def _loads() -> str | None:
    """The reason why the extension's CUDA half is not there, found out in a new process."""
    code = "from vovnet_fast.backends import _extension; print(_extension.why_not('cuda') or '')"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else None


def extension(wheel: Path | None) -> int:
    """Take the extension from a wheel, or build it; prints which, and why."""
    reason = "no wheel was given" if wheel is None else wheel_problem(wheel)
    if wheel is not None and reason is None:
        placed = place(wheel, ROOT / "vovnet_fast")
        reason = _loads()
        if reason is None:
            print(f"from the wheel {wheel.name}: its Python and its sources are these")
            return 0
        placed.unlink()
        reason = f"the wheel's does not load here: {reason}"
    print(f"built here, as {reason}", flush=True)
    words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    code = subprocess.run(words, cwd=ROOT).returncode
    if code == 0:
        print(f"built here, as {reason}")
    return code


def cache(packed: Path) -> int:
    """Unpack a cache of compiled kernels to where Triton looks for them."""
    from vovnet_fast.compiling import cache as compiled  # type: ignore[import-not-found]

    print(compiled.unpack(packed, Path(os.environ["TRITON_CACHE_DIR"])))
    return 0


def main(arguments: Sequence[str]) -> int:
    """``python -m benchmarks.evidence.carried extension [WHEEL]``, or ``cache FILE``."""
    what, *files = arguments
    if what == "cache":
        return cache(Path(files[0]))
    return extension(Path(files[0]) if files else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
