"""One network on a CPU by everyone who can run it, in turn: ``python -m benchmarks.cpu``.

Who takes part, with which settings, says :mod:`benchmarks.peers`. All are built first, and then
run one after the other in every round, so that what slows the machine down meets all alike;
what counts are the ratios to eager, of the times of one round. ``--not-frozen`` and ``--train``
measure instead what users have who freeze nothing (:mod:`benchmarks.unfrozen`). ``--out results``
writes ``results.json``, with versions, processor and commit, and ``results.md``, after every kind
of network.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vovnet_fast import backends, use_backend
from vovnet_fast.tools.bench.stopwatch import (
    Interval,
    Stopwatch,
    interleaved,
    ratio_interval,
    spread,
)

from . import unfrozen
from .peers import EAGER, PEERS, Case, Missing, Peer
from .writing import begin, write

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Row = dict[str, Any]


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    for name in ("processes", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    sizes = options.sizes or ([64, 224] if options.not_frozen or options.train else [320])
    about = begin(options)
    if options.not_frozen or options.train:
        about["processes"] = options.processes
    rows: list[Row] = []
    text = ""
    if options.not_frozen or options.train:
        for found in _not_frozen(options, sizes):
            rows += found
            text = "\n".join([*unfrozen.table(rows, options.processes), "", *_about_run(about)])
            write(options.out, about, rows, text)
    else:
        texts: list[str] = []
        for spec, size in itertools.product(options.spec, sizes):
            found = _frozen(options, spec, size)
            rows += found
            texts += _table(spec, size, found)
            text = "\n".join([*texts, "", *_about_run(about)])
            write(options.out, about, rows, text)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _frozen(options: argparse.Namespace, spec: str, size: int) -> list[Row]:
    """Rows of one architecture by every peer."""
    rows: list[Row] = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Exporters and compilers have much to say.
        for dtype in options.dtypes:
            case = Case(spec, (1, size, size), DTYPES[dtype], CPU)
            rows += [
                {**row, "spec": spec, "size": size}
                for row in _measure(case, options.peers, options.rounds)
            ]
    return rows


def _not_frozen(options: argparse.Namespace, sizes: Sequence[int]) -> Iterator[list[Row]]:
    """Rows of networks that are not frozen, kind by kind."""
    dtypes = [DTYPES[name] for name in options.dtypes]
    modes = [train for train in (False, True) if (options.train if train else options.not_frozen)]
    found = [
        kind for train in modes for kind in unfrozen.kinds(options.spec, sizes, dtypes, train=train)
    ]
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(found))
        for kind in found:
            bar.update(task, description=str(kind))
            yield unfrozen.measure(
                kind, options.rounds, options.seconds, options.threads, options.processes
            )
            bar.advance(task)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--spec", nargs="+", default=["V-39-eSE"], help="architectures (%(default)s)"
    )
    parser.add_argument(
        "--sizes", "--size", nargs="+", type=int, metavar="SIZE",
        help="of the square images (320; 64 and 224 of what is not frozen)",
    )  # fmt: skip
    parser.add_argument(
        "--not-frozen", action="store_true",
        help="inference of networks that are not frozen, against plain PyTorch in both layouts",
    )  # fmt: skip
    parser.add_argument(
        "--train", action="store_true", help="training steps of two images, likewise"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0,
        help="for each of these in a process, after which no further round begins (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=1,
        help="in which each of these is measured anew, one after the other: what two networks of "
        "a process differ by, running the same, is seen by several alone, six for an interval of "
        "95 %% (%(default)s)",
    )  # fmt: skip
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
        # After a call of another runtime, with threads of its own, the system takes milliseconds
        # to find a core for each of those that were asleep: eager's took six times as long on two
        # cores of a Zen 4.
        times = interleaved(
            works, rounds, watch=Stopwatch(CPU), cold=False, each=lambda _: bar.advance(running)
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


def _table(spec: str, size: int, rows: Sequence[Row]) -> Iterator[str]:
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


def _about_run(about: dict[str, Any]) -> Iterator[str]:
    yield "## Where and with what\n"
    for name, value in about.items():
        yield f"* {name}: {value if not isinstance(value, list) else ' '.join(map(str, value))}"


if __name__ == "__main__":
    main()
