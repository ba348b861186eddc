"""The folder of results: at most eight files, none larger than 16 MiB, no folders in it.

So it can be attached to a report, sent by mail, or brought back from a machine of a cluster.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

from .records import LIMIT, redact, rows, tests, write

PICTURE, TUNING, ARCHIVE = "networks.png", "tuning.json", "rest.tar.xz"
FILES = (
    "summary.md", "summary.json", "rows.json", "tests.json", "log.txt", PICTURE, TUNING, ARCHIVE,
)  # fmt: skip
"""All files there can be."""

_TEXTS = (".txt", ".xml", ".md", ".json", ".jsonl", ".log", ".py")

_LOGGED = 2**19
"""Bytes of log.txt that a step can have; of what it prints, beginning and end are kept there."""


class Log:
    """What the steps print, as it comes.

    Args:
        path: of the file, which is begun anew.
        limit: bytes of the file.
        each: bytes of a step, as long as there is room.
    """

    def __init__(self, path: Path, *, limit: int = LIMIT, each: int = _LOGGED) -> None:
        self._path, self._limit, self._each = path, limit, each
        self._room = self._written = 0
        self._cut = False
        path.write_text("")

    def begin(self, name: str, command: str) -> None:
        """The next step begins."""
        size = self._path.stat().st_size
        # Of what is left, so that the last step of many still has some.
        self._room, self._cut = min(self._each, (self._limit - size) // 4), False
        self._written = 0
        self._append(f"\n===== {name}\n$ {command}\n")

    def live(self, text: str) -> None:
        """The step prints; the first half of its room is written at once."""
        room = self._room // 2 - self._written
        if self._cut or room <= 0:
            self._cut = True
            return
        content = redact(text).encode()
        self._cut = len(content) > room
        text = content[:room].decode(errors="ignore")
        self._written += len(text.encode())
        self._append(text)

    def end(self, name: str, status: str, printed: str) -> None:
        """The step has ended; of what did not fit, the end is written."""
        if self._cut:
            text = redact(printed).encode()[self._written :]
            kept = text[-max(self._room // 2 - 200, 1) :].decode(errors="ignore")
            self._append(f"\n[... {len(text) - len(kept.encode())} bytes left out ...]\n{kept}")
        self._append(f"\n===== {name}: {status}\n")

    def _append(self, text: str) -> None:
        with contextlib.suppress(OSError), self._path.open("ab") as file:  # The disk may be full.
            file.write(text.encode()[: max(self._limit - file.tell(), 0)])


class Folder:
    """Where a run's results go, and what is beside it while it runs.

    Args:
        out: the folder of results.
        scratch: for what is packed at the end, and what is thrown away.

    Attributes:
        rest: what goes into the archive.
        tests, rows: the results.
        log: of the steps, once there is the folder.
    """

    log: Log

    def __init__(self, out: Path, scratch: Path) -> None:
        self.out, self.scratch, self.rest = out, scratch, scratch / "rest"
        self.tests, self.rows = tests(out), rows(out)

    def create(self, provenance: dict[str, Any]) -> None:
        """Make the folder, with nothing in it; files of an earlier run are removed.

        Args:
            provenance: of the rows.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (self.out / name).unlink(missing_ok=True)
        (self.rest / "logs").mkdir(parents=True)
        self.log = Log(self.out / "log.txt")
        self.tests.rewrite({"format": 1}, [])
        head = {"format": 1, "provenance": provenance, "clocks": {}, "left_out": []}
        self.rows.rewrite(head, [])

    def picture(self, path: Path) -> None:
        """Take a picture of the networks, unless it is too large."""
        if path.exists() and path.stat().st_size <= LIMIT:
            shutil.copyfile(path, self.out / PICTURE)

    def pack(self) -> list[str]:
        """Write the archive of :attr:`rest`; returns what was too large for it.

        Raises:
            OSError: it cannot be written.
        """
        files = [path for path in self.rest.rglob("*") if path.is_file() and not path.is_symlink()]
        files.sort(key=lambda path: (path.stat().st_size, path))
        left_out: list[str] = []
        while True:
            content = self._packed(files)
            if len(content) <= LIMIT:
                write(self.out / ARCHIVE, content)
                return left_out
            left_out.append(str(files.pop().relative_to(self.rest)))

    def _packed(self, files: list[Path]) -> bytes:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:xz", preset=3) as archive:
            for path in files:
                data = _nameless(path)
                member = tarfile.TarInfo(str(path.relative_to(self.rest)))
                member.size, member.mtime = len(data), path.stat().st_mtime
                archive.addfile(member, io.BytesIO(data))
        return content.getvalue()


def _nameless(path: Path) -> bytes:
    """A file without folders of this machine and, of JUnit's, without its name."""
    data = path.read_bytes()
    if path.suffix not in _TEXTS:
        return data
    text = data.decode(errors="replace")
    if path.suffix == ".xml":
        text = re.sub(r' hostname="[^"]*"', "", text)
    return redact(text).encode()
