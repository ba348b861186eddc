"""The pictures of docs/architecture.md, made of what :mod:`benchmarks.architecture` finds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .architecture import GRADIENT, SLOT, Block, Room, Step, without_detours
from .plot_scaling import BLUE, GREEN, GREY, ORANGE

_COLOURS = {"conv": BLUE, "apply": ORANGE, "gate": ORANGE}
_FONT = 8


def block(found: Block, folder: Path) -> Path:
    """Write ``block.png``: the slots of the concat, and which kernel writes which.

    Args:
        found: launches of the block, those of the forward pass and those of the backward pass.
        folder: where to write.
    """
    figure, axes = _figure(2, (11, 8.2))
    for axis, steps, kind, title in (
        (axes[0], found.forward, SLOT, "Forward: each kernel writes a slot of one concat buffer"),
        (
            axes[1], found.backward, GRADIENT,
            "Backward: each slot's gradient is added and masked where it is written",
        ),
    ):  # fmt: skip
        _pass(axis, found.widths, steps, kind)
        axis.set_title(title, fontsize=11, loc="left", pad=16)
    figure.supxlabel(
        "filled: written; open: read; dotted: read from the forward pass's slots", fontsize=9
    )
    return _save(figure, folder / "block.png")


def _pass(axis: Any, widths: tuple[int, ...], steps: list[Step], kind: str) -> None:
    """A row for each launch, from above: what it reads is open, what it writes is filled."""
    begins = [sum(widths[:i]) for i in range(len(widths) + 1)]
    total = begins[-1]
    others = [p for step in steps for p in (*step.reads, *step.writes) if not _slots(p)]
    columns = {name: total * (1.05 + 0.17 * i) for i, name in enumerate(dict.fromkeys(others))}
    for i, width in enumerate(widths):
        axis.text(begins[i] + width / 2, -0.9, f"{kind} {i}\n{width}", ha="center", fontsize=_FONT)
    for name, left in columns.items():
        text = name.replace(" of the ", "\nof the ")
        axis.text(left + total * 0.075, -0.9, text, ha="center", fontsize=_FONT)

    def span(place: str) -> tuple[float, float]:
        if (slots := _slots(place)) is not None:
            return begins[slots[0]], begins[slots[1] + 1]
        return columns[place], columns[place] + total * 0.15

    for row, step in enumerate(steps):
        colour = next((c for name, c in _COLOURS.items() if step.kernel.startswith(name)), GREEN)
        axis.text(-total * 0.02, row, step.kernel, ha="right", va="center", fontsize=_FONT)
        for place in step.reads:
            left, right = span(place)
            style = dict(linestyle=":" if kind == GRADIENT and place.startswith(SLOT) else "-")
            axis.add_patch(_box(left, row, right - left, colour, filled=False, **style))
        for place in step.writes:
            left, right = span(place)
            axis.add_patch(_box(left, row, right - left, colour, filled=True))
    axis.set_xlim(-total * 0.3, max([total, *columns.values()]) + total * 0.18)
    axis.set_ylim(len(steps) - 0.3, -1.5)
    axis.axis("off")


def _slots(place: str) -> tuple[int, int] | None:
    found = re.fullmatch(rf"(?:{SLOT}|{GRADIENT}) (\d+)(?:-(\d+))?", place)
    return None if found is None else (int(found[1]), int(found[2] or found[1]))


def house(floors: list[list[Room]], folder: Path) -> Path:
    """Write ``house.png``: the rooms of the package, each above all that it imports.

    Args:
        floors: rooms from the lowest floor up.
        folder: where to write.
    """
    figure, axes = _figure(1, (11, 8.2))
    axis = axes[0]
    centres = {}
    for level, found in enumerate(floors):
        for i, room in enumerate(found):
            centre = (i + 0.5) / len(found), level
            centres[room.name] = centre
            width = min(0.9 / len(found), 0.22)
            axis.add_patch(_box(centre[0] - width / 2, level, width, GREY, filled=True, alpha=0.12))
            axis.text(*centre, room.name, ha="center", va="center", fontsize=10)
    arrow = dict(arrowstyle="->", color=BLUE, alpha=0.6, linewidth=0.9, shrinkA=0, shrinkB=0)
    for room, names in without_detours([room for found in floors for room in found]).items():
        for name in sorted(names):
            (x, y), (to_x, to_y) = centres[room], centres[name]
            axis.annotate("", xy=(to_x, to_y + 0.36), xytext=(x, y - 0.36), arrowprops=arrow)
    axis.set_xlim(0, 1)
    axis.set_ylim(-0.6, len(floors) - 0.4)
    axis.axis("off")
    axis.set_title(
        "vovnet_fast: arrows are imports, without those that others imply, and go down",
        fontsize=11,
        loc="left",
    )
    return _save(figure, folder / "house.png")


def _box(
    left: float, row: float, width: float, colour: str, *, filled: bool, alpha: float = 0.85,
    linestyle: str = "-",
) -> Any:  # fmt: skip
    from matplotlib.patches import Rectangle

    return Rectangle(
        (left, row - 0.36), width, 0.72, facecolor=colour if filled else "none",
        edgecolor=colour, alpha=alpha, linestyle=linestyle,
    )  # fmt: skip


def _figure(rows: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, 1, figsize=size, layout="constrained", squeeze=False)
    return figure, axes[:, 0]


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path
