"""Steps of a long check, one process each: run in order, within a time limit, and summed up.

A step that fails, crashes or hangs costs its own results only. ``summary.json`` and
``summary.md`` are rewritten after every one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, TIMED_OUT, MISSING, LEFT_OUT, PENDING = (
    "passed", "failed", "timed out", "missing", "left out", "pending",
)  # fmt: skip

REPORT = "report.md"
"""Of the measurements, in the folder of results; the summary links it once it is there."""

GRACE = 10.0
"""Seconds between the interrupt, upon which pytest writes its reports, and the kill."""

LEAST = 15.0
"""A step is not begun with fewer seconds left."""

_LOG_BYTES = 1 << 20  # Of each step: its beginning and its end.


@dataclass(frozen=True)
class Outcome:
    """What became of a step: its status, and a sentence about it."""

    status: str
    detail: str = ""


Reader = Callable[[int, str], Outcome]
"""Makes an outcome of the exit status and of what was printed."""


def by_exit_status(code: int, output: str) -> Outcome:
    """0 has passed; the last line that was printed is the detail."""
    lines = [line for line in output.strip().splitlines() if line.strip()]
    last = lines[-1].strip()[:300] if lines else ""
    return Outcome(PASSED if code == 0 else FAILED, last if code == 0 else f"exit {code}: {last}")


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: unique, one or two words.
        what: what it shows.
        command: words of the command, run in the root of the repository.
        limit: seconds.
        environment: variables besides those of this process.
        read: makes the outcome.
        finish: called after it, however it ended: collects what it wrote.
        missing: why it cannot run here; then it is reported and not run.
        reserve: seconds that the steps after it shall find left.
        optional: a run is good without it.
    """

    name: str
    what: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    read: Reader = by_exit_status
    finish: Callable[[], None] = lambda: None
    missing: str | None = None
    reserve: float = 0.0
    optional: bool = False


@dataclass
class Result:
    """A row of the summary. Units: seconds."""

    name: str
    what: str
    command: str
    status: str = PENDING
    detail: str = ""
    seconds: float = 0.0
    limit: float = 0.0


