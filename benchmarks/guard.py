"""Compare counts that do not depend on the machine with those that are committed.

``python -m benchmarks.guard`` prints what differs from docs/counts.json, and fails if
anything does. ``--update`` writes the file anew, and prints what changes. What is counted
is said in :mod:`benchmarks.counts`.

A count that got better fails too: while it is not in the file, a later change could lose
it again and nobody would be told. Recording it is one command, and a reviewer sees in the
file what a change has won or cost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .counts import BETTER, LOWER, Counts, count, needs, versions

FILE = Path(__file__).parent.parent / "docs" / "counts.json"
UPDATE = "python -m benchmarks.guard --update"

WORSE, BETTER_NOW, CHANGED, NEW, GONE = "worse", "better", "changed", "new", "gone"
_ORDER = (WORSE, GONE, CHANGED, NEW, BETTER_NOW)


class Difference(NamedTuple):
    """A number that is not the committed one.

    Attributes:
        verdict: one of ``worse``, ``better``, ``changed``, ``new`` and ``gone``.
        section, row, name: what is counted.
        old: committed, None if it is new.
        new: counted now, None if it is gone.
    """

    verdict: str
    section: str
    row: str
    name: str
    old: float | None
    new: float | None

    @property
    def percent(self) -> str:
        """By how much, such as ``+3.1 %``; empty where nothing is to compare."""
        if not self.old or self.new is None:
            return ""
        return f"{100 * (self.new / self.old - 1):+.1f} %"

    def __str__(self) -> str:
        old, new = ("nothing" if x is None else f"{x:,}" for x in (self.old, self.new))
        note = f" ({self.percent})" if self.percent else ""
        return f"{self.verdict}: {self.section}: {self.row}: {self.name} {old} -> {new}{note}"


def _verdict(name: str, old: float, new: float) -> str:
    way = BETTER.get(name, LOWER)
    if way == 0:
        return CHANGED
    return BETTER_NOW if (new - old) * way > 0 else WORSE


def compare(committed: Counts, counted: Counts) -> list[Difference]:
    """What differs, the worst first."""
    found = []
    for section, row, name in sorted({*_names(committed), *_names(counted)}):
        old, new = (c.get(section, {}).get(row, {}).get(name) for c in (committed, counted))
        if old == new:
            continue
        if old is None or new is None:
            verdict = NEW if old is None else GONE
        else:
            verdict = _verdict(name, old, new)
        found.append(Difference(verdict, section, row, name, old, new))
    return sorted(found, key=lambda difference: _ORDER.index(difference.verdict))


def _names(counts: Counts) -> Iterator[tuple[str, str, str]]:
    for section, rows in counts.items():
        for row, numbers in rows.items():
            for name in numbers:
                yield section, row, name


def comparable(counts: Counts, made_with: dict[str, str], here: dict[str, str]) -> Counts:
    """The sections whose numbers hold for the libraries that are installed here."""
    return {
        section: rows
        for section, rows in counts.items()
        if (library := needs(section)) is None or made_with[library] == here[library]
    }


def check(file: Path = FILE, *, compiling: bool = True) -> tuple[list[Difference], list[str]]:
    """Count, and compare with a file.

    Args:
        file: as :func:`write` makes it.
        compiling: with what kernels compile to.

    Returns:
        what differs, and in words what could not be compared.
    """
    written = json.loads(file.read_text())
    made_with, here = written["made with"], versions()
    stale = {library for library in made_with if made_with[library] != here[library]}
    counted = count(compiling=compiling and "triton" not in stale)
    kept = {
        section: rows
        for section, rows in written["counts"].items()
        if compiling or needs(section) != "triton"
    }
    notes = [
        f"not compared: {section}, counted with {library} {made_with[library]}; here is "
        f"{library} {here[library]}"
        for section in kept
        if (library := needs(section)) in stale
    ]
    found = compare(*(comparable(counts, made_with, here) for counts in (kept, counted)))
    return found, notes


def write(counts: Counts, file: Path) -> None:
    """Write counts, and what they were made with, as JSON: a line a row."""
    sections = []
    for section, rows in counts.items():
        lines = [f"   {json.dumps(row)}: {json.dumps(numbers)}" for row, numbers in rows.items()]
        sections.append(f"  {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n  }")
    file.write_text(
        f'{{\n "made with": {json.dumps(versions())},\n "counts": {{\n'
        + ",\n".join(sections)
        + "\n }\n}\n"
    )


def report(found: list[Difference]) -> str:
    """What differs, in words, and what to do about it."""
    if not found:
        return ""
    lines = [str(difference) for difference in found]
    if any(difference.verdict == WORSE for difference in found):
        lines.append(f"Something got worse. If that is the price of something better: {UPDATE}")
    else:
        lines.append(f"Nothing got worse. Record it, so that it cannot be lost unseen: {UPDATE}")
    return "\n".join(lines)


_STYLES = {WORSE: "bold red", GONE: "yellow", CHANGED: "yellow", NEW: "cyan", BETTER_NOW: "green"}


def _print(found: list[Difference]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What differs from the committed counts", title_justify="left")
    for heading in ("", "section", "of", "count"):
        table.add_column(heading)
    for heading in ("old", "new", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        values = ("" if value is None else f"{value:,}" for value in (one.old, one.new))
        cells = (one.verdict, one.section, one.row, one.name, *values, one.percent)
        table.add_row(*cells, style=_STYLES[one.verdict])
    # A pipe has no width to fit into.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m benchmarks.guard``; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--file", type=Path, default=FILE, help="default: docs/counts.json")
    parser.add_argument("--update", action="store_true", help="write the file anew")
    parser.add_argument(
        "--json", action="store_true", help="print differences and notes as JSON, and succeed"
    )
    options = parser.parse_args(arguments)
    if options.update:
        counted, found, notes = count(), [], []
        if options.file.exists():
            found = compare(json.loads(options.file.read_text())["counts"], counted)
        write(counted, options.file)
    else:
        found, notes = check(options.file)
    if options.json:
        content: dict[str, Any] = dict(differences=[d._asdict() for d in found], notes=notes)
        print(json.dumps(content))
        return 0
    if found:
        _print(found)
    for note in notes:
        print(note)
    if options.update:
        print(f"{options.file} written; {len(found)} numbers differ from what it had")
        return 0
    print(report(found) or f"what could be compared is as in {options.file}")
    return 1 if found else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # Before Triton is imported: it has to compile.
    sys.exit(main())
