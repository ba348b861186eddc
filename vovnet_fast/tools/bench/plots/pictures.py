"""Every picture by its name, written to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..rows import Section
from . import blocks, networks, roofline
from .drawing import NothingToDraw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160
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


PICTURES: dict[str, Callable[[Section], Iterator[Figure]]] = {
    "roofline": roofline.roofline,
    "models": networks.models,
    "memory": networks.memory,
    "batch": networks.batch,
    "block": blocks.block,
}
"""Every picture by the name of its file."""