class Run:
    """Runs steps one after the other, and keeps the summary.

    Args:
        out: the folder of results, which exists.
        steps: in order.
        seconds: for all of them together.
        provenance: what the summary says about machine and sources.
        grace: see :data:`GRACE`.

    Attributes:
        results: one for each step.
    """

    def __init__(
        self,
        out: Path,
        steps: Sequence[Step],
        seconds: float,
        provenance: dict[str, Any],
        *,
        grace: float = GRACE,
    ) -> None:
        self.out, self.steps, self.provenance, self.grace = out, steps, provenance, grace
        self.results = [Result(step.name, step.what, _shown(step.command)) for step in steps]
        self._end = time.monotonic() + seconds
        (out / "log.txt").write_text("")
        self._write()

    def all(self) -> bool:
        """Run every step; returns whether none that is needed failed or ran out of time."""
        for step, result in zip(self.steps, self.results, strict=True):
            self._one(step, result)
            self._write()
            print(f"{result.status:9} {result.seconds:5.0f} s  {step.name}: {result.detail}")
        needed = [r for s, r in zip(self.steps, self.results, strict=True) if not s.optional]
        return not any(result.status in (FAILED, TIMED_OUT) for result in needed)

    def _one(self, step: Step, result: Result) -> None:
        if step.missing is not None:
            result.status, result.detail = MISSING, step.missing
            return
        left = self._end - time.monotonic() - self.grace - step.reserve
        result.limit = round(min(step.limit, left), 1)
        if left < min(LEAST, step.limit):
            result.status, result.detail = LEFT_OUT, f"{max(left, 0):.0f} s were left"
            return
        begin = time.monotonic()
        try:
            code, output = self._process(step, result.limit)
            outcome = step.read(1 if code is None else code, output)
            if code is None:
                outcome = Outcome(TIMED_OUT, f"stopped at its limit; {outcome.detail}")
        except Exception as error:  # Of a step that could not be started, or read.
            outcome, output = Outcome(FAILED, f"{type(error).__name__}: {error}"), ""
        try:
            step.finish()
        except Exception as error:
            outcome = Outcome(FAILED, f"{outcome.detail}; results unreadable: {error}")
        result.seconds = round(time.monotonic() - begin, 1)
        result.status, result.detail = outcome.status, redact(outcome.detail)
        self._log(result, output)

    def _process(self, step: Step, limit: float) -> tuple[int | None, str]:
        """Exit status, None if it was stopped, and what it printed."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            **step.environment,
        }
        with tempfile.TemporaryFile() as printed:  # Not a pipe, which orphans would keep open.
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            code: int | None = None
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self.grace)
            finally:
                _end_group(process)
            printed.seek(0)
            return code, printed.read().decode(errors="replace")

    def _log(self, result: Result, output: str) -> None:
        if len(output) > _LOG_BYTES:
            half = _LOG_BYTES // 2
            output = (
                f"{output[:half]}\n[... {len(output) - 2 * half} left out ...]\n{output[-half:]}"
            )
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n===== {result.name}: {result.status}, {result.seconds} s\n")
            log.write(f"$ {result.command}\n{redact(output)}\n")

    def _write(self) -> None:
        content = {
            "format": 1,
            "provenance": self.provenance,
            "steps": [asdict(result) for result in self.results],
        }
        part = self.out / "summary.json.part"
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.out / "summary.json")
        text = _markdown(self.provenance, self.results, (self.out / REPORT).exists())
        (self.out / "summary.md").write_text(text + networks(self.out / "benchmarks.json"))


def _end_group(process: subprocess.Popen) -> None:
    """Nothing that a step started outlives it: it would disturb the measurements."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def redact(text: str) -> str:
    """Without the folders of this machine."""
    for folder, short in ((str(ROOT), "."), (sys.prefix, "$PREFIX"), (str(Path.home()), "~")):
        if len(folder) > 1:
            text = text.replace(folder, short)
    return text


def _shown(command: Sequence[str]) -> str:
    words = ["python" if word == sys.executable else word for word in command]
    return redact(" ".join(words))


def _markdown(provenance: dict[str, Any], results: Sequence[Result], reported: bool) -> str:
    lines = ["# Checks with a GPU", ""]
    if reported:
        lines += [f"All measurements, in tables and pictures: [{REPORT}]({REPORT}).", ""]
    lines += [f"- {name}: {value}" for name, value in provenance.items()]
    lines += ["", "| step | what | status | seconds | detail |", "|---|---|---|---|---|"]
    for row in results:
        detail = row.detail.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {row.name} | {row.what} | {row.status} | {row.seconds:.0f} | {detail} |")
    return "\n".join(lines) + "\n"


_NETWORK_COLUMNS = {
    "ms": ("device_ms", "{:.2f}"),
    "eager's time : this": ("ratio_to_eager", "{:.2f}"),
    "peak MiB": ("peak_mib", "{:.0f}"),
    "this peak : eager's": ("peak_to_eager", "{:.2f}"),
    "kept MiB": ("kept_mib", "{:.0f}"),
    "distance": ("distance", "{:.1e}"),
}


def networks(rows: Path) -> str:
    """A table of what was measured of whole networks, compared with eager of the same run."""
    if not rows.exists():
        return ""
    found = [
        row
        for row in json.loads(rows.read_text())["benchmarks"]
        if {"ratio_to_eager", "spec"} <= set(row)
    ]
    if not found:
        return ""
    header = ["step", "network", "images", "provider", *_NETWORK_COLUMNS]
    lines = ["", "# Networks", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in found:
        cells = [row["step"], row["spec"], row["shape"], row["provider"]]
        cells += [
            shown.format(row[key]) if key in row else "" for key, shown in _NETWORK_COLUMNS.values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
