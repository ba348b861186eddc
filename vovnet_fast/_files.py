"""Files that are never there by half, and folders that one process at a time writes in."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has other locks.
    fcntl = None


LOCK_SECONDS = 5.0
"""How long one process waits for another that writes in the same folder, which takes it moments."""

_MOST_BYTES = 64 << 20


@contextlib.contextmanager
def locked(folder: Path, seconds: float | None = None) -> Iterator[None]:
    """Keep other processes that ask for it out of ``folder``, which exists.

    No lock where the system, or a network file system, has none.

    Args:
        folder: the folder.
        seconds: to wait for whoever holds it, which may be stopped; :data:`LOCK_SECONDS` by
            default, and ``math.inf`` for as long as it takes.

    Raises:
        TimeoutError: another process held it for all of that time.
        OSError: there is no such folder.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(_NoLocks):
            _wait_for(handle, folder, LOCK_SECONDS if seconds is None else seconds)
        yield
    finally:
        os.close(handle)  # Which unlocks.


class _NoLocks(Exception):
    """The file system has none."""


def _wait_for(handle: int, folder: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise TimeoutError(
                    f"another process has held the lock on {folder} for {seconds:g} s: end it if "
                    "it is stopped, or use another folder"
                ) from None
        except OSError as error:
            raise _NoLocks from error
        time.sleep(0.01)


def read_text(path: Path) -> str:
    """The text of a file that any process may have put there.

    What is no regular file is not waited for: a pipe has no end, and a device may have none.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, is no regular file or is larger than 64 MiB.
        UnicodeDecodeError: it is no text.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no regular file")
        if found.st_size > _MOST_BYTES:
            raise OSError(f"{path} has {found.st_size} bytes, expected at most {_MOST_BYTES}")
        return file.read().decode()


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
