"""A report of measurements: Markdown, and pictures where matplotlib is installed.

Rows of different machines, versions or sources are never in one table: each has its own section,
and the report begins with what they differ in. What is slower than a peer is listed as what is
faster is, and what was not measured is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ... import _optional
from ..._files import replacing
from . import rows
from .rows import KINDS, Interval, ReportError, Row, Section
from .stopwatch import CONFIDENCE

NETWORKS = ("inference", "training", "detector")
OPERATIONS = ("block", "conv", "op")

_CAPTIONS = {
    "roofline": "Every operation with its rate, under the ceilings that the same run measured",
    "models": "Networks: eager's time over each provider's, with intervals",
    "memory": "Networks: peak memory",
    "batch": "Networks: time of one image against the batch",
    "block": "Where the time goes in one OSA block, by provider",
}
_BY_WAY = 2 * CONFIDENCE - 1
"""Confidence of an interval that is put together from two."""


def write(files: Sequence[Path], folder: Path, title: str) -> list[Path]:
    """Make ``report.md`` and its pictures of pytest-benchmark's files.

    Args:
        files: of one or several runs.
        folder: where it goes; made if it is not there.
        title: of the report.

    Returns:
        the files that were written, the report first.

    Raises:
        ReportError: a file is not one that a report can be made of; nothing is written.
    """
    sections = rows.load(files)
    if folder.exists() and not folder.is_dir():
        raise ReportError(f"{folder} is a file, and the report needs a folder: name another")
    folder.mkdir(parents=True, exist_ok=True)
    texts, pictures = [], []
    for number, section in enumerate(sections, 1):
        drawn, missing = _draw(section, folder, f"-{number}" if len(sections) > 1 else "")
        pictures += [path for paths in drawn.values() for path in paths]
        texts.append("\n".join(_section(section, drawn, missing)))
    report = folder / "report.md"
    with replacing(report) as temporary:
        text = "\n".join([*_head(sections, title), *texts])
        Path(temporary).write_text(text.rstrip("\n") + "\n")
    return [report, *pictures]


def _draw(
    section: Section, folder: Path, suffix: str
) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """The pictures' files, and why others are missing."""
    reason = _optional.why_not("matplotlib")
    if reason is not None:
        return {}, dict.fromkeys(_CAPTIONS, reason)
    from . import plots

    return plots.draw(section, folder, suffix)


def _head(sections: Sequence[Section], title: str) -> Iterator[str]:
    yield f"# {title}\n"
    yield (
        "Made by `vovnet-fast bench report` of rows of pytest-benchmark. Times are medians in ms "
        "on the device's clock. *Against eager* is eager's time over this one's, measured in "
        "turn: above 1 is faster than eager. It is the median over the pairs, in an interval of "
        f"at least {100 * CONFIDENCE:g} %; where the pairs were too few for that, it is their "
        "whole range, with what that reaches. Eager's own row compares two copies of it, and "
        "shows the noise. Times of different rows were taken at different times, on a device "
        "that may have been slower then: *eager beside it* is eager in the very rounds of a row. "
        "*Best peer* is the fastest that is not a kernel of this library; the comparison with it "
        "goes by way of eager, and its interval is the widest that both allow, of at least "
        f"{100 * _BY_WAY:g} %.\n"
    )
    if len(sections) < 2:
        return
    yield (
        f"**These are measurements of {len(sections)} different machines, versions or sources. "
        "Each has a section of its own, and their numbers must not be compared.** "
        "They differ in:\n"
    )
    names = [f"section {number}" for number in range(1, len(sections) + 1)]
    found = rows.differences(sections)
    yield from _table(["", *names], ([name, *values] for name, values in found.items()))


def _section(
    section: Section, drawn: dict[str, list[Path]], missing: dict[str, str]
) -> Iterator[str]:
    yield f"## {section.title}\n"
    yield from _provenance(section)
    yield from _busy(section)
    yield from _ceilings(section)
    yield from _verdicts(section)
    yield from _not_measured(section, missing)
    for name, paths in drawn.items():
        for path in paths:
            yield f"![{_CAPTIONS[name]}]({path.name})\n"
    for kind in NETWORKS:
        yield from _networks(section, kind)
    for kind in OPERATIONS:
        yield from _operations(section, kind)


def _provenance(section: Section) -> Iterator[str]:
    if not section.provenance:
        yield (
            "**Where these rows come from is unknown**: the files say neither machine nor commit.\n"
        )
        return
    yield from _table(
        ["", "value"],
        [
            ["measured", ", ".join(date for date in section.dates if date)],
            *([name, str(value)] for name, value in section.provenance.items()),
            *([f"{name}, seen", text] for name, text in _clocks(section.clocks).items()),
        ],
    )


def _busy(section: Section) -> Iterator[str]:
    """A warning, where others had the CPU too."""
    cores = section.provenance.get("cores")
    if cores and section.load > cores + 0.5:
        yield (
            f"**The machine was busy with other work**: up to {section.load:.1f} processes wanted "
            f"to run on {cores} cores. Times are too long then; ratios, measured in turn, suffer "
            "less.\n"
        )


