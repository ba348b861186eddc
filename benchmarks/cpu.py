"""One network on a CPU by everyone who can run it, in turn: ``python -m benchmarks.cpu``.

Who takes part, with which settings, says :mod:`benchmarks.peers`. All are built first, and then
run one after the other in every round, so that what slows the machine down meets all alike;
what counts are the ratios to eager, of the times of one round. ``--out results`` writes
``results.json``, with versions, processor and commit, and ``results.md``.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vovnet_fast import _provenance as provenance
from vovnet_fast import backends, use_backend
from vovnet_fast.tools.bench.stopwatch import (
    Interval,
    Stopwatch,
    interleaved,
    ratio_interval,
    spread,
)

from .peers import EAGER, PEERS, Case, Missing, Peer

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Row = dict[str, Any]


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Exporters and compilers have much to say.
        for dtype in options.dtypes:
            size = (1, options.size, options.size)
            case = Case(options.spec, size, DTYPES[dtype], CPU)
            rows += _measure(case, options.peers, options.rounds)
    about = {**provenance.collect(CPU), "threads": options.threads, "rounds": options.rounds}
    text = "\n".join(_table(options.spec, options.size, rows, about))
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"provenance": about, "rows": rows}, indent=1)
        options.out.with_suffix(".json").write_text(content + "\n")
        options.out.with_suffix(".md").write_text(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", default="V-39-eSE", help="architecture (%(default)s)")
    parser.add_argument("--size", type=int, default=320, help="of the square image (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=30, help="(%(default)s)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="(fp32 bf16)"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER",
        help=f"all by default: {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="files to write, without their endings")
    return parser


def _measure(case: Case, names: Sequence[str], rounds: int) -> list[Row]:
    """A row for each peer, eager first; those that are missing have the reason in theirs."""
    chosen = dict.fromkeys([next(n for n, peer in PEERS.items() if peer is EAGER), *names])
    works: dict[str, Callable[[], Sequence[Tensor]]] = {}
    missing: list[Row] = []
    with Progress(console=Console(stderr=True)) as bar:
        building = bar.add_task(f"building, {case}", total=len(chosen))
        for name in chosen:
            peer = PEERS[name]
            try:
                works[name] = _work(peer, case)
            except Missing as reason:
                missing.append({**_about(name, peer, case), "missing": str(reason)})
            bar.advance(building)
        features = {name: work()[-1].float() for name, work in works.items()}
        running = bar.add_task(f"running, {case}", total=len(works) * (rounds + 2))
        times = interleaved(
            works, rounds, watch=Stopwatch(CPU), each=lambda _: bar.advance(running)
        )
    eager, *_ = works
    rows = []
    for name, seconds in times.items():
        distance = (features[name] - features[eager]).norm() / features[eager].norm()
        rows.append(
            {
                **_about(name, PEERS[name], case),
                **spread(seconds, "ms"),
                **ratio_interval(times[eager], seconds).fields(),
                "distance": distance.item() if PEERS[name].same else None,
            }
        )
    return rows + missing


def _work(peer: Peer, case: Case) -> Callable[[], Sequence[Tensor]]:
    """The peer's call on its images, which is known to run."""
    reason = backends.why_not(peer.backend, CPU)
    if reason is not None:
        raise Missing(f"backend {peer.backend}: {reason}")
    images = peer.images(case.images())
    with use_backend(peer.backend):
        model = peer.ready(case)

    def work() -> Sequence[Tensor]:
        with use_backend(peer.backend):
            return model(images)

    work()
    return work


def _about(name: str, peer: Peer, case: Case) -> Row:
    dtype = next(short for short, dtype in DTYPES.items() if dtype == case.dtype)
    return {"peer": name, "settings": peer.settings, "dtype": dtype}


def _table(spec: str, size: int, rows: Sequence[Row], about: dict[str, Any]) -> Iterator[str]:
    yield f"# {spec} on one {size}x{size} image"
    yield ""
    yield "Ratios are eager's time over that of the row, medians of rounds run in turn, with"
    yield "intervals of at least 95 %. Distances are those of the last feature from eager's."
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        yield f"\n## {dtype}\n"
        yield "| who | settings | ratio to eager | median ms | least ms | distance |"
        yield "|---|---|---|---|---|---|"
        found = [row for row in rows if row["dtype"] == dtype]
        for row in sorted(found, key=lambda row: -row.get("ratio_to_eager", 0)):
            if "missing" in row:
                yield f"| {row['peer']} | {row['missing']} | | | | |"
                continue
            distance = "" if row["distance"] is None else f"{row['distance']:.1e}"
            yield (
                f"| {row['peer']} | {row['settings']} | {Interval.of(row).text()} | "
                f"{row['ms']:.1f} | {row['ms_min']:.1f} | {distance} |"
            )
    yield "\n## Where and with what\n"
    for name, value in about.items():
        yield f"* {name}: {value if not isinstance(value, list) else ' '.join(map(str, value))}"


if __name__ == "__main__":
    main()
