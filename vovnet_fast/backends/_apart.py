"""What could hang or crash is tried in a process of its own, which is given up in time.

A kernel whose threads wait for each other may wait for ever, and nothing but the end of its process
ends it. So :func:`attempt` starts a fresh interpreter, in which :func:`serve` goes through a series
of trials and says before each which one it is. Who hears nothing for too long ends that process,
and knows what it was at.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, Literal, NamedTuple, Optional

from .. import _processes

START_SECONDS = 300.0
"""For importing torch, which a network's file system may make long, and for a context on a GPU."""

STEP_SECONDS = 60.0
"""For one trial, each of which takes milliseconds, or a second where a module is loaded."""

_END_SECONDS = 10.0
_SHOWN = 500  # Characters of what the process printed, in a message.


class Unable(Exception):
    """Raised by a series of trials that cannot be made here; it says nothing of what is tried."""


Trials = Iterator[tuple[str, Callable[[], Optional[str]]]]
"""Of each its words, and what makes it, which returns what is wrong, or None."""


class Outcome(NamedTuple):
    """What became of a series.

    Attributes:
        kind: ``passed``; ``failed``, where something computed wrong numbers, hung or crashed; or
            ``unable``, where nothing is known.
        words: why it has not passed, or how many trials have.
    """

    kind: Literal["passed", "failed", "unable"]
    words: str


# --------------------------------------------------------------------------------------
# In the process that asks
# --------------------------------------------------------------------------------------


def attempt(
    module: str,
    given: Mapping[str, Any],
    *,
    start: float = START_SECONDS,
    step: float = STEP_SECONDS,
) -> Outcome:
    """Make the trials of a module, whose ``main`` is :func:`serve` of them, in a fresh process.

    Args:
        module: its full name.
        given: for them, as JSON can hold it.
        start: seconds until the first one has to begin,
        step: and for each of them.
    """
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                _processes.command(module, "main"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
            )
        except OSError as error:
            return Outcome("unable", f"no process could be started to try it in: {error}")
        lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(dict(given)).encode())
            return _outcome(process, lines, printed, start, step)
        finally:
            process.kill()
            # In the driver it may not end before its kernel does.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    """Pass lines on, and None at their end; in a thread, as a pipe may have nothing for ever."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _outcome(
    process: subprocess.Popen[bytes],
    lines: queue.Queue[bytes | None],
    printed: IO[bytes],
    start: float,
    step: float,
) -> Outcome:
    trial: str | None = None
    while True:
        seconds = start if trial is None else step
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            if trial is None:
                return Outcome("unable", f"the process to try it in has not begun in {seconds:g} s")
            return Outcome("failed", f"it hangs, {seconds:g} s without an end, at {trial}")
        if line is None:
            words = f"{_status(process)}{_tail(printed)}"
            if trial is None:
                return Outcome("unable", f"the process to try it in ended before it began, {words}")
            return Outcome("failed", f"it crashes, {words}, at {trial}")
        try:
            kind, words = json.loads(line)
        except ValueError:
            return Outcome("unable", f"the process to try it in is none of Python's: {line[:80]!r}")
        if kind == "begin":
            trial = words
        else:
            return Outcome(kind, words)


def _status(process: subprocess.Popen[bytes]) -> str:
    try:
        return f"status {process.wait(_END_SECONDS)}"
    except subprocess.TimeoutExpired:  # It has closed its output, and goes on.
        return "without an answer"


def _tail(printed: IO[bytes]) -> str:
    """The end of what it printed."""
    printed.seek(0)
    text = printed.read().decode(errors="replace").strip()[-_SHOWN:]
    return f" ({text})" if text else ""


# --------------------------------------------------------------------------------------
# In the process that tries
# --------------------------------------------------------------------------------------


def serve(trials: Callable[[Mapping[str, Any]], Trials]) -> None:
    """Make the trials for what is read from stdin, and write a line about each to stdout."""
    _processes.begin()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Libraries print.

    def answer(kind: str, words: str) -> None:
        answers.write(json.dumps([kind, words]) + "\n")
        answers.flush()

    answer(*_series(trials(json.load(sys.stdin)), lambda words: answer("begin", words)))


def _series(trials: Trials, begin: Callable[[str], None]) -> Outcome:
    """Up to the first that is wrong."""
    count = 0
    try:
        for words, trial in trials:
            begin(words)
            try:
                wrong = trial()
            except Unable:
                raise
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong is not None:
                return Outcome("failed", f"{wrong}, at {words}")
            count += 1
    except Exception as error:
        kind = "" if isinstance(error, Unable) else f"{type(error).__name__}: "
        return Outcome("unable", f"{kind}{error}")
    return Outcome("passed", f"{count} trials")
