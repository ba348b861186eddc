"""A network that is not frozen on a CPU, in inference and in training, against plain PyTorch.

``auto`` is what users get who change nothing but the type of the backbone. It is held against the
better of plain PyTorch's two layouts, which differs between processors, sizes and networks.

Two networks of one process that run the very same modules differ by up to a twentieth, for as
long as it lives: their memory lies elsewhere. More rounds do not show that. So every process
builds its own, in an order of its own, and gives one ratio of times of the same rounds; what is
said is the median of several processes, with the interval that they span. Beside it stands the
control, a second plain network, whose ratio to the first is 1 but for what cannot be told apart.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vovnet_fast import use_backend
from vovnet_fast.tools.bench import heap
from vovnet_fast.tools.bench.stopwatch import (
    Interval,
    Stopwatch,
    interleaved,
    median_interval,
    ratio_interval,
    spread,
)
from vovnet_fast.tools.bench.training import TrainingStep, image

from .networks import build, build_training

CPU = torch.device("cpu")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PLAIN = tuple(f"plain, {layout}" for layout in LAYOUTS)
CONTROL = "plain again"
FEWEST = 5
"""Rounds of a process, however long they take."""

Row = dict[str, Any]
Times = Mapping[str, Sequence[float]]


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


def measure(kind: Kind, rounds: int, seconds: float, threads: int, processes: int) -> list[Row]:
    """Rows of what is not frozen, each against the better of plain PyTorch's layouts.

    Args:
        kind: what to measure.
        rounds: at most, in each of which everybody has a turn.
        seconds: no further round of a process begins after so many.
        threads: of every process.
        processes: one after the other, or 1, which is this one.
    """
    if processes == 1:
        found = [times(kind, rounds, seconds, threads, 0)]
    else:  # Spawned: nothing of a process is left to the next.
        turns = [(kind, rounds, seconds, threads, order) for order in range(processes)]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            found = pool.starmap(times, turns, chunksize=1)
    return [_row(kind, name, found) for name in found[0]]


def times(kind: Kind, rounds: int, seconds: float, threads: int, order: int) -> dict[str, Any]:
    """Seconds by who ran, of networks that are built in this process.

    Args:
        kind, rounds, seconds: as of :func:`measure`.
        threads: PyTorch's.
        order: in which they are built: another for every number.
    """
    heap.keep()
    torch.set_num_threads(threads)
    who = [("plain", "reference"), ("auto", "auto"), (CONTROL, "reference")]
    wanted = [(*each, layout) for each, layout in itertools.product(who, LAYOUTS)]
    if kind.train:  # Whatever it takes: what keeps least.
        wanted.append(("cpu", "cpu", "channels_last"))
    built = random.Random(order).sample(wanted, len(wanted))
    works = {
        f"{name}, {layout}": _work(kind, backend, LAYOUTS[layout])
        for name, backend, layout in built
    }
    for work in works.values():
        work()  # What is measured once for all, or compiled, or kept, is no part of a time.
    # A step finds the memory that the last one has left, which was one of its own where it trains:
    # so each call follows another of the same network, unless calls are long.
    watch = Stopwatch(CPU)
    long = 2 * FEWEST * sum(watch.time(work) for work in works.values()) > seconds
    found = interleaved(
        works, rounds, watch=watch, warm_up=1, cold=long, seconds=seconds, fewest=FEWEST
    )
    return {(key := f"{name}, {layout}"): found[key] for name, _, layout in wanted}


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


def _row(kind: Kind, name: str, processes: Sequence[Times]) -> Row:
    """One row of the times of all processes."""
    who, _, layout = name.partition(", ")
    pooled = {key: [t for times in processes for t in times[key]] for key in processes[0]}
    better = min(PLAIN, key=lambda plain: statistics.median(pooled[plain]))
    same = f"plain, {layout}"
    # A second plain network is compared with the first.
    against = same if who == CONTROL else better
    ratios = [ratio_interval(times[against], times[name]) for times in processes]
    of_same = [ratio_interval(times[same], times[name]).ratio for times in processes]
    of_all = median_interval([each.ratio for each in ratios]) if len(ratios) > 1 else ratios[0]
    return {
        "what": str(kind),
        "who": name,
        "better": better,
        **spread(pooled[name], "ms"),
        **of_all.fields(),
        "ratio_to_same_layout": statistics.median(of_same),
        "ratios": [each.ratio for each in ratios],
    }


def least(rows: Sequence[Row], ratio: str = "ratio_to_eager") -> Row | None:
    """The row of ``auto`` that is furthest behind plain PyTorch, or least ahead of it.

    Args:
        rows: of :func:`measure`.
        ratio: ``ratio_to_eager``, of the better layout, or ``ratio_to_same_layout``.
    """
    ours = [row for row in rows if row["who"].startswith("auto")]
    return min(ours, key=lambda row: row[ratio], default=None)


def table(rows: Sequence[Row], processes: int) -> Iterator[str]:
    """Lines of Markdown."""
    yield "# Networks that are not frozen, against plain PyTorch"
    yield ""
    yield "Ratios are the time of the better of plain PyTorch's layouts over that of the row;"
    yield "beside them those to plain PyTorch with weights and images in the row's own layout. The"
    yield "ratio of a second plain network is that to the first in the same layout. All ratios are"
    if processes == 1:
        yield "medians of rounds run in turn, with intervals of at least 95 %."
    else:
        yield f"medians of {processes} processes, with intervals of at least 95 % over these, each"
        yield "the median of rounds run in turn by networks that were built in that process."
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
    control = [row["ratio_to_eager"] for row in rows if row["who"].startswith(CONTROL)]
    if control:
        yield ""
        yield f"A second plain network to the first: {min(control):.2f} to {max(control):.2f}."
