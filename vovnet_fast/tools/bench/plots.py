"""Pictures of measurements, for screens, for print in grey, and for colour-blind people.

Colours are Okabe and Ito's. Nothing is told apart by colour alone: there is a hatch, a marker, a
line style or a label beside it. Every function returns a figure, or raises :class:`NothingToDraw`
with the reason.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .rows import EAGER, KINDS, Row, Section, cases
from .stopwatch import CONFIDENCE, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
WIDTH = 10.0
"""Inches; a page's text width in landscape."""

MOST_PANELS = 15
"""On one picture; the rest is on further ones."""

_BLUE, _VERMILLION, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_SKY, _PURPLE, _YELLOW, _BLACK, _GREY = "#56B4E9", "#CC79A7", "#F0E442", "#000000", "#999999"
_OURS = (_BLUE, _VERMILLION, _GREEN, _PURPLE)
_PEERS = (_ORANGE, _SKY, _YELLOW, _BLACK, "#BBBBBB")
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++", "|||", "**")
_LINES = ("-", "--", "-.", ":")
_MARKERS = {"conv": "o", "op": "s", "block": "^"}
_DIRECTIONS = {"forward": "inference", "step": "training step"}
_SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


class NothingToDraw(Exception):
    """The rows for a picture are not there; the message says which."""


class Pictures(NamedTuple):
    """What was drawn, and why the rest was not.

    Attributes:
        files: by the picture's name, in order; a picture may have several.
        missing: reasons by the picture's name.
    """

    files: dict[str, list[Path]]
    missing: dict[str, str]


def draw(section: Section, folder: Path, suffix: str = "") -> Pictures:
    """Write every picture that the rows allow as ``NAME{suffix}.png``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    found = Pictures({}, {})
    with matplotlib.rc_context(_SETTINGS):
        for name, make in PICTURES.items():
            try:
                figures = list(make(section))
            except NothingToDraw as reason:
                found.missing[name] = str(reason)
                continue
            for number, figure in enumerate(figures, 1):
                page = f"-{number}" if len(figures) > 1 else ""
                path = folder / f"{name}{suffix}{page}.png"
                figure.savefig(path, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
                found.files.setdefault(name, []).append(path)
    return found


def _figure(width: float, height: float) -> Figure:
    """Without pyplot, which keeps figures and wants a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Figure, what: str, section: Section) -> None:
    figure.suptitle(f"{what}\n{section.title}", fontsize=10, x=0.01, ha="left")


# --------------------------------------------------------------------------------------
# Roofline
# --------------------------------------------------------------------------------------


def roofline(section: Section) -> Iterator[Figure]:
    """Rate of every operation against its FLOP per byte, under the ceilings of the run."""
    rows = [row for row in section.of(*_MARKERS) if row.flop and row.bytes]
    matmuls = [row for row in section.of("ceiling") if row.tflops]
    copies = [row.gbs for row in section.of("ceiling") if row.gbs and not row.tflops]
    if not rows:
        raise NothingToDraw("no row of a convolution, operation or block has FLOP and bytes")
    if not matmuls or not copies:
        raise NothingToDraw("no rows of kind ceiling, for a matrix multiplication and for a copy")
    unit = _Unit.of(matmuls)
    points = [(row, row.flop / row.bytes, unit.rate(row)) for row in rows if row.flop and row.bytes]
    top, slope = max(map(unit.rate, matmuls)), max(copies) * unit.factor / 1e3
    figure = _figure(WIDTH, 6.2)
    axes = figure.subplots()
    left = min(x for _, x, _ in points) / 2
    right = max(top / slope * 4, max(x for _, x, _ in points) * 3)
    axes.set(
        xscale="log", yscale="log", xlim=(left, right),
        ylim=(min(y for _, _, y in points) / 2, top * 2),
        xlabel="FLOP per byte that the algorithm moves", ylabel=unit.name + _how(section),
    )  # fmt: skip
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.plot([left, top / slope], [left * slope, top], color=_BLACK, linewidth=1.4)
    x = left**0.75 * (top / slope) ** 0.25
    axes.annotate(
        f"copy: {max(copies):,.{0 if max(copies) >= 100 else 1}f} GB/s", (x, x * slope), (0, 3),
        textcoords="offset points", rotation=_angle(axes, x, slope), rotation_mode="anchor",
    )  # fmt: skip
    _matmuls(axes, matmuls, unit, slope, right)
    styles = _styles(rows)
    # What is only compared with lies below.
    for row, x, y in sorted(points, key=lambda point: point[0].ours):
        color = styles[_painter(row)]
        axes.scatter(
            x, y, s=34, marker=_MARKERS[row.kind], linewidths=1.1, alpha=0.85, zorder=3 + row.ours,
            facecolors=color if row.ours else "none", edgecolors=color,
        )  # fmt: skip
    _roofline_legend(axes, rows, styles)
    _title(figure, "Roofline: every measured operation under what the device can do", section)
    yield figure


