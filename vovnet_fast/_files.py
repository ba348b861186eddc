"""Files that are never there by half, and folders that one process at a time writes in."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has other locks.
    fcntl = None

_ENDING = ".part"


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
    handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
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
    # Windows changes the ends of lines in what is not opened as a binary file.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, os.O_RDONLY | flags)
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

    An interrupted or failed write leaves what was there before, and nothing else. What a killed
    process left (``*.part``) is removed by the next write of the same file on the same machine,
    once the system says that nobody writes to it any more. A file that is replaced hands on its
    mode and, where the process may give files away, its owner; one that a symbolic link stands
    for is replaced where it lies, and the link stays.

    Raises:
        FileNotFoundError: the folder does not exist.
        RuntimeError: another file was put in the place of the one to write to.
        OSError: ``path`` is a folder, a pipe or a device; the folder or the disk cannot be
            written.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        old = os.stat(path)
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise OSError(f"cannot write {path}: it is no file but {_kind(old.st_mode)}")
    _sweep(path)
    handle, temporary = _create(path, 0o666 if old is None else old.st_mode & 0o777 | 0o600)
    try:
        yield temporary
        if not os.path.samestat(os.fstat(handle), os.stat(temporary)):
            raise RuntimeError(f"{temporary} must be written to, and another file is there now")
        if old is not None:
            _hand_on(old, handle)
        os.fsync(handle)  # Some file systems find out only now that they are full.
        if fcntl is None:  # Windows does not rename what is open.
            os.close(handle)
            handle = -1  # Its number may soon be another file's, which stays open.
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too: clean up, and pass it on.
        if fcntl is None:
            with contextlib.suppress(OSError):
                os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        if fcntl is not None:
            os.close(handle)  # Which unlocks, and not before it has its name.


def _hand_on(old: os.stat_result, handle: int) -> None:
    """Owner and mode, of which Windows has neither."""
    if hasattr(os, "fchown"):
        with contextlib.suppress(OSError):  # Who may not give files away keeps them.
            os.fchown(handle, old.st_uid, old.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(handle, old.st_mode & 0o777)


def _kind(mode: int) -> str:
    for is_kind, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_kind(mode):
            return name
    return "a device"


@functools.cache
def _machine() -> str:
    """Of whom a lock can be asked: a network file system may keep locks on each machine alone."""
    identity = platform.node()
    with contextlib.suppress(OSError):
        identity += Path("/etc/machine-id").read_text(encoding="utf-8")
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _beginning(path: Path) -> str:
    """How the names of this machine's unfinished files of ``path`` begin; cut, as names end at 255.

    What is removed by it is dead whichever file it was of.
    """
    return f"{os.fsencode(path.name)[:200].decode(errors='ignore')}.{_machine()}."


def _create(path: Path, mode: int) -> tuple[int, str]:
    """A new file that is locked for as long as its handle is open, and what it is called.

    Made with its mode, of which the system takes the umask: reading that means changing it, for
    other threads too. And what nobody else may read, nobody else may read while it is written.
    """
    while True:
        name = str(path.parent / f"{_beginning(path)}{os.urandom(6).hex()}{_ENDING}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            handle = os.open(name, flags, mode)
        except FileExistsError:
            continue
        try:
            if _is_ours(handle, name):
                return handle, name
        except BaseException:
            os.close(handle)
            os.unlink(name)
            raise
        os.close(handle)


def _is_ours(handle: int, name: str) -> bool:
    """Lock a new file; not if it was taken for a dead one's in the moment before."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # No locks here: then nobody can take it for a dead one's.
            return True
    try:
        return os.path.samestat(os.fstat(handle), os.stat(name))
    except FileNotFoundError:
        return False


def _sweep(path: Path) -> None:
    """Remove what killed processes of this machine left of ``path``.

    A lock ends with the process that has it, however that ends: what can be locked is dead.
    """
    if fcntl is None:
        return
    begin = _beginning(path)
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(begin) and entry.name.endswith(_ENDING):
                with contextlib.suppress(OSError):
                    _remove_dead(entry.path)


def _remove_dead(path: str) -> None:
    """
    Raises:
        OSError: it is somebody's, or cannot be opened or removed.
    """
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, os.O_RDWR | flags)  # Locks of NFS want to be able to write.
    except PermissionError:
        handle = os.open(path, os.O_RDONLY | flags)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Locked by its writer until it got its name: then another may bear this one by now.
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            os.unlink(path)
    finally:
        os.close(handle)
