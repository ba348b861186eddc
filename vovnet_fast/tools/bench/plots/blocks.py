"""Where the time goes in one block, by part."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ....compat import zip
from ..rows import Row, Section, cases
from . import drawing
from .drawing import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, YELLOW, NothingToDraw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++", "|||", "**")


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
    figure = drawing.figure(drawing.WIDTH, sum(heights) + 1.5)
    grid = figure.subplots(
        len(found), 1, squeeze=False, sharex=True, gridspec_kw=dict(height_ratios=heights)
    )
    for axes, rows in zip(grid.flat, found, strict=True):
        _parts(axes, rows, looks)
    grid[-1, 0].set_xlabel("ms")
    handles, labels = _legend_of_parts(looks)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 5), fontsize=8)
    drawing.title(figure, "Where the time goes in one OSA block", section)
    yield figure


_BLOCK = (BLUE, ORANGE, SKY, YELLOW, GREEN, VERMILLION, PURPLE, "#BBBBBB")


def _parts(axes: Axes, rows: list[Row], looks: dict[str, tuple[str, str]]) -> None:
    for y, row in enumerate(rows[::-1]):
        left = 0.0
        for name, (color, hatch) in looks.items():  # The same order in every bar.
            ms = row.parts.get(name, 0.0)
            axes.barh(
                y, ms, left=left, height=0.7, color=color, hatch=hatch, edgecolor=BLACK,
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
        Patch(facecolor=color, hatch=hatch, edgecolor=BLACK, linewidth=0.6)
        for color, hatch in looks.values()
    ]
    return patches, list(looks)