def _clocks(seen: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Least and most of all runs' readings."""
    ranges: dict[str, tuple[float, float]] = {}
    for run in seen:
        for name, reading in run.items():
            least, most = ranges.get(name, (reading["least"], reading["most"]))
            ranges[name] = min(least, reading["least"]), max(most, reading["most"])
    return {name: f"{least:g} to {most:g}" for name, (least, most) in ranges.items()}


def _ceilings(section: Section) -> Iterator[str]:
    found = section.of("ceiling")
    if found:
        yield "Ceilings, measured in the same run:\n"
        yield from _table(
            ["ceiling", "dtype", "TFLOP/s", "GB/s"],
            ([row.name, row.dtype, _number(row.tflops), _number(row.gbs)] for row in found),
        )
        if section.provenance.get("device") == "cpu":
            yield (
                "The copy goes through memory. What fits into the CPU's caches, as most operations "
                "here do, can be faster than that.\n"
            )


# --------------------------------------------------------------------------------------
# Wins, losses, and what is missing
# --------------------------------------------------------------------------------------


def _ranked(found: Iterable[Row]) -> list[Row]:
    """The fastest first, by ratios if all have them: what slows all for a while is not in them."""
    found = list(found)
    if all(row.ratio_to_eager for row in found):
        return sorted(found, key=lambda row: row.ratio_to_eager or 0, reverse=True)
    return sorted(found, key=lambda row: row.device_ms)


def _best(found: Iterable[Row]) -> Row | None:
    return next(iter(_ranked(found)), None)


def _pair(found: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """Our fastest, and the fastest of the others."""
    return (
        _best(row for row in found if row.ours),
        _best(row for row in found if not row.ours),
    )


def _verdicts(section: Section) -> Iterator[str]:
    """How often this library is faster than the best peer, and every case where it is not."""
    lines, slower = [], []
    for kind in (*NETWORKS, *OPERATIONS):
        count = {"faster": 0, "undecided": 0, "slower": 0}
        for found in rows.cases(section.of(kind)).values():
            ours, peer = _pair(found)
            interval = rows.against(ours, peer) if ours and peer else None
            if ours is None or peer is None or interval is None:
                continue
            verdict = _verdict(interval)
            count[verdict] += 1
            if verdict == "slower":
                slower.append([ours.title, ours.provider, peer.provider, _by_way(interval)])
        if sum(count.values()):
            lines.append([KINDS[kind], *map(str, count.values())])
    if not lines:
        return
    yield "### Against the best peer of every case\n"
    yield from _table(["", "faster", "no difference shown", "slower"], lines)
    if slower:
        yield "Slower than the best peer:\n"
        header = ["what", "ours", "the peer", "the peer's time : ours"]
        yield from _folded(f"{len(slower)} cases", _table(header, slower), len(slower) > 20)


def _verdict(interval: Interval) -> str:
    if interval.confidence is not None and interval.confidence < _BY_WAY:
        return "undecided"
    if interval.low > 1:
        return "faster"
    return "slower" if interval.high < 1 else "undecided"


def _not_measured(section: Section, missing: dict[str, str]) -> Iterator[str]:
    lines = [f"{title}: no rows." for kind, title in KINDS.items() if not section.of(kind)]
    for kind in (*NETWORKS, *OPERATIONS):
        found = section.of(kind)
        for of_case in rows.cases(found).values():
            if not any(row.ours for row in of_case):
                lines.append(f"{of_case[0].title}: no kernel of this library was measured.")
            elif all(row.ours for row in of_case):
                lines.append(f"{of_case[0].title}: no peer was measured.")
    shapeless = [row for row in section.of(*OPERATIONS) if row.bytes and not row.flop]
    if shapeless:
        lines.append(f"{len(shapeless)} rows only move memory, and are not on the roofline.")
    old = [row for row in section.rows if row.ratio_low and row.ratio_confidence is None]
    if old:
        lines.append(
            f"{len(old)} rows do not say how sure their intervals are: those of earlier versions "
            "are short of 95 % where the rounds were few."
        )
    lines += _uncounted(section)
    for (status, why), count in sorted(section.left_out.items()):
        lines.append(f"{count} {'benchmark' if count == 1 else 'benchmarks'} {status}: {why}")
    if section.replaced:
        lines.append(f"{section.replaced} rows were measured again later, and are left out.")
    if section.unknown:
        lines.append(
            f"{section.unknown} rows do not say what they measured (kind, provider, device_ms), "
            "and are left out."
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(f"{name}.png")
    lines += [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]
    if lines:
        yield "### Not measured, and not shown\n"
        yield from _folded(
            f"{len(lines)} remarks", ["".join(f"- {line}\n" for line in lines)], len(lines) > 12
        )


def _uncounted(section: Section) -> Iterator[str]:
    """Whose launches are not known, and why."""
    reasons: dict[str, dict[str, None]] = {}
    for row in section.rows:
        if row.launches_why:
            reasons.setdefault(row.launches_why, {})[row.provider] = None
    for reason, providers in reasons.items():
        yield f"Launches of {', '.join(providers)}: {reason}."


# --------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------


def _networks(section: Section, kind: str) -> Iterator[str]:
    found = section.of(kind)
    if not found:
        return
    yield f"### {KINDS[kind]}\n"
    several = len({row.direction for row in found}) > 1
    columns: dict[str, Callable[[Row], str]] = {
        "network": lambda row: row.spec or row.name,
        "pass": lambda row: row.direction if several else "",
        "images": lambda row: row.shape,
        "dtype": lambda row: row.dtype,
        "provider": lambda row: f"**{_escape(row.provider)}**" if row.ours else row.provider,
        "ms": lambda row: _number(row.device_ms),
        "10 to 90 %": _spread,
        "eager beside it": lambda row: _number(row.eager_ms),
        "images/s": lambda row: _number(row.batch and row.batch / row.device_ms * 1e3),
        "against eager": lambda row: _interval(row.interval),
        "peak MiB": lambda row: _number(row.peak_mib),
        "kept MiB": lambda row: _number(row.kept_mib),
        "launches": lambda row: _number(row.launches),
        "distance": _distance,
    }
    ordered = [row for of_case in rows.cases(found).values() for row in _ranked(of_case)]
    yield from _columns(columns, ordered)
    if any(row.launches for row in found):
        yield (
            "Launches are counted, not measured: operations of plain PyTorch, kernels of Triton "
            "before any choice by measurement, calls of this library's extension.\n"
        )
    yield from _settings(found)


def _operations(section: Section, kind: str) -> Iterator[str]:
    found = section.of(kind)
    if not found:
        return
    yield f"### {KINDS[kind]}\n"
    lines = []
    for of_case in rows.cases(found).values():
        ours, peer = _pair(of_case)
        lines.append([
            of_case[0].title,
            _fastest(ours), _ceiling(ours), _number(ours.eager_ms) if ours else "",
            peer.provider if peer else "",
            _by_way(rows.against(ours, peer)) if ours and peer else "",
        ])  # fmt: skip
    header = [
        "what", "ours, ms", "of the ceiling", "eager beside it", "best peer",
        "the peer's time : ours",
    ]  # fmt: skip
    yield from _table(header, lines)
    columns: dict[str, Callable[[Row], str]] = {
        "what": lambda row: row.title,
        "provider": lambda row: f"**{_escape(row.provider)}**" if row.ours else row.provider,
        "ms": lambda row: _number(row.device_ms),
        "10 to 90 %": _spread,
        "eager beside it": lambda row: _number(row.eager_ms),
        "warm": lambda row: _number(row.warm_ms),
        "TFLOP/s": lambda row: _number(row.tflops or None),
        "of matmul": lambda row: _percent(row.of_matmul or None),
        "GB/s": lambda row: _number(row.gbs),
        "of copy": lambda row: _percent(row.of_copy),
        "against eager": lambda row: _interval(row.interval),
        "distance": _distance,
    }
    yield from _folded(f"all {len(found)} rows", _columns(columns, found), True)
    yield from _settings(found)


def _fastest(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{_number(row.device_ms)} ({_escape(row.provider)})"


def _ceiling(row: Row | None) -> str:
    """The higher of the two fractions: what holds the operation back."""
    if row is None:
        return ""
    known = {"matmul": row.of_matmul or 0, "copy": row.of_copy or 0}
    name = max(known, key=lambda name: known[name])
    return f"{known[name]:.0%} {name}" if known[name] else ""


def _settings(found: Iterable[Row]) -> Iterator[str]:
    known = {(row.provider, row.settings): None for row in found if row.settings}
    if known:
        yield "Settings:\n"
        yield "".join(f"- {provider}: {settings}\n" for provider, settings in known)


def _columns(columns: dict[str, Callable[[Row], str]], found: Sequence[Row]) -> Iterator[str]:
    """A table without the columns that are empty."""
    cells = {name: [cell(row) for row in found] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    yield from _table(list(cells), zip(*cells.values(), strict=True))


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    text = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    text += [f"| {' | '.join(map(_escape, line))} |" for line in lines]
    yield "\n".join(text) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\|", "|").replace("|", "\\|").replace("\n", " ")


def _folded(summary: str, text: Iterable[str], fold: bool) -> Iterator[str]:
    if not fold:
        yield from text
        return
    yield f"<details><summary>{summary}</summary>\n"
    yield from text
    yield "</details>\n"


def _number(value: float | None) -> str:
    """Three digits that count, and more before the point if there are."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _distance(row: Row) -> str:
    return "" if row.distance is None else f"{row.distance:.1e}" if row.distance else "0"


def _spread(row: Row) -> str:
    if row.device_ms_p10 is None or row.device_ms_p90 is None:
        return ""
    return f"{_number(row.device_ms_p10)} to {_number(row.device_ms_p90)}"


def _interval(interval: Interval | None, promised: float = CONFIDENCE) -> str:
    """The ratio, in its interval, and in words where it is below one."""
    if interval is None:
        return ""
    text = interval.text(promised)
    return f"{text}, slower" if interval.high < 1 else text


def _by_way(interval: Interval | None) -> str:
    """:func:`_interval` of the comparison with a peer."""
    return _interval(interval, _BY_WAY)