class _Unit(NamedTuple):
    """Of rates: what suits the device."""

    name: str
    factor: float  # From TFLOP/s.

    @classmethod
    def of(cls, matmuls: Sequence[Row]) -> _Unit:
        fast = max(row.tflops or 0 for row in matmuls) >= 5
        return cls("TFLOP/s", 1.0) if fast else cls("GFLOP/s", 1e3)

    def rate(self, row: Row) -> float:
        rate = row.tflops or (row.flop or 0) / row.device_ms / 1e9
        return rate * self.factor


def _how(section: Section) -> str:
    return ", median" + (", cold L2 cache" if section.provenance.get("device") == "cuda" else "")


def _angle(axes: Axes, x: float, slope: float) -> float:
    """Of the copy's line, in degrees on the picture."""
    ends = axes.transData.transform([(x, x * slope), (2 * x, 2 * x * slope)])
    run, rise = ends[1] - ends[0]
    return math.degrees(math.atan2(rise, run))


def _matmuls(axes: Axes, matmuls: Sequence[Row], unit: _Unit, slope: float, right: float) -> None:
    """A level for every matrix multiplication that was measured."""
    for row, line in zip(sorted(matmuls, key=unit.rate)[::-1], itertools.cycle(_LINES)):
        rate = unit.rate(row)
        axes.plot([rate / slope, right], [rate, rate], line, color=_BLACK, linewidth=1.4)
        axes.annotate(
            f"matmul {row.dtype}: {rate:,.0f} {unit.name}", (right, rate), (-3, 3),
            textcoords="offset points", ha="right", va="bottom",
        )  # fmt: skip


def _painter(row: Row) -> str:
    """Whose colour a row has on the roofline: a backend's, for all its engines."""
    return f"{row.backend} backend" if row.ours else row.provider


def _styles(rows: Sequence[Row]) -> dict[str, str]:
    """Colours by painter: eager is grey, ours are dark, the others are light."""
    ours, peers = itertools.cycle(_OURS), itertools.cycle(_PEERS)
    found = {EAGER: _GREY}
    for row in sorted(rows, key=lambda row: not row.ours):
        if _painter(row) not in found:
            found[_painter(row)] = next(ours if row.ours else peers)
    return found


