"""Lists of results in JSON files that grow by an entry at a time, and are whole after each.

The text is ``{..., "tests": [``, an entry a line, and the closing brackets. A new entry takes the
place of the brackets and brings its own, in one write: whoever is killed, and whenever, the file
holds every entry before. Several processes may append to one file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has other locks.
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]

FOLDER, STEP = "VOVNET_FAST_EVIDENCE", "VOVNET_FAST_EVIDENCE_STEP"
"""Environment variables: where a step's results go, and what the step is called."""

LIMIT = 16 * 2**20
"""Bytes of a file."""

_TAIL = b"\n]}\n"

Entry = dict[str, Any]


def redact(text: str) -> str:
    """Without the folders of this machine."""
    for folder, short in ((str(ROOT), "."), (sys.prefix, "$PREFIX"), (str(Path.home()), "~")):
        if len(folder) > 1:
            text = text.replace(folder, short)
    return text


class Records:
    """One such file.

    Args:
        path: of the file.
        key: of its list.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def append(self, entry: Entry, *, sync: bool = True) -> None:
        """Add an entry, which is on the disk when this returns, unless ``sync`` is false.

        Raises:
            OSError: it cannot be written. The file is as it was.
        """
        line = redact(json.dumps(entry)).encode()
        with _locked(self.path.parent):
            if os.path.getsize(self.path) + len(line) + len(_TAIL) > LIMIT:
                self._rewrite(*self.read())
            handle = os.open(self.path, os.O_RDWR)
            try:
                end = os.fstat(handle).st_size - len(_TAIL)
                if os.pread(handle, len(_TAIL), end) != _TAIL:  # Its writer died on a full disk.
                    self._rewrite(*self.read())
                    stale, handle = handle, os.open(self.path, os.O_RDWR)
                    os.close(stale)
                    end = os.fstat(handle).st_size - len(_TAIL)
                first = os.pread(handle, 1, end - 1) == b"["
                _replace_tail(handle, end, (b"\n" if first else b",\n") + line + _TAIL)
            except BaseException:
                os.close(handle)
                raise
        try:
            if sync:  # Not within the lock, for which others wait.
                os.fsync(handle)
        finally:
            os.close(handle)

    def read(self) -> tuple[Entry, list[Entry]]:
        """What precedes the list, and its entries; a damaged line is left out."""
        first, *lines = self.path.read_bytes().splitlines() or [b""]
        head: Entry = {}
        with contextlib.suppress(ValueError):
            head = json.loads(first + b"]}")
            head.pop(self.key, None)
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                entry = json.loads(line.rstrip(b","))
                if isinstance(entry, dict):
                    found.append(entry)
        return head, found

    def rewrite(self, head: Entry, entries: Sequence[Entry]) -> None:
        """Write all of it anew, in one move; of what is too large, the middle is left out.

        Raises:
            OSError: it cannot be written. The file is as it was.
        """
        with _locked(self.path.parent):
            self._rewrite(head, entries)

    @contextlib.contextmanager
    def edited(self) -> Iterator[tuple[Entry, list[Entry]]]:
        """Head and entries to change inside, while nobody else writes; then :meth:`rewrite`."""
        with _locked(self.path.parent):
            head, entries = self.read()
            yield head, entries
            self._rewrite(head, entries)

    def _rewrite(self, head: Entry, entries: Sequence[Entry]) -> None:
        lines = [redact(json.dumps(entry)) for entry in entries]
        room = LIMIT // 4 * 3  # Else every later entry would have it written anew.
        if sum(map(len, lines)) > room:
            lines = _without_middle(lines, room)
        first = redact(json.dumps({**head, self.key: []}))[:-2]
        body = "\n" + ",\n".join(lines) if lines else ""
        write(self.path, first.encode() + body.encode() + _TAIL)


def _without_middle(lines: list[str], room: int) -> list[str]:
    """As many lines of the beginning and of the end as fit, and how many were left out."""
    low, high = 0, len(lines)
    while low < high and room > 0:
        room -= len(lines[low])
        low += 1
        if low < high and room > 0:
            high -= 1
            room -= len(lines[high])
    note = json.dumps({"note": f"{high - low} entries left out: the file would be too large"})
    return [*lines[:low], note, *lines[high:]]


def _replace_tail(handle: int, end: int, text: bytes) -> None:
    try:
        written = os.pwrite(handle, text, end)
        if written != len(text):
            raise OSError(errno.ENOSPC, "no space left for all of an entry")
    except OSError:
        os.ftruncate(handle, end)
        os.pwrite(handle, _TAIL, end)  # Where it had been before, so that there is room.
        raise


def write(path: Path, content: bytes) -> None:
    """Write a file in one move: it is there as a whole, or as it was.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing in ``folder``; no lock where the system has none."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network file systems cannot.
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # Which unlocks.


def tests(folder: Path) -> Records:
    """The results of tests and checks."""
    return Records(folder / "tests.json", "tests")


def rows(folder: Path) -> Records:
    """The measurements, as ``vovnet-fast bench report`` reads them."""
    return Records(folder / "rows.json", "benchmarks")


class Sink:
    """Where a step puts its results as they come, or nowhere outside of a run.

    What cannot be written is said on stderr, and costs the step nothing else.

    Args:
        folder: of the results, or None.
        step: the name of the step.
    """

    def __init__(self, folder: Path | None, step: str) -> None:
        self._folder, self._step = folder, step

    @classmethod
    def here(cls) -> Sink:
        """As the environment of this process says."""
        folder = os.environ.get(FOLDER)
        return cls(Path(folder) if folder else None, os.environ.get(STEP, ""))

    def began(self, test: str) -> None:
        """A test begins: if it never ends, this is known of it."""
        self._add(tests, {"test": test, "outcome": "began"}, sync=False)

    def ended(self, test: str, outcome: str, seconds: float, why: str = "", **more: Any) -> None:
        """A test ended: ``passed``, ``failed``, ``skipped`` or ``error``."""
        entry = {"test": test, "outcome": outcome, "seconds": round(seconds, 3)}
        self._add(tests, entry | ({"why": why} if why else {}) | more)

    def row(self, name: str, row: Entry) -> None:
        """A measurement."""
        self._add(rows, {"name": name, **row})

    def _add(self, kind: Any, entry: Entry, **options: Any) -> None:
        if self._folder is None:
            return
        try:
            kind(self._folder).append({"step": self._step, **entry}, **options)
        except OSError as error:
            print(f"cannot keep a result: {error}: {json.dumps(entry)[:300]}", file=sys.stderr)
