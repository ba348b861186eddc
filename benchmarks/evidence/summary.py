"""``summary.md``: what was run, how it ended, and the tables that matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from .records import Entry
from .steps import BAD, PENDING, counts

_FAILURES = 20
"""Failed tests that are named with a reason."""


@dataclass
class Result:
    """A step in the summary. Units: seconds."""

    name: str
    what: str
    command: str
    status: str = PENDING
    detail: str = ""
    seconds: float = 0.0
    estimate: float = 0.0
    limit: float = 0.0


def markdown(
    provenance: dict[str, Any],
    results: Sequence[Result],
    rows: Sequence[Entry],
    tests: Sequence[Entry],
    notes: Sequence[str] = (),
) -> str:
    """All of it."""
    parts = ["# Evidence of a rehearsal" if "rehearsal" in provenance else "# Evidence", ""]
    if "rehearsal" in provenance:
        parts += [f"**{provenance['rehearsal']}**", ""]
    parts += [verdict(results, tests), ""]
    parts += [f"- {note}" for note in notes]
    parts += [f"- {name}: {value}" for name, value in provenance.items()]
    for title, text in (
        ("Steps", steps(results)),
        ("Networks", networks(rows)),
        ("Layers", layers(rows)),
        ("Ceilings", ceilings(rows)),
        ("What failed", failures(tests)),
    ):
        if text:
            parts += ["", f"## {title}", "", text]
    return "\n".join(parts) + "\n"


def verdict(results: Sequence[Result], tests: Sequence[Entry]) -> str:
    """One line: steps and tests, counted."""
    found: dict[str, int] = {}
    for result in results:
        found[result.status] = found.get(result.status, 0) + 1
    text = ", ".join(f"{count} {status}" for status, count in found.items())
    return f"Steps: {text}. Tests: {counts(tests) or 'none'}."


def steps(results: Sequence[Result]) -> str:
    """A row for each step."""
    return _table(
        ["step", "what", "status", "seconds", "detail"],
        ([r.name, r.what, r.status, f"{r.seconds:.0f}", r.detail] for r in results),
    )


def networks(rows: Iterable[Entry]) -> str:
    """What was measured of whole networks, in turn with eager of the same run."""
    found = [row for row in rows if "spec" in row and "provider" in row and "device_ms" in row]
    header = [
        "step", "pass", "network", "images", "provider", "ms", "eager's time : this",
        "peak MiB", "distance",
    ]  # fmt: skip
    return _table(header, map(_network, found))


def _network(row: Entry) -> list[str]:
    ours = row.get("backend") and row["backend"] not in row["provider"]
    return [
        row["step"],
        row.get("pass", ""),
        row["spec"],
        row["shape"],
        f"{row['provider']} ({row['backend']})" if ours else row["provider"],
        f"{row['device_ms']:.2f}",
        _ratio(row),
        _number(row, "peak_mib", ".0f"),
        _number(row, "distance", ".1e"),
    ]


def layers(rows: Iterable[Entry]) -> str:
    """Convolutions whose engines were measured side by side: the best of each form, in ms.

    Those of several backends are one row: that of the fastest, with the engines of all.
    """
    found = _merged(row for row in rows if row.get("kind") == "conv" and row.get("engines"))
    forms = list(dict.fromkeys(form for row in found for form in _forms(row)))
    header = ["layer", "pass", *forms, "best", "of matmul", "of copy"]
    return _table(
        header,
        (
            [
                row["name"],
                row.get("pass", ""),
                *(_forms(row).get(form, "") for form in forms),
                row.get("engine", ""),
                _number(row, "of_matmul", ".0%"),
                _number(row, "of_copy", ".0%"),
            ]
            for row in found
        ),
    )


def _merged(rows: Iterable[Entry]) -> list[Entry]:
    """One row a layer and pass."""
    of_layer: dict[tuple[str, str], list[Entry]] = {}
    for row in rows:
        of_layer.setdefault((row["name"], row.get("pass", "")), []).append(row)
    merged = []
    for alike in of_layer.values():
        best = min(alike, key=lambda row: row["engines"].get(row.get("engine"), {}).get("ms", inf))
        engines: Entry = {}
        for row in alike:
            for name, found in row["engines"].items():
                if found.get("ms", inf) <= engines.get(name, {}).get("ms", inf):
                    engines[name] = found
        merged.append({**best, "engines": engines})
    return merged


_FORMS = (
    "conv-sm80", "conv-sm90", "depthwise-conv", "separate", "cudnn-graph", "tma", "pointer", "aten",
)  # fmt: skip


def form_of(engine: str) -> str:
    """``tma`` for ``tma-128x128-k64-w8-s3``; an engine of no known form is its own."""
    return next((form for form in _FORMS if engine.startswith(form)), engine)


def _forms(row: Entry) -> dict[str, str]:
    """The best time by form of engine."""
    best: dict[str, float] = {}
    for engine, found in row["engines"].items():
        form = form_of(engine)
        if "ms" in found:
            best[form] = min(found["ms"], best.get(form, found["ms"]))
    return {form: f"{ms:.4f}" for form, ms in best.items()}


def ceilings(rows: Iterable[Entry]) -> str:
    """A large copy, and large matrix multiplications."""
    found = [row for row in rows if row.get("kind") == "ceiling"]
    return _table(
        ["what", "ms", "GB/s", "TFLOP/s"],
        (
            [row["name"], f"{row['device_ms']:.3f}", f"{row['gbs']:.0f}", _number(row, "tflops")]
            for row in found
        ),
    )


def failures(tests: Iterable[Entry]) -> str:
    """The first tests that failed, with the last line of why."""
    bad = [test for test in tests if test.get("outcome") in BAD]
    lines = []
    for test in bad[:_FAILURES]:
        why = (test.get("why") or "").strip().splitlines() or [""]
        lines.append(f"- `{test['test']}` ({test['step']}), {test['outcome']}: {why[-1][:300]}")
    if len(bad) > _FAILURES:
        lines.append(f"- and {len(bad) - _FAILURES} more, in tests.json")
    return "\n".join(lines)


def _ratio(row: Entry) -> str:
    if "ratio_to_eager" not in row:
        return ""
    interval = "{ratio_to_eager:.2f} ({ratio_low:.2f} to {ratio_high:.2f})"
    return interval.format(**row) if "ratio_low" in row else f"{row['ratio_to_eager']:.2f}"


def _number(row: Entry, key: str, form: str = ".1f") -> str:
    return format(row[key], form) if row.get(key) is not None else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, or nothing where there are no rows."""
    lines = [_line(row) for row in rows]
    return "\n".join([_line(header), "|---" * len(header) + "|", *lines]) if lines else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def printed(text: str, room: int) -> Iterator[str]:
    """What of a summary is printed at the end: the steps and the networks, if they have room."""
    sections = text.split("\n## ")
    kept = [s for s in sections[1:] if s.startswith(("Steps", "Networks", "What failed"))]
    for section in kept:
        share = room // len(kept)
        lines, size = [], 0
        for line in section.splitlines():
            line = line if len(line) <= 240 else f"{line[:237]}..."
            size += len(line) + 1
            if size > share:
                lines.append("... more in summary.md")
                break
            lines.append(line)
        yield "## " + "\n".join(lines)
