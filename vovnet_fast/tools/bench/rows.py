"""The rows of pytest-benchmark's files, checked, and grouped by what they were measured on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .stopwatch import Interval

KINDS = {
    "inference": "Inference of whole networks",
    "training": "Training steps of whole networks",
    "detector": "Detectors",
    "block": "OSA blocks",
    "conv": "Convolutions",
    "op": "Other operations",
    "ceiling": "Ceilings",
}
"""What is measured, in the order of a report."""

NETWORKS = ("inference", "training", "detector")
OPERATIONS = ("block", "conv", "op")

OURS = ("triton", "cuda", "cpu", "auto")
"""The backends that are this library's own; ``reference`` is plain PyTorch."""

EAGER = "eager"
"""The provider that ``ratio_to_eager`` is about."""

_HOW = (
    "make one with: pytest benchmarks/ --benchmark-only --benchmark-json=FILE, or with: "
    "vovnet-fast bench --json FILE"
)
_MOVING = ("date", "clocks", "rehearsal")  # What may differ between runs of the same thing.


class ReportError(ValueError):
    """A file that no report can be made of."""


@dataclass(frozen=True)
class Row:
    """One measurement. Times in ms; what does not apply is None.

    Attributes:
        kind: a key of :data:`KINDS`.
        provider: who did the work.
        name: of the operation, or of the case.
        backend: of this library, where one did it.
        dtype: short, such as ``bf16``.
        shape: ``NxCxHxW``.
        spec: the network.
        direction: ``forward``, ``backward`` or ``step``; the field ``pass`` of the files.
        device_ms: median, with a cold L2 cache.
        warm_ms: median with a warm one.
        flop: counted.
        bytes: counted, of the algorithm.
        of_matmul: rate over the matrix ceiling of the same run.
        of_copy: bandwidth over the copy ceiling of the same run.
        ratio_to_eager: eager's time over this one's, in turn; ``ratio_low`` and ``ratio_high``
            are the ends of its interval, and ``ratio_confidence`` is how sure that is.
        kept_mib: between forward and backward pass.
        distance: from eager's result, relative.
        eager_ms: eager's, in the same rounds.
        settings: which ones a peer got, in words.
        launches: of kernels, or calls of an extension; counted.
        launches_why: the reason why they are not, where they cannot be.
        parts: ms by part of a block.
    """

    kind: str
    provider: str
    device_ms: float
    name: str = ""
    backend: str | None = None
    dtype: str = ""
    shape: str = ""
    spec: str = ""
    direction: str = ""
    device_ms_min: float | None = None
    device_ms_p10: float | None = None
    device_ms_p90: float | None = None
    warm_ms: float | None = None
    flop: float | None = None
    bytes: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    of_matmul: float | None = None
    of_copy: float | None = None
    eager_ms: float | None = None
    ratio_to_eager: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ratio_confidence: float | None = None
    peak_mib: float | None = None
    kept_mib: float | None = None
    distance: float | None = None
    settings: str = ""
    launches: float | None = None
    launches_why: str = ""
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """This library's kernels did it."""
        return self.backend in OURS

    @property
    def case(self) -> tuple[str, ...]:
        """What all providers of one comparison have in common."""
        return (self.kind, self.name, self.spec, self.shape, self.direction, self.dtype)

    @property
    def title(self) -> str:
        """The case in words, none of them twice: names of cases often have a shape already."""
        found = self.name or self.spec or self.kind
        n, _, size = self.shape.partition("x")
        pixels = f"{n}x{size.partition('x')[2]}"  # Names of operations have channels elsewhere.
        shape = "" if f"on {pixels}" in found else self.shape
        for word in (self.spec, shape, self.dtype, self.direction):
            found += f", {word}" if word and word not in found else ""
        return found

    @property
    def batch(self) -> int | None:
        """N of the shape."""
        first = self.shape.partition("x")[0]
        return int(first) if first.isdigit() else None

    @property
    def interval(self) -> Interval | None:
        """Eager's time over this one's; without ends known, they are the ratio's own."""
        if self.ratio_to_eager is None:
            return None
        low, high = self.ratio_low, self.ratio_high
        ratio = self.ratio_to_eager
        low, high = ratio if low is None else low, ratio if high is None else high
        return Interval(ratio, low, high, self.ratio_confidence)


@dataclass
class Section:
    """Rows of one machine and one state of the sources: what may stand in one table.

    Attributes:
        provenance: what the runs have in common.
        dates: of the runs, in order.
        clocks: what each run saw of them.
        rows: of all runs; of what was measured twice, the later one.
        replaced: how many earlier ones that left out.
        unknown: how many rows lacked what a report needs.
        left_out: how often a benchmark was skipped or failed, by status and reason.
    """

    provenance: dict[str, Any]
    dates: list[str] = field(default_factory=list)
    clocks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    replaced: int = 0
    unknown: int = 0
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)

    def of(self, *kinds: str) -> list[Row]:
        """The rows of some kinds, in the order of these."""
        return [row for kind in kinds for row in self.rows if row.kind == kind]

    @property
    def device(self) -> str:
        """The GPU, or the CPU with its threads."""
        return device_name(self.provenance)

    @property
    def load(self) -> float:
        """The most processes that wanted to run at a time, on average over a minute."""
        return max((run["load"]["most"] for run in self.clocks if "load" in run), default=0.0)

    @property
    def commit(self) -> str:
        """The sources, and that they had changes."""
        dirty = " with local changes" if self.provenance.get("dirty") else ""
        return f"{self.provenance.get('commit', 'unknown')}{dirty}"

    @property
    def title(self) -> str:
        """Device, date and commit."""
        days = sorted({date.partition("T")[0] for date in self.dates})
        when = f"{days[0]} to {days[-1]}" if len(days) > 1 else "".join(days) or "undated"
        return f"{self.device}, {when}, commit {self.commit}"


