"""The demo's pictures, drawn from the files and arrays of a run."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten

import matplotlib

matplotlib.use("Agg")  # The pictures go to files; no window, and no display is needed.

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from skimage import io

# Okabe and Ito's palette, told apart with any kind of colour vision.
BLUE, VERMILION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"

SCORE_THRESHOLD = 0.3
"""Detections below this score are not drawn."""

_ROWS, _COLUMNS = 3, 4


def draw_detections(scenes: Path, results: Path, target: Path, title: str) -> None:
    """Draw the first validation scenes with their ground truth and the detections.

    Args:
        scenes: dataset folder as :mod:`scenes` writes it.
        results: detections in COCO's results format.
        target: PNG to write.
        title: heading.
    """
    truth = json.loads((scenes / "val.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    detections = json.loads(results.read_text())
    figure = Figure(figsize=(3.1 * _COLUMNS, 3.1 * _ROWS + 0.9), dpi=110)
    axes = figure.subplots(_ROWS, _COLUMNS, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, image in zip(axes, truth["images"], strict=False):
        ax.imshow(io.imread(scenes / "val" / image["file_name"]), interpolation="bilinear")
        objects = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        for obj in objects:
            _draw_truth(ax, obj["bbox"], names[obj["category_id"]])
        for detection in best_of_each_place(
            [d for d in detections if d["image_id"] == image["id"]]
        ):
            text = f"{names[detection['category_id']]}  {detection['score']:.2f}"
            _draw_detection(ax, detection["bbox"], text, is_right(detection, objects))
    figure.suptitle(title, y=0.988, fontsize=13)
    _add_legend(figure)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.01, wspace=0.03, hspace=0.03)
    save(figure, target)


def best_of_each_place(detections: list[dict]) -> list[dict]:
    """The detections worth drawing, best first.

    A detector suppresses overlapping boxes of the same class only, which its
    average precision gains by; in a picture a second guess under the first is
    unreadable. Scores below the threshold are left out.
    """
    kept: list[dict] = []
    for detection in sorted(detections, key=lambda d: -d["score"]):
        if detection["score"] >= SCORE_THRESHOLD and all(
            iou(detection["bbox"], other["bbox"]) < 0.5 for other in kept
        ):
            kept.append(detection)
    return kept


def is_right(detection: dict, objects: list[dict]) -> bool:
    """Whether an object has the detection's class and at least half its box."""
    return any(
        detection["category_id"] == obj["category_id"]
        and iou(detection["bbox"], obj["bbox"]) >= 0.5
        for obj in objects
    )


def _draw_truth(ax: Axes, box: list[float], name: str) -> None:
    # White on black shows on any background.
    for color, width in ((BLACK, 3.2), ("white", 1.6)):
        _draw_box(ax, box, color, linewidth=width)
    ax.text(
        box[0] + box[2] - 0.5,
        box[1] + box[3] - 0.5,
        name,
        color=BLACK,
        fontsize=9,
        horizontalalignment="right",
        verticalalignment="bottom",
        bbox=dict(facecolor="white", edgecolor=BLACK, linewidth=0.6, pad=1.2),
    )


def _draw_detection(ax: Axes, box: list[float], text: str, right: bool) -> None:
    color = BLUE if right else VERMILION
    _draw_box(ax, box, color, linewidth=2.2, linestyle="-" if right else "--")
    # Inside the box where there is no room above it, and leftwards at the right edge.
    inside, leftwards = box[1] < 9, box[0] > 0.75 * ax.get_xlim()[1]
    ax.text(
        box[0] + box[2] - 0.5 if leftwards else box[0] - 0.5,
        box[1] + 0.5 if inside else box[1] - 1.5,
        text,
        color="white",
        fontsize=9,
        fontweight="bold",
        horizontalalignment="right" if leftwards else "left",
        verticalalignment="top" if inside else "bottom",
        bbox=dict(facecolor=color, edgecolor="none", pad=1.2),
    )


def _draw_box(ax: Axes, box: list[float], color: str, **line: object) -> None:
    x, y, width, height = box
    # Pixel centres are at whole numbers, a COCO box starts at its first pixel's edge.
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=color, **line))


