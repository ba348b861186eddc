"""A report of measurements: Markdown, and pictures where matplotlib is installed.

Rows of different machines, versions or sources are never in one table: each has its own section,
and the report begins with what they differ in. What is slower than a peer is listed as what is
faster is, and what was not measured is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ... import _optional
from ..._files import replacing
from . import rows, tables, verdicts
from .rows import NETWORKS, OPERATIONS, ReportError, Section
from .stopwatch import CONFIDENCE

_CAPTIONS = {
    "roofline": "Every operation with its rate, under the ceilings that the same run measured",
    "models": "Networks: eager's time over each provider's, with intervals",
    "memory": "Networks: peak memory",
    "batch": "Networks: time of one image against the batch",
    "block": "Where the time goes in one OSA block, by provider",
}


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
        Path(temporary).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
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
        f"{100 * tables.BY_WAY:g} %.\n"
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
    yield from tables.table(["", *names], ([name, *values] for name, values in found.items()))


def _section(
    section: Section, drawn: dict[str, list[Path]], missing: dict[str, str]
) -> Iterator[str]:
    yield f"## {section.title}\n"
    yield from _provenance(section)
    yield from _busy(section)
    yield from _ceilings(section)
    yield from verdicts.verdicts(section)
    yield from verdicts.not_measured(section, missing)
    for name, paths in drawn.items():
        for path in paths:
            yield f"![{_CAPTIONS[name]}]({path.name})\n"
    for kind in NETWORKS:
        yield from tables.networks(section, kind)
    for kind in OPERATIONS:
        yield from tables.operations(section, kind)


def _provenance(section: Section) -> Iterator[str]:
    if not section.provenance:
        yield (
            "**Where these rows come from is unknown**: the files say neither machine nor commit.\n"
        )
        return
    yield from tables.table(
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
        yield from tables.table(
            ["ceiling", "dtype", "TFLOP/s", "GB/s"],
            (
                [row.name, row.dtype, tables.number(row.tflops), tables.number(row.gbs)]
                for row in found
            ),
        )
        if section.provenance.get("device") == "cpu":
            yield (
                "The copy goes through memory. What fits into the CPU's caches, as most operations "
                "here do, can be faster than that.\n"
            )
