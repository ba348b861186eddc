"""What a step is, and how its outcome is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .records import Entry

PASSED, FAILED, TIMED_OUT, MISSING, LEFT_OUT, PENDING, RUNNING = (
    "passed", "failed", "timed out", "missing", "left out", "pending", "running",
)  # fmt: skip

BEGAN = "began"
"""The outcome of a test that has not ended."""

BAD = ("failed", "error", "stopped", "crashed")
"""Outcomes of tests that are no success; a test is stopped by its step's limit."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step: its status, and a sentence about it."""

    status: str
    detail: str = ""


Reader = Callable[[int, str, Sequence[Entry]], Outcome]
"""Makes an outcome of the exit status, of what was printed, and of the step's tests."""


@dataclass(frozen=True)
class Step:
    """One process. Units: seconds.

    Attributes:
        name: unique, a few words.
        what: what it shows.
        command: words of the command, run in the root of the repository.
        estimate: on a data-center GPU; it is begun only if as much is left.
        limit: then it is stopped.
        kind: steps of one kind are off their estimates by the same factor.
        environment: variables besides those of this process.
        read: makes the outcome.
        finish: called after it, however it ended: collects what it wrote.
        missing: why it cannot run here; then it is reported and not run.
        optional: a run is good without it.
        closing: time is kept for it, whatever else does not fit.
    """

    name: str
    what: str
    command: Sequence[str]
    estimate: float
    limit: float
    kind: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    read: Reader | None = None
    finish: Callable[[], None] = lambda: None
    missing: str | None = None
    optional: bool = False
    closing: bool = False


def by_exit_status(code: int, output: str, tests: Sequence[Entry] = ()) -> Outcome:
    """0 has passed; the last line that was printed is the detail, and tests are counted."""
    lines = [line for line in output.strip().splitlines() if line.strip()]
    last = lines[-1].strip()[:300] if lines else ""
    if code:
        last = f"exit {code}: {last}" if code > 0 else f"died of signal {-code}: {last}"
    good = code == 0 and not any(test["outcome"] in BAD for test in tests)
    return Outcome(PASSED if good else FAILED, "; ".join(filter(None, (counts(tests), last))))


def by_tests(code: int, output: str, tests: Sequence[Entry]) -> Outcome:
    """By the tests that ended; the exit status says only whether pytest itself went wrong."""
    bad = any(test["outcome"] in BAD for test in tests)
    if code in (0, 1, 5) and (bad or code != 1):  # 5: no test was selected.
        return Outcome(FAILED if bad else PASSED, counts(tests) or "no tests")
    return by_exit_status(code, output, tests)


def counts(tests: Sequence[Entry]) -> str:
    """``41 passed, 1 failed, 3 skipped: names``, or nothing without tests."""
    if not tests:
        return ""
    bad = list(dict.fromkeys(test["test"] for test in tests if test["outcome"] in BAD))
    passed, skipped = (
        sum(test["outcome"] == outcome for test in tests) for outcome in ("passed", "skipped")
    )
    text = f"{passed} passed, {len(bad)} failed, {skipped} skipped"
    names = ", ".join(name.rpartition("::")[2] for name in bad[:5])
    return f"{text}: {names}{', ...' if len(bad) > 5 else ''}" if bad else text


def by_sanitizer(code: int, output: str, tests: Sequence[Entry] = ()) -> Outcome:
    """Errors that the sanitizer counted; a device that it refuses is not our failure."""
    summaries = re.findall(r"=+ (.*SUMMARY: .*)", output)
    if not summaries:
        if "not supported" in output:
            return Outcome(MISSING, "compute-sanitizer does not support this device here")
        return by_exit_status(code or 1, output)
    clean = code == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", summaries[-1]) is not None
    return Outcome(PASSED if clean else FAILED, summaries[-1].strip())
