"""A network that is not frozen on a CPU, in inference and in training, against plain PyTorch.

``auto`` is what users get who change nothing but the type of the backbone. It is held against the
better of plain PyTorch's two layouts, which differs between processors, sizes and networks: all
that is said is a ratio of times of the same rounds, in one process.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vovnet_fast import use_backend
from vovnet_fast.tools.bench.stopwatch import (
    Interval,
    Stopwatch,
    interleaved,
    ratio_interval,
    spread,
)
from vovnet_fast.tools.bench.training import TrainingStep, image

from .networks import build, build_training

CPU = torch.device("cpu")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PLAIN = tuple(f"plain, {layout}" for layout in LAYOUTS)

Row = dict[str, Any]


class Kind(NamedTuple):
    """What is measured.

    Attributes:
        spec: the architecture.
        shape: N, H, W of the images.
        dtype: of activations, in training by autocast.
        train: a training step, batch norms with fixed statistics; otherwise inference.
    """

    spec: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    train: bool

    def __str__(self) -> str:
        n, h, w = self.shape
        what = "training" if self.train else "inference"
        return f"{self.spec}, {n}x{h}x{w}, {what}, {str(self.dtype).removeprefix('torch.')}"


def kinds(
    specs: Sequence[str], sizes: Sequence[int], dtypes: Sequence[torch.dtype], *, train: bool
) -> list[Kind]:
    """All combinations: one image in inference, two in training."""
    number = 2 if train else 1
    return [
        Kind(spec, (number, size, size), dtype, train)
        for dtype, spec, size in itertools.product(dtypes, specs, sizes)
    ]


def measure(kind: Kind, rounds: int, seconds: float, each: Callable[[str], None]) -> list[Row]:
    """Rows of what is not frozen, each against the better of plain PyTorch's layouts.

    Args:
        kind: what to measure.
        rounds: at most, in each of which everybody has a turn.
        seconds: no further round begins after so many.
        each: is told whose turn has just ended.
    """
    works = {
        f"{who}, {layout}": _work(kind, backend, LAYOUTS[layout])
        for who, backend in (("plain", "reference"), ("auto", "auto"))
        for layout in LAYOUTS
    }
    if kind.train:  # Whatever it takes: what keeps least.
        works["cpu, channels_last"] = _work(kind, "cpu", torch.channels_last)
    for work in works.values():
        work()  # What is measured once for all, or compiled, or kept, is no part of a time.
    times = interleaved(works, rounds, watch=Stopwatch(CPU), warm_up=3, seconds=seconds, each=each)
    return [_row(kind, name, times) for name in works]


def _work(kind: Kind, backend: str, layout: torch.memory_format) -> Callable[[], object]:
    """A call of a network whose weights and images are in a layout."""
    network: Any = (
        build_training(kind.spec, CPU) if kind.train else build(kind.spec, kind.dtype, CPU)
    )
    network = network.to(memory_format=layout)
    call: Callable[[], object]
    if kind.train:
        step = TrainingStep(network, kind.shape, CPU, kind.dtype, layout)
        call = step
    else:
        call = _inference(network, image(kind.shape, kind.dtype, CPU, layout))

    def work() -> object:
        with use_backend(backend):
            return call()

    return work


def _inference(network: nn.Module, images: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return network(images)

    return call


def _row(kind: Kind, name: str, times: Mapping[str, Sequence[float]]) -> Row:
    better = min(PLAIN, key=lambda plain: statistics.median(times[plain]))
    same = f"plain, {name.partition(', ')[2]}"
    return {
        "what": str(kind),
        "who": name,
        "better": better,
        **spread(times[name], "ms"),
        **ratio_interval(times[better], times[name]).fields(),
        "ratio_to_same_layout": ratio_interval(times[same], times[name]).ratio,
    }


def least(rows: Sequence[Row], ratio: str = "ratio_to_eager") -> Row | None:
    """The row of ``auto`` that is furthest behind plain PyTorch, or least ahead of it.

    Args:
        rows: of :func:`measure`.
        ratio: ``ratio_to_eager``, of the better layout, or ``ratio_to_same_layout``.
    """
    ours = [row for row in rows if row["who"].startswith("auto")]
    return min(ours, key=lambda row: row[ratio], default=None)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "# Networks that are not frozen, against plain PyTorch"
    yield ""
    yield "Ratios are the time of the better of plain PyTorch's layouts over that of the row,"
    yield "medians of rounds run in turn, with intervals of at least 95 %; beside them those to"
    yield "plain PyTorch with weights and images in the row's own layout."
    for what in dict.fromkeys(row["what"] for row in rows):
        yield f"\n## {what}\n"
        yield "| who | ratio to the better plain | to the same layout | median ms | least ms |"
        yield "|---|---|---|---|---|"
        for row in (row for row in rows if row["what"] == what):
            yield (
                f"| {row['who']} | {Interval.of(row).text()} | "
                f"{row['ratio_to_same_layout']:.2f} | {row['ms']:.1f} | {row['ms_min']:.1f} |"
            )
    for ratio, words in (
        ("ratio_to_eager", "Least ratio over all rows of auto"),
        ("ratio_to_same_layout", "Least ratio to plain PyTorch in the same layout"),
    ):
        worst = least(rows, ratio)
        if worst is not None:
            yield ""
            yield f"{words}: {worst[ratio]:.2f} ({worst['who']}; {worst['what']})."