def _roofline_legend(axes: Axes, rows: Sequence[Row], styles: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    def mark(label: str, color: str, marker: str, filled: bool) -> Line2D:
        face = color if filled else "none"
        return Line2D(
            [], [], linestyle="", marker=marker, label=label, color=color, markerfacecolor=face
        )

    painters = {_painter(row): row.ours for row in sorted(rows, key=lambda row: not row.ours)}
    handles = [
        mark(f"{name}{'' if ours else ' (hollow: a peer)'}", styles[name], "D", ours)
        for name, ours in painters.items()
    ]
    kinds = [kind for kind in _MARKERS if any(row.kind == kind for row in rows)]
    handles += [mark(KINDS[kind], _BLACK, _MARKERS[kind], False) for kind in kinds]
    axes.legend(handles=handles, loc="lower right", fontsize=8)


# --------------------------------------------------------------------------------------
# Networks against peers
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
        _title(figure, "Speed relative to eager (longer is faster)", section)
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
    axes.axvline(1, color=_BLACK, linewidth=0.8, linestyle="--", zorder=0.5)
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
        _title(figure, "Peak memory (shorter is better)", section)
        yield figure


def _peaks(axes: Axes, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: -(row.peak_mib or 0))
    for y, row in enumerate(rows):
        peak = row.peak_mib or 0
        _bar(axes, y, peak, row)
        if row.kept_mib:
            axes.barh(y, row.kept_mib, height=0.26, color="white", edgecolor=_BLACK, linewidth=0.7)
        axes.annotate(
            f"{peak:,.0f}", (peak, y), (3, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.set_xlim(0, max(row.peak_mib or 0 for row in rows) * 1.25)
    _name_bars(axes, rows)


def _bar(axes: Axes, y: float, width: float, row: Row, **options: Any) -> None:
    """Solid and dark for ours, hatched and light for peers, plain grey for eager."""
    color, hatch = (_BLUE, "") if row.ours else (_ORANGE, "////")
    if row.provider == EAGER:
        color, hatch = "#CCCCCC", ""
    axes.barh(
        y, width, height=0.72, color=color, hatch=hatch, edgecolor=_BLACK, linewidth=0.6, **options
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
    width = WIDTH * (0.4 + 0.3 * columns)
    figure = _figure(width, sum(heights) + 0.8)
    grid = figure.subplots(
        len(lines), columns, squeeze=False, gridspec_kw=dict(height_ratios=heights)
    )
    panels = list(grid.flat)
    for spare in panels[len(page) :]:
        spare.set_axis_off()
    return figure, panels[: len(page)]


# --------------------------------------------------------------------------------------
# Batch sizes, and one block
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
        figure = _figure(WIDTH * (0.4 + 0.3 * columns), 3.2 * high + 1.2)
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
        _title(figure, "Time of one image against the batch", section)
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
    ours, peers = itertools.cycle(_OURS), itertools.cycle(_PEERS)
    rest = zip(itertools.cycle("osD^vPX*"), itertools.cycle(_LINES), strict=False)
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: not row.ours):
        if row.provider in found:
            continue
        color = _GREY if row.provider == EAGER else next(ours if row.ours else peers)
        marker, line = next(rest)
        found[row.provider] = dict(
            color=color, marker=marker, linestyle=line, markersize=5, markeredgecolor=_BLACK,
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


def block(section: Section) -> Iterator[Figure]:
    """Where the time goes in one OSA block, by part, for each provider."""
    found = [
        rows
        for every in cases(section.of("block")).values()
        if (rows := [row for row in every if row.parts])
    ]
    if not found:
        raise NothingToDraw("no row of kind block says what its parts take")
    names = list({part: None for rows in found for row in rows for part in row.parts})
    looks = dict(zip(names, zip(itertools.cycle(_BLOCK), itertools.cycle(_HATCHES)), strict=False))
    heights = [0.6 + 0.3 * len(rows) for rows in found]
    figure = _figure(WIDTH, sum(heights) + 1.5)
    grid = figure.subplots(
        len(found), 1, squeeze=False, sharex=True, gridspec_kw=dict(height_ratios=heights)
    )
    for axes, rows in zip(grid.flat, found, strict=True):
        _parts(axes, rows, looks)
    grid[-1, 0].set_xlabel("ms")
    handles, labels = _legend_of_parts(looks)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 5), fontsize=8)
    _title(figure, "Where the time goes in one OSA block", section)
    yield figure


_BLOCK = (_BLUE, _ORANGE, _SKY, _YELLOW, _GREEN, _VERMILLION, _PURPLE, "#BBBBBB")


def _parts(axes: Axes, rows: list[Row], looks: dict[str, tuple[str, str]]) -> None:
    for y, row in enumerate(rows[::-1]):
        left = 0.0
        for name, (color, hatch) in looks.items():  # The same order in every bar.
            ms = row.parts.get(name, 0.0)
            axes.barh(
                y, ms, left=left, height=0.7, color=color, hatch=hatch, edgecolor=_BLACK,
                linewidth=0.6,
            )  # fmt: skip
            left += ms
        axes.annotate(
            f"{left:.3g} ms", (left, y), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [row.provider for row in rows[::-1]])
    for label, row in zip(axes.get_yticklabels(), rows[::-1], strict=True):
        label.set_fontweight("bold" if row.ours else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_title(rows[0].title, loc="left")
    axes.margins(x=0.1)


def _legend_of_parts(looks: dict[str, tuple[str, str]]) -> tuple[list, list[str]]:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=color, hatch=hatch, edgecolor=_BLACK, linewidth=0.6)
        for color, hatch in looks.values()
    ]
    return patches, list(looks)


PICTURES: dict[str, Callable[[Section], Iterator[Figure]]] = {
    "roofline": roofline,
    "models": models,
    "memory": memory,
    "batch": batch,
    "block": block,
}
"""Every picture by the name of its file."""
