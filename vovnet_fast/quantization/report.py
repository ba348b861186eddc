"""What quantisation costs, activation by activation."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _optional
from .._files import replacing
from ..arithmetic.layers import QuantizedNetwork
from ..compat import zip
from .floating import Floating, Folded
from .formats import Format
from .running import run
from .straight_through import StraightThrough
from .walking import IMAGE

FEATURE = "feature"


class Row(NamedTuple):
    """An activation, or a feature as it is returned.

    Attributes:
        name: see :mod:`.walking`; of a feature that of the feature.
        kind: ``activation`` or ``feature``.
        sqnr: ``10 log10(sum(x**2) / sum((q - x)**2))`` in dB, x of the network in fp32, q of the
            quantised one with all rounding before it; inf where they are equal.
        largest: the largest magnitude in fp32.
        cut: the part of the values that lie beyond the range.
    """

    name: str
    kind: str
    sqnr: float
    largest: float
    cut: float


class Report:
    """Signal-to-quantisation-noise ratios (SQNR) of a quantised network on calibration images.

    ``str()`` is a table.

    Attributes:
        rows: in the order in which the network makes them, features last.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    @property
    def features(self) -> list[Row]:
        """Rows of the features as they are returned, in network order."""
        return [row for row in self.rows if row.kind == FEATURE]

    @property
    def least(self) -> float:
        """The least SQNR of a feature, in dB: how far the worst one is from the network in fp32."""
        return min(row.sqnr for row in self.features)

    def worst(self, count: int = 5) -> list[Row]:
        """Activations of the least SQNR: which layers to look at."""
        rows = [row for row in self.rows if row.kind != FEATURE]
        return sorted(rows, key=lambda row: row.sqnr)[:count]

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("activation", "kind")
        for title in ("SQNR, dB", "largest", "cut"):
            table.add_column(title, justify="right")
        for row in self.rows:
            table.add_row(
                row.name, row.kind, f"{row.sqnr:.1f}", f"{row.largest:.4g}", f"{row.cut:.3%}"
            )
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return text.getvalue() + f"least SQNR of a feature: {self.least:.1f} dB\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the SQNR of every activation; the picture is there whole or not at all.

        Args:
            path: of the picture; its ending chooses the format.

        Raises:
            RuntimeError: there is no matplotlib.
            ValueError: matplotlib knows no such format.
            OSError: there is no such folder, the disk is full, or may not be written.
        """
        reason = _optional.why_not("matplotlib")
        if reason is not None:
            raise RuntimeError(f"a plot of the report needs matplotlib: {reason}")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.16 * len(self.rows)), 4.2), layout="constrained")
        axes: Any = figure.subplots()
        highest = max([row.sqnr for row in self.rows if math.isfinite(row.sqnr)], default=0.0)
        for kind, colour in (("activation", "C0"), (FEATURE, "C1")):
            places = [i for i, row in enumerate(self.rows) if row.kind == kind]
            heights = [min(self.rows[i].sqnr, highest) for i in places]
            axes.bar(places, heights, color=colour, label=kind)
        names = [row.name for row in self.rows]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axes.set_ylabel("SQNR against fp32 (dB)")
        axes.legend()
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, dpi=150, format=Path(path).suffix[1:] or None)


class _Tally:
    """Of one activation, over images that come one after another."""

    def __init__(self) -> None:
        self.signal = self.noise = self.largest = 0.0
        self.cut = self.count = 0

    def add(self, found: Tensor, wanted: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> None:
        self.signal += wanted.double().square().sum().item()
        self.noise += (found.double() - wanted.double()).square().sum().item()
        self.largest = max(self.largest, wanted.abs().max().item())
        if ends is not None:
            low, high = (end.to(wanted.device) for end in ends)
            self.cut += int(((wanted > high) | (wanted < low)).sum())
        self.count += wanted.numel()

    @property
    def sqnr(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf


class _Watched(StraightThrough):
    def __init__(self, network: QuantizedNetwork) -> None:
        super().__init__(network)
        self.seen: dict[str, Tensor] = {}

    def observe(self, name: str, x: Tensor) -> None:
        self.seen[name] = x


def measure(network: QuantizedNetwork, folded: Folded, images: Tensor) -> list[Row]:
    """Rows of a report, measured on one image after another.

    Args:
        network: the quantised one.
        folded: what it was made of, before biases were corrected; fp32.
        images: ``[N, C, H, W]`` fp32.
    """
    activations: dict[str, _Tally] = {}
    features = {name: _Tally() for name in network.out_features}
    with torch.no_grad():
        for image in images.split(1):
            exact: dict[str, Tensor] = {IMAGE: image}
            watched = _Watched(network)
            found = watched.run(image)
            wanted = Floating(folded, exact.__setitem__).run(image, network.out_features)
            for name, x in watched.seen.items():
                activations.setdefault(name, _Tally()).add(x, exact[name], watched.ends(name))
            for tally, x, reference in zip(features.values(), found, wanted, strict=True):
                tally.add(x, reference)
    return [
        Row(name, kind, tally.sqnr, tally.largest, tally.cut / tally.count)
        for kind, tallies in (("activation", activations), (FEATURE, features))
        for name, tally in tallies.items()
    ]


def least_sqnr(networks: Sequence[QuantizedNetwork], folded: Folded, images: Tensor) -> list[float]:
    """The least SQNR of a feature of each of several networks that were made of the same one.

    Args:
        networks: quantised ones, with the same features.
        folded: what they were made of.
        images: ``[N, C, H, W]`` fp32.
    """
    tallies = [[_Tally() for _ in network.out_features] for network in networks]
    for image in images.split(1):
        wanted = Floating(folded, lambda name, x: None).run(image, networks[0].out_features)
        for network, own in zip(networks, tallies, strict=True):
            ops = Format(network.dtype, network.levels).ops
            found = run(ops, image.permute(0, 2, 3, 1), network)
            for tally, x, reference in zip(own, found, wanted, strict=True):
                tally.add(x.permute(0, 3, 1, 2), reference)
    return [min(tally.sqnr for tally in own) for own in tallies]
