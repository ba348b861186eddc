"""The tables of docs/performance.md, made of the rows of :mod:`benchmarks.scaling`."""

from __future__ import annotations

import re
import textwrap
from typing import Any

Rows = list[dict[str, Any]]

TABLES: dict[str, dict[str, tuple[str, str]]] = {
    # Heading: the number, and how it is written.
    "floors": {
        "network": ("network", ""),
        "GFLOP": ("GFLOP", ",.0f"),
        "launches, fused / eager": ("launches", "/launches eager"),
        "GB, fused / eager": ("GB", ".2f/GB eager"),
        "floor ms, fused / eager": ("floor ms", ".2f/floor ms eager"),
        "3x3": ("of it 3x3 ms", ".2f"),
        "1x1": ("of it 1x1 ms", ".2f"),
    },
    "image sizes": {
        "V-39 on": ("network", "last"),
        "megapixels": ("megapixels", ".2f"),
        "floor ms": ("floor ms", ".3f"),
        "launching ms": ("launching ms", ".2f"),
        "launches below 132 programs": ("small launches", "/launches"),
        "kept GB, eager / fused / recompute": (
            "kept GB eager", ".3f/kept GB fused/kept GB fused, recompute"
        ),
    },
    "batches": {
        "images": ("images", ""),
        "floor ms": ("floor ms", ".2f"),
        "an image": ("floor ms an image", ".3f"),
        "GB": ("GB", ".2f"),
        "launches below 132 programs": ("small launches", "/launches"),
    },
    "depths": {
        "architecture": ("spec", ""),
        "million parameters": ("million parameters", ".1f"),
        "GFLOP": ("GFLOP", ",.0f"),
        "launches": ("launches", ""),
        "floor ms, fused / eager": ("floor ms", ".2f/floor ms eager"),
        "kept GB, eager / fused / recompute": (
            "kept GB eager", ".3f/kept GB fused/kept GB fused, recompute"
        ),
    },
    "trainings": {
        "network": ("network", ""),
        "launches": ("launches", ""),
        "GB": ("GB", ".1f"),
        "floor ms, forward + backward": ("floor ms forward", ".2f+floor ms backward"),
        "kept GB, eager / checkpointed": ("kept GB eager", ".2f/kept GB eager, checkpoint"),
        "fused / recompute": ("kept GB fused", ".2f/kept GB fused, recompute"),
    },
    "convolutions": {
        "layer, output": ("layer", ""),
        "tile": ("tile", ""),
        "programs": ("programs", ","),
        "a processor": ("waves", ".2f"),
        "useful": ("useful", ".0%"),
        "floor us": ("floor us", ".1f"),
        "FLOP a byte from L2": ("FLOP a byte", ""),
        "TB/s from L2 at the floor": ("L2 TB/s", ".1f"),
    },
    "tunings": {
        "network": ("network", ""),
        "problems, forward / training": ("problems forward", "/problems training"),
        "candidates, forward / training": ("candidates forward", "/candidates training"),
        "measured, forward / training": ("trials forward", "/trials training"),
        "kernels to compile, training": ("kernels training", ""),
    },
    "multi-scale": {
        "image": ("size", ""),
        "new problems": ("new", ""),
        "in all": ("all", ""),
    },
    "several GPUs": {
        "network, a GPU": ("network", ""),
        "GPUs": ("GPUs", ""),
        "gradients MB": ("gradients MB", ".0f"),
        "step's floor ms": ("floor ms", ".2f"),
        "sum alone ms": ("sum ms", ".2f"),
        "not hidden ms": ("exposed ms", ".2f"),
        "efficiency": ("efficiency", ".0%"),
        "SyncBN waits ms": ("SyncBN ms", ".1f"),
    },
}  # fmt: skip
"""A form may go on: what follows / or + names another number, written in the same way."""


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """One cell of a table."""
    if form == "last":
        return str(row[key]).split()[-1]
    words = re.split(r"([/+])", form) if not form.startswith("+") else [form]
    keys = [key, *words[2::2]]
    joint = f" {words[1]} " if len(words) > 1 else ""
    return joint.join(format(row[name], words[0]) for name in keys)


def markdown(section: str, rows: Rows) -> str:
    """The table of a section."""
    columns = TABLES[section]
    left = [isinstance(rows[0][key], str) for key, _ in columns.values()]
    lines = [list(columns), ["---" if text else "---:" for text in left]]
    lines += [[cell(row, *how) for how in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(document: str, content: dict[str, Any]) -> str:
    """The document with its tables, which stand between comments that name a section.

    Args:
        document: the text.
        content: rows by section, and ``compile seconds``.

    Raises:
        ValueError: a section has no place in the document.
    """
    texts = {section: "\n" + markdown(section, content[section]) + "\n" for section in TABLES}
    texts["compile seconds"] = compilations(content["compile seconds"])
    for section, text in texts.items():
        begin, end = f"<!-- {section} -->\n", f"\n<!-- end of {section} -->"
        if begin not in document or end not in document:
            raise ValueError(f"the document has no place for {section}: {begin.strip()}")
        before, rest = document.split(begin, 1)
        document = before + begin + text + end + rest.split(end, 1)[1]
    return document


def compilations(measured: dict[str, Any]) -> str:
    """The sentence about the seconds of compilations."""
    text = (
        f"Compiling took {measured['median s']} s a kernel (median of {measured['kernels']} of "
        f"those of V-39's training, for sm_90; mean {measured['mean s']} s, the longest "
        f"{measured['longest s']} s), measured on one core of a server's CPU on "
        f"{measured['date']} (`python -m benchmarks.scaling --compile-seconds --update`)."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)
