"""Runs steps one after the other, within a time, and keeps the folder of results up to date."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import records, summary
from .folder import Folder
from .processes import Ended, watch
from .records import ROOT, Entry, redact
from .steps import (
    BEGAN,
    FAILED,
    LEFT_OUT,
    MISSING,
    RUNNING,
    TIMED_OUT,
    Outcome,
    Step,
    by_exit_status,
)
from .summary import Result

GRACE = 5.0
"""Seconds between the interrupt, upon which pytest writes its reports, and the kill."""

_PACES = (0.5, 3.0)
"""By how much a measured step can change the estimates of its kind."""

_SHOWN = 9000
"""Characters of the summary that are printed at the end."""


class Run:
    """A run of steps.

    Args:
        folder: of the results.
        steps: in order.
        seconds: for all of them together.
        provenance: what the summary says about machine and sources.
        grace: see :data:`GRACE`.
        notes: asked for lines of the summary each time that it is written.

    Attributes:
        results: one for each step.
    """

    def __init__(
        self,
        folder: Folder,
        steps: Sequence[Step],
        seconds: float,
        provenance: dict[str, Any],
        *,
        grace: float = GRACE,
        notes: Callable[[], list[str]] = list,
    ) -> None:
        self.folder, self.steps, self.provenance, self.grace = folder, steps, provenance, grace
        self._notes = notes
        self.results = [
            Result(step.name, step.what, _shown(step.command), estimate=step.estimate)
            for step in steps
        ]
        self._end = time.monotonic() + seconds
        self._paces: dict[str, float] = {}
        self._write()

    def all(self) -> bool:
        """Run every step; returns whether none that is needed failed or ran out of time."""
        try:
            for step, result in zip(self.steps, self.results, strict=True):
                self._one(step, result)
                self._write()
                print(
                    f"{result.status:9} {result.seconds:5.0f} s  {step.name}: {result.detail}",
                    flush=True,
                )
        except KeyboardInterrupt:  # What there is, is packed all the same.
            for result in self.results:
                if result.status == RUNNING:
                    result.status, result.detail = FAILED, "the run was interrupted"
            self._write()
        self._pack()
        needed = [r for s, r in zip(self.steps, self.results, strict=True) if not s.optional]
        return not any(result.status in (FAILED, TIMED_OUT) for result in needed)

    def show(self) -> str:
        """The tables that matter, for whoever sees only the end of what was printed."""
        text = (self.folder.out / "summary.md").read_text()
        found = self.folder.tests.read()[1]
        return "\n\n".join([*summary.printed(text, _SHOWN), summary.verdict(self.results, found)])

    def _one(self, step: Step, result: Result) -> None:
        if step.missing is not None:
            result.status, result.detail = MISSING, step.missing
            return
        closing = sum(s.estimate for s in self.steps[self.steps.index(step) + 1 :] if s.closing)
        left = self._end - time.monotonic() - self.grace - closing
        needed = step.estimate * self._paces.get(step.kind, 1.0)
        if needed > left:
            result.status = LEFT_OUT
            result.detail = f"takes about {needed:.0f} s, and {max(left, 0):.0f} s were left"
            return
        result.limit = round(min(step.limit, left), 1)
        result.status = RUNNING
        self._write()
        self.folder.log.begin(step.name, result.command)
        ended, problem = None, ""
        try:
            ended = self._process(step, result.limit)
        except Exception as error:  # Of a step that could not be started.
            problem = f"{type(error).__name__}: {error}"
        outcome = self._outcome(step, ended, problem)
        try:
            step.finish()
        except Exception as error:
            outcome = Outcome(FAILED, f"{outcome.detail}; results unreadable: {error}")
        result.seconds = round(ended.seconds, 1) if ended else 0.0
        result.status, result.detail = outcome.status, redact(outcome.detail)
        self._pace(step, result)
        printed = ended.printed if ended else problem
        self.folder.log.end(step.name, f"{result.status}, {result.seconds} s", printed)
        with contextlib.suppress(OSError):
            name = f"{step.name.replace(' ', '_')}.txt"
            (self.folder.rest / "logs" / name).write_text(redact(printed))

    def _process(self, step: Step, limit: float) -> Ended:
        # Removed after it: what it leaves there may have filled the disk.
        place: dict[str, Any] = dict(dir=self.folder.scratch, ignore_cleanup_errors=True)
        with tempfile.TemporaryDirectory(**place) as own:
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
                ),
                "PYTHONUNBUFFERED": "1",
                "TMPDIR": own,
                records.FOLDER: str(self.folder.out),
                records.STEP: step.name,
                **step.environment,
            }
            return watch(
                step.command, folder=ROOT, environment=environment, limit=limit,
                grace=self.grace, live=self.folder.log.live,
            )  # fmt: skip

    def _outcome(self, step: Step, ended: Ended | None, problem: str) -> Outcome:
        found, unfinished = self._settle(step, "stopped" if ended and ended.code is None else "")
        if ended is None:
            return Outcome(FAILED, problem)
        read = step.read or by_exit_status
        try:
            outcome = read(1 if ended.code is None else ended.code, ended.printed, found)
        except Exception as error:
            outcome = Outcome(FAILED, f"{type(error).__name__}: {error}")
        if ended.code is None:
            outcome = Outcome(TIMED_OUT, f"stopped at its limit; {outcome.detail}")
        if unfinished:
            names = ", ".join(unfinished[:3])
            outcome = Outcome(outcome.status, f"it was in {names}; {outcome.detail}")
        if ended.survivors:
            pids = " ".join(map(str, ended.survivors))
            return Outcome(FAILED, f"not even SIGKILL ended process {pids}; {outcome.detail}")
        return outcome

    def _settle(self, step: Step, stopped: str) -> tuple[list[Entry], list[str]]:
        """The step's tests, and which of them began and never ended; the file says so then."""
        found: list[Entry] = []
        unfinished: list[str] = []
        try:
            with self.folder.tests.edited() as (_, entries):
                own = [e for e in entries if e.get("step") == step.name]
                ended = {e["test"] for e in own if e["outcome"] != BEGAN}
                unfinished += dict.fromkeys(e["test"] for e in own if e["test"] not in ended)
                # Workers that collect the same say the same.
                found += {json.dumps(e): e for e in own if e["outcome"] != BEGAN}.values()
                outcome = stopped or "crashed"
                found += [{"step": step.name, "test": t, "outcome": outcome} for t in unfinished]
                entries[:] = [e for e in entries if e.get("step") != step.name] + found
        except OSError as error:
            print(f"cannot write the test results: {error}", file=sys.stderr, flush=True)
        return found, unfinished

    def _pace(self, step: Step, result: Result) -> None:
        """What a step took is what is expected of those of its kind."""
        if step.kind and step.estimate > 0 and result.seconds > 0:
            low, high = _PACES
            self._paces[step.kind] = min(high, max(low, result.seconds / step.estimate))

    def _write(self) -> None:
        content = {
            "format": 2,
            "provenance": self.provenance,
            "steps": [asdict(result) for result in self.results],
        }
        found, tests = self.folder.rows.read()[1], self.folder.tests.read()[1]
        text = summary.markdown(self.provenance, self.results, found, tests, self._notes())
        try:
            records.write(
                self.folder.out / "summary.json", (json.dumps(content, indent=1) + "\n").encode()
            )
            records.write(self.folder.out / "summary.md", redact(text).encode())
        except OSError as error:  # A full disk: the next step may leave room again.
            print(f"cannot write the summary: {error}", file=sys.stderr, flush=True)

    def _pack(self) -> None:
        """The archive, the last file that is written."""
        try:
            left_out = self.folder.pack()
        except OSError as error:
            left_out = []
            print(f"cannot write the archive: {error}", file=sys.stderr, flush=True)
        for name in left_out:
            print(f"too large for the archive: {name}", flush=True)


def _shown(command: Sequence[str]) -> str:
    words = ["python" if word == sys.executable else word for word in command]
    return redact(" ".join(words))


def clocks(folder: Folder, step: str, written: Path) -> None:
    """Add what a step of pytest-benchmark says about clocks, and what it left out, to the rows."""
    with folder.rows.edited() as (head, _):
        if written.exists() and written.read_text().strip():
            found = json.loads(written.read_text())["machine_info"].get("provenance", {})
            head.setdefault("clocks", {})[step] = found.get("clocks", {})
        head.setdefault("left_out", []).extend(
            {
                "name": test["test"].rpartition("::")[2],
                "status": test["outcome"],
                "why": (test.get("why") or "").strip().rpartition("\n")[2][:300],
            }
            for test in folder.tests.read()[1]
            if test.get("step") == step and test["outcome"] not in ("passed", BEGAN)
        )
