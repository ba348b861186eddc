"""Operations under the ceilings of the device: rates against FLOP per byte."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..rows import EAGER, KINDS, Row, Section
from . import drawing
from .drawing import BLACK, GREY, LINES, OURS, PEERS, NothingToDraw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"conv": "o", "op": "s", "block": "^"}


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
    figure = drawing.figure(drawing.WIDTH, 6.2)
    axes = figure.subplots()
    left = min(x for _, x, _ in points) / 2
    right = max(top / slope * 4, max(x for _, x, _ in points) * 3)
    axes.set(
        xscale="log", yscale="log", xlim=(left, right),
        ylim=(min(y for _, _, y in points) / 2, top * 2),
        xlabel="FLOP per byte that the algorithm moves", ylabel=unit.name + _how(section),
    )  # fmt: skip
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.plot([left, top / slope], [left * slope, top], color=BLACK, linewidth=1.4)
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
    drawing.title(
        figure, "Roofline: every measured operation under what the device can do", section
    )
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
    for row, line in zip(sorted(matmuls, key=unit.rate)[::-1], itertools.cycle(LINES)):
        rate = unit.rate(row)
        axes.plot([rate / slope, right], [rate, rate], line, color=BLACK, linewidth=1.4)
        axes.annotate(
            f"matmul {row.dtype}: {rate:,.0f} {unit.name}", (right, rate), (-3, 3),
            textcoords="offset points", ha="right", va="bottom",
        )  # fmt: skip


def _painter(row: Row) -> str:
    """Whose colour a row has on the roofline: a backend's, for all its engines."""
    return f"{row.backend} backend" if row.ours else row.provider


def _styles(rows: Sequence[Row]) -> dict[str, str]:
    """Colours by painter: eager is grey, ours are dark, the others are light."""
    ours, peers = itertools.cycle(OURS), itertools.cycle(PEERS)
    found = {EAGER: GREY}
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
    handles += [mark(KINDS[kind], BLACK, _MARKERS[kind], False) for kind in kinds]
    axes.legend(handles=handles, loc="lower right", fontsize=8)
