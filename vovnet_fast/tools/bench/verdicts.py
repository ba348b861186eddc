"""What is faster than the best peer, what is slower, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterator

from . import rows, tables
from .rows import KINDS, NETWORKS, OPERATIONS, Interval, Section


def verdicts(section: Section) -> Iterator[str]:
    """How often this library is faster than the best peer, and every case where it is not."""
    lines, slower = [], []
    for kind in (*NETWORKS, *OPERATIONS):
        count = {"faster": 0, "undecided": 0, "slower": 0}
        for found in rows.cases(section.of(kind)).values():
            ours, peer = rows.pair(found)
            interval = rows.against(ours, peer) if ours and peer else None
            if ours is None or peer is None or interval is None:
                continue
            verdict = _verdict(interval)
            count[verdict] += 1
            if verdict == "slower":
                slower.append([ours.title, ours.provider, peer.provider, tables.by_way(interval)])
        if sum(count.values()):
            lines.append([KINDS[kind], *map(str, count.values())])
    if not lines:
        return
    yield "### Against the best peer of every case\n"
    yield from tables.table(["", "faster", "no difference shown", "slower"], lines)
    if slower:
        yield "Slower than the best peer:\n"
        header = ["what", "ours", "the peer", "the peer's time : ours"]
        yield from tables.folded(
            f"{len(slower)} cases", tables.table(header, slower), len(slower) > 20
        )


def _verdict(interval: Interval) -> str:
    if interval.confidence is not None and interval.confidence < tables.BY_WAY:
        return "undecided"
    if interval.low > 1:
        return "faster"
    return "slower" if interval.high < 1 else "undecided"


def not_measured(section: Section, missing: dict[str, str]) -> Iterator[str]:
    """What has no rows, no peer or no picture, and why."""
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
        yield from tables.folded(
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
