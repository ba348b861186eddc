"""Files that are never there by half, and folders that one process at a time writes in."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has other locks.
    fcntl = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of ``folder``, which exists.

    No lock where the system, or a network file system, has none.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # Which unlocks.


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """A file to write to beside ``path``, which takes its place when all went well.

    An interrupted or failed write leaves what was there before, and nothing else.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would surprise.
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too: clean up, and pass it on.
        os.unlink(temporary)
        raise
