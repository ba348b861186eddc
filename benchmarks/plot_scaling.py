"""The plot of docs/performance.md, made of the rows of :mod:`benchmarks.scaling`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .scaling_tables import Rows

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # Okabe and Ito's.


def draw(content: dict[str, Rows], folder: Path) -> Path:
    """Write ``performance.png``: time and memory by image size, memory by depth, and GPUs.

    Args:
        content: sections by name.
        folder: where to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    _sizes(axes[0][0], content["image sizes"])
    _memory(axes[0][1], content["image sizes"])
    _depths(axes[1][0], content["depths"])
    _gpus(axes[1][1], content["several GPUs"])
    for axis in axes.flat:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
        axis.title.set_size(11)
    figure.suptitle("Counted on meta tensors and computed on paper: nothing here is measured")
    path = folder / "performance.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _lines(axis: Any, rows: Rows, lines: dict[str, tuple[str, str, str, str]]) -> None:
    x = [row["megapixels"] for row in rows]
    for label, (key, color, marker, style) in lines.items():
        y = [row[key] for row in rows]
        axis.plot(x, y, color=color, marker=marker, linestyle=style, label=label, markersize=5)
    axis.set(xscale="log", yscale="log", xlabel="megapixels of one image")


def _sizes(axis: Any, rows: Rows) -> None:
    lines = {
        "eager, floor": ("floor ms eager", ORANGE, "s", "--"),
        "fused, floor": ("floor ms", BLUE, "o", "-"),
        "60 launches in a CUDA graph, assumed": ("launching ms", GREY, "", ":"),
    }
    _lines(axis, rows, lines)
    axis.set(ylabel="ms", title="V-39, forward pass of one image, bf16, H200")


def _memory(axis: Any, rows: Rows) -> None:
    lines = {
        "eager": ("kept GB eager", ORANGE, "s", "--"),
        "eager, checkpointed": ("kept GB eager, checkpoint", GREEN, "^", "-."),
        "fused": ("kept GB fused", BLUE, "o", "-"),
        "fused, recomputed": ("kept GB fused, recompute", GREY, "D", ":"),
    }
    _lines(axis, rows, lines)
    axis.set(ylabel="GB", title="V-39, kept for the backward pass, bf16")


def _depths(axis: Any, rows: Rows) -> None:
    bars = (
        ("eager", "kept GB eager", ORANGE, "//"),
        ("fused", "kept GB fused", BLUE, ""),
        ("fused, recomputed", "kept GB fused, recompute", GREY, "xx"),
    )
    for i, (label, key, color, hatch) in enumerate(bars):
        x = [number + 0.27 * (i - 1) for number in range(len(rows))]
        y = [row[key] for row in rows]
        axis.bar(x, y, 0.25, color=color, hatch=hatch, edgecolor="white", label=label)
    names = [row["spec"].removesuffix("-eSE").replace("-slim-dw", "\nslim dw") for row in rows]
    axis.set_xticks(range(len(rows)), names)
    axis.set(ylabel="GB", title="Kept for the backward pass of one 800x1344 image")


def _gpus(axis: Any, rows: Rows) -> None:
    styles = ((BLUE, "o", "-"), (ORANGE, "s", "--"))
    for name, (color, marker, style) in zip(
        dict.fromkeys(row["network"] for row in rows), styles, strict=True
    ):
        own = [row for row in rows if row["network"] == name]
        x, y = [row["GPUs"] for row in own], [100 * row["efficiency"] for row in own]
        axis.plot(x, y, color=color, marker=marker, linestyle=style, label=f"{name} a GPU")
    axis.set_xscale("log", base=2)
    axis.set_xticks([row["GPUs"] for row in own], [str(row["GPUs"]) for row in own])
    axis.set(ylim=(0, 105), xlabel="GPUs, eight a node", ylabel="% of perfect scaling")
    axis.set_title("Data-parallel training, on paper")
