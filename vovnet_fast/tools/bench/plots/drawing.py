"""What all pictures share: sizes, colours, titles, and that there may be nothing to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..rows import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 10.0
"""Inches; a page's text width in landscape."""

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, BLACK, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#000000", "#999999"
OURS = (BLUE, VERMILLION, GREEN, PURPLE)
PEERS = (ORANGE, SKY, YELLOW, BLACK, "#BBBBBB")
LINES = ("-", "--", "-.", ":")


class NothingToDraw(Exception):
    """The rows for a picture are not there; the message says which."""


def figure(width: float, height: float) -> Figure:
    """Without pyplot, which keeps figures and wants a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def title(figure: Figure, what: str, section: Section) -> None:
    """What a picture shows, and below it where the rows come from."""
    figure.suptitle(f"{what}\n{section.title}", fontsize=10, x=0.01, ha="left")
