"""One process, watched from outside: its limit, what it prints, and all that it started.

At the limit it is interrupted, upon which pytest writes its reports, and after a grace everything
that it started is killed. So is what it leaves behind when it ends by itself. Nothing here waits
without an end, not for a process that even SIGKILL does not end, as one can be whose driver hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOKEN = "VOVNET_FAST_EVIDENCE_TOKEN"
"""Environment variable by which whatever a step has started is found, wherever it went."""

KEPT = 4 * 2**20
"""Bytes that are kept of what a process prints: half from the beginning, half from the end."""

_PATIENCE = 5.0
"""Seconds in which what was killed should be gone."""

_PR_SET_PDEATHSIG = 1


class Printed:
    """The beginning and the end of what a process prints, in bounded memory.

    Args:
        live: is given the text as it comes, whole lines where they are not endless.
        kept: bytes.
    """

    def __init__(self, live: Callable[[str], None] = lambda text: None, kept: int = KEPT) -> None:
        self._live, self._half = live, kept // 2
        self._head, self._tail, self._line = bytearray(), bytearray(), bytearray()
        self.count = 0

    def feed(self, data: bytes) -> None:
        """Take what comes next."""
        self.count += len(data)
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._half:  # Not each time: it is moved.
            del self._tail[: -self._half]
        whole = data.rfind(b"\n") + 1
        self._line += data[:whole]
        if whole or len(self._line) > self._half:
            self.flush()
        self._line += data[whole:]

    def flush(self) -> None:
        """Pass the last line on, though it has not ended."""
        if self._line:
            self._live(self._line.decode(errors="replace"))
            self._line.clear()

    def text(self) -> str:
        """All of it, with a note where something is left out."""
        tail = self._tail[-self._half :]
        left_out = self.count - len(self._head) - len(tail)
        note = f"\n[... {left_out} bytes left out ...]\n".encode() if left_out else b""
        return (bytes(self._head) + note + bytes(tail)).decode(errors="replace")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit status, negative for a signal; None if it was stopped at its limit.
        printed: the beginning and the end of stdout and stderr.
        seconds: that it took.
        survivors: what even SIGKILL has not ended so far.
    """

    code: int | None
    printed: str
    seconds: float
    survivors: tuple[int, ...] = ()


def watch(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    limit: float,
    grace: float,
    live: Callable[[str], None] = lambda text: None,
) -> Ended:
    """Run a process to its end, or to that of its time.

    Args:
        command: words.
        folder: it runs in.
        environment: all of its variables.
        limit: seconds until it is interrupted.
        grace: seconds from then until everything that it started is killed.
        live: is given what it prints as it comes.

    Raises:
        OSError: it cannot be started.
    """
    token, printed, begin = uuid.uuid4().hex, Printed(live), time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, env={**environment, TOKEN: token}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=_dying_with_its_parent(),
    )  # fmt: skip
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    in_time, survivors = False, (process.pid,)
    try:
        in_time = _follow(process, printed, begin + limit)
        if not in_time:
            process.send_signal(signal.SIGINT)
            _follow(process, printed, begin + limit + grace)
    finally:
        survivors = end_all(process, token)
        _drain(process.stdout.fileno(), printed)
        process.stdout.close()
        printed.flush()
    seconds = time.monotonic() - begin
    return Ended(process.returncode if in_time else None, printed.text(), seconds, survivors)


def _follow(process: subprocess.Popen, printed: Printed, until: float) -> bool:
    """Read what is printed until the process ends; False if the time is over before."""
    assert process.stdout is not None
    pipes = [process.stdout]
    while process.poll() is None:
        left = until - time.monotonic()
        if left <= 0:
            return False
        if not pipes:  # It has closed its output, and goes on.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(left, 0.2))
        elif select.select(pipes, [], [], min(left, 0.2))[0]:
            data = os.read(process.stdout.fileno(), 2**16)
            printed.feed(data)
            if not data:
                pipes = []
    return True


def _drain(pipe: int, printed: Printed) -> None:
    """Read what is left in the pipe, which somebody may still hold open."""
    for _ in range(1000):  # A pipe is small, unless who survived prints on.
        try:
            data = os.read(pipe, 2**16)
        except BlockingIOError:
            return
        if not data:
            return
        printed.feed(data)


def end_all(process: subprocess.Popen, token: str) -> tuple[int, ...]:
    """Kill a process, its group, and whatever has its token in the environment.

    Nothing that a step started outlives it: it would disturb the measurements. Who left the
    group, as daemons do, still has the environment.

    Returns:
        what is there nevertheless.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        found = _marked(token)
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        alive = process.poll() is None
        if not found and not alive:
            return ()
        if time.monotonic() > end:
            return tuple(found) or (process.pid,)
        time.sleep(0.02)


def _marked(token: str) -> list[int]:
    """Processes with a token in their environment; none where there is no /proc."""
    word, found = f"{TOKEN}={token}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if word in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@functools.cache
def _dying_with_its_parent() -> Callable[[], None] | None:
    """What a child calls on Linux so that a killed runner leaves no step on the device."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (AttributeError, OSError, TypeError):
        return None
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
