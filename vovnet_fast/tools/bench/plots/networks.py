"""Whole networks beside their peers: speed, memory, and time against the batch."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ....compat import zip
from ..rows import EAGER, Row, Section, cases
from ..stopwatch import CONFIDENCE, Interval
from . import drawing
from .drawing import BLACK, BLUE, GREY, LINES, ORANGE, OURS, PEERS, NothingToDraw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 15
"""On one picture; the rest is on further ones."""

_DIRECTIONS = {"forward": "inference", "step": "training step"}


# --------------------------------------------------------------------------------------
# Speed and memory
# --------------------------------------------------------------------------------------


_WHOSE = "dark: this library, hatched: peers, grey: eager"


def models(section: Section) -> Iterator[Figure]:
    """Eager's time over each provider's, a panel for each network and size."""
    found = {
        case: rows
        for case, rows in cases(section.of("inference", "training", "detector")).items()
        if any(row.interval and row.provider != EAGER for row in rows)
    }
    if not found:
        raise NothingToDraw("no network was measured beside eager, in turn with it")
    for page in _pages(list(found.values())):
        figure, panels = _grid(page, lambda rows: len(rows))
        for axes, rows in zip(panels, page, strict=True):
            _speeds(axes, [row for row in rows if row.interval])
        figure.supxlabel(f"eager's time : this one's, {_least(page)}; {_WHOSE}", fontsize=9)
        drawing.title(figure, "Speed relative to eager (longer is faster)", section)
        yield figure


def _least(page: list[list[Row]]) -> str:
    """How sure the intervals of all panels are."""
    intervals = [row.interval for rows in page for row in rows]
    short = any(interval.doubt() for interval in intervals if interval)
    less = ", or of what is in brackets" if short else ""
    return f"with intervals of at least {100 * CONFIDENCE:g} %{less}"


def _speeds(axes: Axes, rows: list[Row]) -> None:
    """Bars from the fastest down."""
    rows = sorted(rows, key=lambda row: row.ratio_to_eager or 0)
    for y, row in enumerate(rows):
        interval = row.interval
        assert interval is not None
        error = [[max(interval.ratio - interval.low, 0)], [max(interval.high - interval.ratio, 0)]]
        _bar(axes, y, interval.ratio, row, xerr=error, error_kw=dict(lw=1, capsize=2.5))
        axes.annotate(
            _speed(row, interval), (interval.high, y), (5, 0),
            textcoords="offset points", va="center", fontsize=7,
            bbox=dict(facecolor="white", edgecolor="none", pad=0.6),
        )  # fmt: skip
    axes.axvline(1, color=BLACK, linewidth=0.8, linestyle="--", zorder=0.5)
    highest = max(row.interval.high for row in rows if row.interval)
    axes.set_xlim(0, highest * 1.75)
    _name_bars(axes, rows)


def _speed(row: Row, interval: Interval) -> str:
    """The ratio, both times, and how sure an interval is that is short of the rest."""
    doubt = interval.doubt().removeprefix(", ")
    beside = "" if row.eager_ms is None else f", eager {_ms(row.eager_ms)}"
    times = _ms(row.device_ms) + ("" if row.provider == EAGER else beside)
    return f"{interval.ratio:.2f}x  {times}{f'  ({doubt})' if doubt else ''}"


def memory(section: Section) -> Iterator[Figure]:
    """Peak memory of each provider, and what a training step keeps for the backward pass."""
    found = [
        rows
        for rows in cases(section.of("inference", "training", "detector")).values()
        if any(row.peak_mib for row in rows)
    ]
    if not found:
        raise NothingToDraw("no row has peak_mib, which is measured on GPUs only")
    for page in _pages(found):
        figure, panels = _grid(page, lambda rows: len(rows))
        for axes, rows in zip(panels, page, strict=True):
            _peaks(axes, [row for row in rows if row.peak_mib])
        figure.supxlabel(f"peak MiB, inner bar: kept for the backward pass; {_WHOSE}", fontsize=9)
        drawing.title(figure, "Peak memory (shorter is better)", section)
        yield figure


def _peaks(axes: Axes, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: -(row.peak_mib or 0))
    for y, row in enumerate(rows):
        peak = row.peak_mib or 0
        _bar(axes, y, peak, row)
        if row.kept_mib:
            axes.barh(y, row.kept_mib, height=0.26, color="white", edgecolor=BLACK, linewidth=0.7)
        axes.annotate(
            f"{peak:,.0f}", (peak, y), (3, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.set_xlim(0, max(row.peak_mib or 0 for row in rows) * 1.25)
    _name_bars(axes, rows)


def _bar(axes: Axes, y: float, width: float, row: Row, **options: Any) -> None:
    """Solid and dark for ours, hatched and light for peers, plain grey for eager."""
    color, hatch = (BLUE, "") if row.ours else (ORANGE, "////")
    if row.provider == EAGER:
        color, hatch = "#CCCCCC", ""
    axes.barh(
        y, width, height=0.72, color=color, hatch=hatch, edgecolor=BLACK, linewidth=0.6, **options
    )


def _name_bars(axes: Axes, rows: Sequence[Row]) -> None:
    names = [textwrap.shorten(row.provider, 34, placeholder=" ...") for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7.5)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.ours else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_title(_case(rows[0]), loc="left")


def _case(row: Row) -> str:
    kind = "detector, " if row.kind == "detector" else ""
    what = _DIRECTIONS.get(row.direction, row.direction) or row.kind
    name = row.spec or row.name
    return f"{name}, {row.shape}, {row.dtype}\n{kind}{what}".replace(", ,", ",")


def _ms(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 0.01))))}f} ms"


def _pages(found: list[list[Row]]) -> Iterator[list[list[Row]]]:
    for start in range(0, len(found), MOST_PANELS):
        yield found[start : start + MOST_PANELS]


def _grid(page: Sequence[list[Row]], bars: Callable[[list[Row]], int]) -> tuple[Figure, list[Axes]]:
    """A panel for each entry, three in a row, the rows as high as their bars want."""
    columns = min(len(page), 3 if len(page) > 4 else 2)
    lines = [page[start : start + columns] for start in range(0, len(page), columns)]
    heights = [0.75 + 0.2 * max(bars(rows) for rows in line) for line in lines]
    width = drawing.WIDTH * (0.4 + 0.3 * columns)
    figure = drawing.figure(width, sum(heights) + 0.8)
    grid = figure.subplots(
        len(lines), columns, squeeze=False, gridspec_kw=dict(height_ratios=heights)
    )
    panels = list(grid.flat)
    for spare in panels[len(page) :]:
        spare.set_axis_off()
    return figure, panels[: len(page)]


# --------------------------------------------------------------------------------------
# Batch sizes
# --------------------------------------------------------------------------------------


_Lines = dict[str, list[Row]]  # Rows of a provider at several batch sizes, by its name.


def batch(section: Section) -> Iterator[Figure]:
    """Time an image against the batch, where a network was measured at several."""
    found = _by_batch(section)
    if not found:
        raise NothingToDraw("no network was measured at two batch sizes of one image size")
    looks = _looks(row for lines in found.values() for rows in lines.values() for row in rows)
    for start in range(0, len(found), 9):
        page = dict(list(found.items())[start : start + 9])
        columns = min(len(page), 3)
        high = math.ceil(len(page) / columns)
        figure = drawing.figure(drawing.WIDTH * (0.4 + 0.3 * columns), 3.2 * high + 1.2)
        grid = list(figure.subplots(high, columns, squeeze=False).flat)
        for axes, (title, lines) in zip(grid, page.items(), strict=False):
            _batches(axes, lines, looks)
            axes.set_title(title, loc="left")
        for spare in grid[len(page) :]:
            spare.set_axis_off()
        drawn = {line.get_label(): line for axes in grid for line in axes.get_lines()}
        names = [name for name in looks if name in drawn]  # Ours first.
        figure.legend(
            [drawn[name] for name in names], names, loc="outside lower center",
            ncols=min(len(names), 4), fontsize=8, handlelength=3.5,
        )  # fmt: skip
        drawing.title(figure, "Time of one image against the batch", section)
        yield figure


def _by_batch(section: Section) -> dict[str, _Lines]:
    """What was measured at several batch sizes, by the title of its panel."""
    groups: dict[str, _Lines] = {}
    for row in section.of("inference", "training"):
        if row.batch:
            what = "inference" if row.kind == "inference" else "training step"
            title = f"{row.spec}, {row.shape.partition('x')[2]}, {row.dtype}\n{what}"
            groups.setdefault(title, {}).setdefault(row.provider, []).append(row)
    several = {
        title: {name: rows for name, rows in lines.items() if len(rows) > 1}
        for title, lines in groups.items()
    }
    return {title: lines for title, lines in several.items() if lines}


def _looks(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line by provider: eager is grey, ours are thick and dark."""
    ours, peers = itertools.cycle(OURS), itertools.cycle(PEERS)
    rest = zip(itertools.cycle("osD^vPX*"), itertools.cycle(LINES), strict=False)
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: not row.ours):
        if row.provider in found:
            continue
        color = GREY if row.provider == EAGER else next(ours if row.ours else peers)
        marker, line = next(rest)
        found[row.provider] = dict(
            color=color, marker=marker, linestyle=line, markersize=5, markeredgecolor=BLACK,
            markeredgewidth=0.5, linewidth=2.4 if row.ours else 1.2, label=row.provider,
        )  # fmt: skip
    return found


def _batches(axes: Axes, found: dict[str, list[Row]], looks: dict[str, dict[str, Any]]) -> None:
    for name, rows in found.items():
        points = sorted((row.batch, row.device_ms / row.batch) for row in rows if row.batch)
        axes.plot(*zip(*points, strict=True), **looks[name])
    sizes = sorted({row.batch for rows in found.values() for row in rows if row.batch})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="images in a batch", ylabel="ms an image", ylim=(0, None))
    axes.grid(True, axis="y", linewidth=0.4, alpha=0.6)
