"""Networks in int8 on a CPU, ours and those of others: ``python -m benchmarks.eight_bits``.

All are calibrated on the same images and run in turn, round after round, each after a call of its
own that does not count: threads of the one before may still spin. Ratios are of the times of one
round. Accuracy is the least signal-to-noise ratio of a feature against PyTorch in fp64, in
dB, on images that nobody was calibrated on. ``--out results`` writes ``results.json``, with
versions, processor and commit, and ``results.md``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from vovnet_fast import use_backend
from vovnet_fast.tools.bench.stopwatch import (
    Interval,
    Stopwatch,
    interleaved,
    ratio_interval,
    spread,
)

from .int8_peers import PEERS, Int8Peer
from .networks import build
from .peer import Missing
from .writing import begin, write

CPU = torch.device("cpu")
CALIBRATION = 8
"""Images."""

Row = dict[str, Any]


def main() -> None:
    options = _parser().parse_args()
    about = begin(options)
    ending = ["", "## Where and with what", "", *(f"* {k}: {v}" for k, v in about.items())]
    rows: list[Row] = []
    text: list[str] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for spec, size in itertools.product(options.spec, options.sizes):
            found = measure(spec, size, options.rounds, options.peers)
            rows += found
            text += _table(spec, size, found)
            write(options.out, about, rows, "\n".join([*text, *ending]))
    Console().print("\n".join([*text, *ending]), markup=False, highlight=False, soft_wrap=True)


def smooth(count: int, size: int, seed: int) -> Tensor:
    """Images ``[N, 3, H, W]``: of white noise convolutions make next to nothing but noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, size + 8, size + 8, generator=generator)
    return nn.functional.avg_pool2d(x, 9, 1) * 9


def measure(spec: str, size: int, rounds: int, names: Sequence[str]) -> list[Row]:
    """A row for each peer; those that are missing have the reason in theirs."""
    network = build(spec, torch.float32, CPU)
    images = smooth(CALIBRATION, size, 1).split(2)
    unseen = smooth(1, size, 2)
    with use_backend("reference"):
        wanted = copy.deepcopy(network).double()(unseen.double())
    works: dict[str, Callable[[], Sequence[Tensor]]] = {}
    rows: list[Row] = []
    with Progress(console=Console(stderr=True)) as bar:
        chosen = [peer for peer in PEERS if peer.name in names]
        building = bar.add_task(f"building, {spec}, {size}", total=len(chosen))
        for peer in chosen:
            row = dict(spec=spec, size=size, **_about(peer))
            try:
                model = peer.build(network, images)
                found = [feature.clone() for feature in model(unseen)]
            except Missing as reason:
                rows.append({**row, "missing": str(reason)})
            else:
                works[_key(peer)] = lambda model=model: model(unseen)
                least = min(map(_sqnr, found, wanted))
                rows.append({**row, "least_sqnr_db": least})
            bar.advance(building)
        running = bar.add_task(f"running, {spec}, {size}", total=len(works) * (rounds + 2))
        times = interleaved(
            works, rounds, watch=Stopwatch(CPU), cold=False, each=lambda _: bar.advance(running)
        )
    ours = times[_key(PEERS[0])] if _key(PEERS[0]) in times else next(iter(times.values()))
    for row in rows:
        seconds = times.get(f"{row['peer']}, {row['precision']}")
        if seconds is not None:
            ratio = ratio_interval(seconds, ours).fields()
            ratio["ratio_to_ours"] = ratio.pop("ratio_to_eager")
            row.update(**spread(seconds, "ms"), **ratio)
    return rows


def _sqnr(found: Tensor, wanted: Tensor) -> float:
    noise = (found.double() - wanted).square().sum()
    return float(10 * (wanted.square().sum() / noise).log10())


def _key(peer: Int8Peer) -> str:
    return f"{peer.name}, {peer.precision}"


def _about(peer: Int8Peer) -> Row:
    return {"peer": peer.name, "precision": peer.precision, "settings": peer.settings}


def _table(spec: str, size: int, rows: Sequence[Row]) -> Iterator[str]:
    yield f"# {spec} on one {size}x{size} image"
    yield ""
    yield "Ratios are the time of the row over that of ours in int8, medians of rounds run in"
    yield "turn, with intervals of at least 95 %. SQNR: the least of a feature, against fp64."
    yield ""
    yield "| who | precision | settings | its time over ours in int8 | median ms | SQNR, dB |"
    yield "|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: row.get("ms", float("inf"))):
        about = f"| {row['peer']} | {row['precision']} | "
        if "missing" in row:
            yield f"{about}{row['missing']} | | | |"
            continue
        ratio = Interval.of({**row, "ratio_to_eager": row["ratio_to_ours"]}).text()
        yield (
            f"{about}{row['settings']} | {ratio} | {row['ms']:.1f} | {row['least_sqnr_db']:.1f} |"
        )
    yield ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(dict.fromkeys(peer.name for peer in PEERS))
    parser.add_argument("--spec", nargs="+", default=["V-39-eSE"], help="(%(default)s)")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[320], help="of square images (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=30, help="(%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=names, default=names, help="all by default: %(choices)s"
    )
    parser.add_argument("--out", type=Path, help="files to write, without their endings")
    return parser


if __name__ == "__main__":
    main()
