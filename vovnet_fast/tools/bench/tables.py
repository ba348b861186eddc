"""The tables of a report, and how its numbers and intervals are written in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ...compat import zip
from . import rows
from .rows import KINDS, Interval, Row, Section
from .stopwatch import CONFIDENCE

BY_WAY = 2 * CONFIDENCE - 1
"""Confidence of an interval that is put together from two."""


def networks(section: Section, kind: str) -> Iterator[str]:
    """Every row of whole networks, the fastest of a case first."""
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
        "ms": lambda row: number(row.device_ms),
        "10 to 90 %": _spread,
        "eager beside it": lambda row: number(row.eager_ms),
        "images/s": lambda row: number(row.batch and row.batch / row.device_ms * 1e3),
        "against eager": lambda row: _interval(row.interval),
        "peak MiB": lambda row: number(row.peak_mib),
        "kept MiB": lambda row: number(row.kept_mib),
        "launches": lambda row: number(row.launches),
        "distance": _distance,
    }
    ordered = [row for of_case in rows.cases(found).values() for row in rows.ranked(of_case)]
    yield from _columns(columns, ordered)
    if any(row.launches for row in found):
        yield (
            "Launches are counted, not measured: operations of plain PyTorch, kernels of Triton "
            "before any choice by measurement, calls of this library's extension.\n"
        )
    yield from _settings(found)


def operations(section: Section, kind: str) -> Iterator[str]:
    """Our fastest and the best peer of every case, and all rows below, folded."""
    found = section.of(kind)
    if not found:
        return
    yield f"### {KINDS[kind]}\n"
    lines = []
    for of_case in rows.cases(found).values():
        ours, peer = rows.pair(of_case)
        lines.append([
            of_case[0].title,
            _fastest(ours), _ceiling(ours), number(ours.eager_ms) if ours else "",
            peer.provider if peer else "",
            by_way(rows.against(ours, peer)) if ours and peer else "",
        ])  # fmt: skip
    header = [
        "what", "ours, ms", "of the ceiling", "eager beside it", "best peer",
        "the peer's time : ours",
    ]  # fmt: skip
    yield from table(header, lines)
    columns: dict[str, Callable[[Row], str]] = {
        "what": lambda row: row.title,
        "provider": lambda row: f"**{_escape(row.provider)}**" if row.ours else row.provider,
        "ms": lambda row: number(row.device_ms),
        "10 to 90 %": _spread,
        "eager beside it": lambda row: number(row.eager_ms),
        "warm": lambda row: number(row.warm_ms),
        "TFLOP/s": lambda row: number(row.tflops or None),
        "of matmul": lambda row: _percent(row.of_matmul or None),
        "GB/s": lambda row: number(row.gbs),
        "of copy": lambda row: _percent(row.of_copy),
        "against eager": lambda row: _interval(row.interval),
        "distance": _distance,
    }
    yield from folded(f"all {len(found)} rows", _columns(columns, found), True)
    yield from _settings(found)


def _fastest(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{number(row.device_ms)} ({_escape(row.provider)})"


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
    yield from table(list(cells), zip(*cells.values(), strict=True))


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table of Markdown."""
    text = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    text += [f"| {' | '.join(map(_escape, line))} |" for line in lines]
    yield "\n".join(text) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\|", "|").replace("|", "\\|").replace("\n", " ")


def folded(summary: str, text: Iterable[str], fold: bool) -> Iterator[str]:
    """Text that opens on a click, if it is to be folded."""
    if not fold:
        yield from text
        return
    yield f"<details><summary>{summary}</summary>\n"
    yield from text
    yield "</details>\n"


def number(value: float | None) -> str:
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
    return f"{number(row.device_ms_p10)} to {number(row.device_ms_p90)}"


def _interval(interval: Interval | None, promised: float = CONFIDENCE) -> str:
    """The ratio, in its interval, and in words where it is below one."""
    if interval is None:
        return ""
    text = interval.text(promised)
    return f"{text}, slower" if interval.high < 1 else text


def by_way(interval: Interval | None) -> str:
    """:func:`_interval` of the comparison with a peer."""
    return _interval(interval, BY_WAY)