def load(files: Iterable[Path]) -> list[Section]:
    """Read files and put together what was measured on the same machine with the same sources.

    Raises:
        ReportError: a file is not there, not JSON, not pytest-benchmark's, or without rows.
    """
    sections: dict[str, Section] = {}
    contents = [(path, _read(path)) for path in files]
    contents.sort(key=lambda found: _provenance(found[1]).get("date", ""))
    for path, content in contents:
        known = dict(_provenance(content))
        date, clocks = known.get("date") or content.get("datetime", ""), known.get("clocks")
        for name in _MOVING:
            known.pop(name, None)
        section = sections.setdefault(json.dumps(known, sort_keys=True), Section(known))
        section.dates.append(date)
        # A file of several runs has clocks by run.
        section.clocks += content["clocks"].values() if "clocks" in content else [clocks or {}]
        section.left_out += Counter(
            (str(each["status"]), str(each["why"])) for each in content.get("left_out", [])
        )
        _add(section, content["benchmarks"], path)
    return list(sections.values())


def device_name(known: dict[str, Any]) -> str:
    """The GPU of a provenance, or its CPU with the threads."""
    if known.get("gpu"):
        return str(known["gpu"])
    if known.get("cpu"):
        threads = known.get("threads", "?")
        return f"{known['cpu']}, {threads} {'thread' if threads == 1 else 'threads'}"
    return "unknown device"


def differences(sections: Sequence[Section]) -> dict[str, list[str]]:
    """What the sections' provenances disagree about: values by name, in the sections' order."""
    names = {name: None for section in sections for name in section.provenance}
    found = {
        name: [str(section.provenance.get(name, "unknown")) for section in sections]
        for name in names
    }
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def cases(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by their case, in the order in which the cases come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


def ranked(found: Iterable[Row]) -> list[Row]:
    """The fastest first, by ratios if all have them: what slows all for a while is not in them."""
    found = list(found)
    if all(row.ratio_to_eager for row in found):
        return sorted(found, key=lambda row: row.ratio_to_eager or 0, reverse=True)
    return sorted(found, key=lambda row: row.device_ms)


def _best(found: Iterable[Row]) -> Row | None:
    return next(iter(ranked(found)), None)


def pair(found: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """Our fastest, and the fastest of the others."""
    return (
        _best(row for row in found if row.ours),
        _best(row for row in found if not row.ours),
    )


def against(ours: Row, peer: Row) -> Interval | None:
    """The peer's time over ours, by way of eager, which was measured in turn with both.

    Where eager is the peer itself, nothing has to be put together. Elsewhere the interval is the
    widest that both of theirs allow, and as sure as it is if what each of them misses adds up.
    """
    a, b = ours.interval, peer.interval
    if a is None or b is None or not ours.device_ms:
        return None
    if peer.provider == EAGER:
        return a
    known = a.confidence is not None and b.confidence is not None
    sure = max(0.0, (a.confidence or 0) + (b.confidence or 0) - 1) if known else None
    return Interval(a.ratio / b.ratio, a.low / b.high, a.high / b.low, sure)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}; {_HOW}") from error
    if not text.strip():
        raise ReportError(f"{path} is empty: no benchmark had ended when it was written; {_HOW}")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ReportError(
            f"{path} is not JSON ({error}), and a file of pytest-benchmark was expected; {_HOW}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ReportError(
            f"{path} is JSON, but not of pytest-benchmark, which has a list named benchmarks at "
            f"its top; {_HOW}"
        )
    if not content["benchmarks"]:
        raise ReportError(f"{path} has no rows: every benchmark was skipped or failed; {_HOW}")
    return content


def _provenance(content: dict[str, Any]) -> dict[str, Any]:
    machine = content.get("machine_info") or content
    found = machine.get("provenance")
    return found if isinstance(found, dict) else {}


def _add(section: Section, found: list[Any], path: Path) -> None:
    """Put a file's rows into a section."""
    rows = {_identity(row): row for row in section.rows}
    before = len(rows)
    read = [row for row in map(_row, found) if row is not None]
    if not read:
        raise ReportError(
            f"none of the {len(found)} rows in {path} says what was measured: kind, provider and "
            f"device_ms were expected in extra_info, as benchmarks/ of this repository writes "
            f"them; {_HOW}"
        )
    rows |= {_identity(row): row for row in read}
    section.replaced += before + len(read) - len(rows)
    section.unknown += len(found) - len(read)
    section.rows = list(rows.values())


def _identity(row: Row) -> tuple[str, ...]:
    return (*row.case, row.provider, row.backend or "")


_FIELDS = {each.name: each for each in dataclasses.fields(Row)}
_NUMBERS = {name for name, each in _FIELDS.items() if "float" in str(each.type)} - {"parts"}


def _row(found: Any) -> Row | None:
    """A row, or None if it lacks what every row has."""
    if not isinstance(found, dict):
        return None
    extra = found.get("extra_info", found)
    values = {("direction" if name == "pass" else name): extra[name] for name in extra}
    values = {name: values[name] for name in _FIELDS if values.get(name) is not None}
    if not isinstance(values.get("parts", {}), dict):
        return None
    for name in _NUMBERS & set(values):
        if not isinstance(values[name], (int, float)) or not math.isfinite(values[name]):
            del values[name]
    if not {"kind", "provider", "device_ms"} <= set(values) or values["kind"] not in KINDS:
        return None
    dtype = str(values.get("dtype", "")).removeprefix("torch.")
    values["dtype"] = _SHORT.get(dtype, dtype)
    return Row(**values)


_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