def _add_legend(figure: Figure) -> None:
    figure.legend(
        handles=[
            Patch(facecolor="white", edgecolor=BLACK, label="ground truth, class below"),
            Line2D([], [], color=BLUE, linewidth=2.2, label="right: class and score above"),
            Line2D([], [], color=VERMILION, linewidth=2.2, linestyle="--", label="wrong"),
        ],
        title=f"best detection at each place, scores from {SCORE_THRESHOLD}",
        loc="upper center",
        bbox_to_anchor=(0.5, 0.972),
        ncols=3,
        frameon=False,
    )


def iou(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes in x, y, width, height."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def draw_losses(
    losses: dict[str, np.ndarray], learning_rates: np.ndarray, target: Path, title: str
) -> None:
    """Draw every loss term and the learning rate over the iterations.

    Args:
        losses: ``[iterations]`` by name; ``loss`` is the sum of the others.
        learning_rates: ``[iterations]``.
        target: PNG to write.
        title: heading.
    """
    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    iterations = np.arange(1, len(learning_rates) + 1)
    styles = [(BLACK, "-"), (BLUE, "--"), (VERMILION, "-."), (GREEN, ":"), ("#CC79A7", "-")]
    for (name, values), (color, style) in zip(losses.items(), styles, strict=False):
        top.plot(iterations, values, color=color, linewidth=0.6, alpha=0.25)
        label = "total" if name == "loss" else name.removeprefix("loss_")
        top.plot(iterations, smooth(values), color=color, linestyle=style, label=label)
    top.set_yscale("log")
    top.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_formatter(NullFormatter())
    top.set_ylabel("training loss (log scale)")
    top.set_title(shorten(title, 100))
    top.grid(alpha=0.3)
    top.legend(title="mean of 30 iterations")
    bottom.plot(iterations, learning_rates, color=BLACK)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("iteration")
    bottom.grid(alpha=0.3)
    save(figure, target)


_COMPARED = {"mAP": "bbox_mAP", "mAP50": "bbox_mAP_50", "mAP75": "bbox_mAP_75"}


def draw_comparison(
    losses: dict[str, np.ndarray],
    metrics: dict[str, dict[str, float | None]],
    target: Path,
    title: str,
) -> None:
    """Draw two trainings: their losses over the iterations, and what they reached.

    Args:
        losses: ``[iterations]`` total loss by training.
        metrics: mmdet's COCO metrics by training, of the same names. These three are
            never None.
        target: PNG to write.
        title: heading.
    """
    figure = Figure(figsize=(10, 4.5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    # Told apart by dashes and hatching too, in print and with any kind of colour vision.
    styles = [(BLACK, "-", ""), (VERMILION, "--", "///")]
    width, places = 0.36, np.arange(len(_COMPARED))
    for i, ((name, values), (color, line, hatch)) in enumerate(
        zip(losses.items(), styles, strict=True)
    ):
        iterations = np.arange(1, len(values) + 1)
        left.plot(iterations, values, color=color, linewidth=0.5, alpha=0.2)
        left.plot(iterations, smooth(values), color=color, linestyle=line, label=name)
        heights = [metrics[name][key] for key in _COMPARED.values()]
        bars = right.bar(
            places + (i - 0.5) * width, heights, width,
            facecolor="white" if hatch else "0.75", edgecolor=color, hatch=hatch, label=name,
        )  # fmt: skip
        right.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("iteration")
    left.set_ylabel("training loss (log scale)")
    left.grid(alpha=0.3)
    left.legend(title="mean of 30 iterations")
    right.set_xticks(places, list(_COMPARED))
    right.set_ylim(0, 1.15)  # Room for the legend above the bars.
    right.set_yticks(np.linspace(0, 1, 6))
    right.set_ylabel("average precision on unseen scenes")
    right.legend(loc="upper center", ncols=2)
    figure.suptitle(shorten(title, 110))
    save(figure, target)


def smooth(values: np.ndarray, window: int = 30) -> np.ndarray:
    """Mean of the last ``window`` values, of fewer at the start; ``[n]`` to ``[n]``."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def save(figure: Figure, target: Path) -> None:
    """Write a PNG that is never there by half."""
    partial = target.with_name(target.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(target)
