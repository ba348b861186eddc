"""Compile on all cores, with or without a GPU, what ``benchmarks/gpu.py`` will launch.

``python benchmarks/precompile.py --arch sm_90 --out kernels.tar.xz``, by the same Triton and
Python as there: one file of kernels, which a machine with that GPU unpacks instead of compiling
(:mod:`vovnet_fast.compiling.cache`). Without ``--out`` they stay in Triton's own cache.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # As a script, it finds what is here.

from benchmarks import sanitize
from benchmarks.networks import HEADLINE, Shape, launches
from vovnet_fast import arithmetic

if TYPE_CHECKING:
    from vovnet_fast.kernels._common import Launch
    from vovnet_fast.tools.compile.needed import Run


def runs() -> list[Run]:
    """Networks of the headline: inference in both half precisions and in eight bits, and training
    steps."""
    from vovnet_fast.tools.compile.needed import Run

    modes = [("bf16", "inference"), ("bf16", "training"), ("fp16", "inference")]
    modes += [(form, "inference") for form in arithmetic.DTYPES]
    return [Run(*network, *mode) for mode in modes for network in HEADLINE]


def different(networks: Iterable[tuple[str, Shape]], *, training: bool = False) -> Iterator[Launch]:
    """What these networks launch, each different kernel once, and without ``training`` what
    :mod:`benchmarks.sanitize` does.
    """
    from vovnet_fast.kernels._variants import variant

    seen = set()
    everything = [launches(*network, training=training) for network in networks]
    if not training:
        everything.append(sanitize.launches())
    for launch in itertools.chain(*everything):
        key = variant(launch).key
        if key not in seen:
            seen.add(key)
            yield launch


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python benchmarks/precompile.py``; 1 if a kernel could not be compiled."""
    from vovnet_fast import tuning
    from vovnet_fast.compiling import cache
    from vovnet_fast.compiling.filling import fill
    from vovnet_fast.compiling.jobs import compiled
    from vovnet_fast.compiling.jobs import different as kernels
    from vovnet_fast.compiling.workers import count
    from vovnet_fast.kernels._triton import cache_folder
    from vovnet_fast.tools.compile import needed

    parser = argparse.ArgumentParser(prog="python benchmarks/precompile.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", choices=needed.ARCHITECTURES, default="sm_90")
    parser.add_argument("--out", type=Path, metavar="FILE.tar.xz", help="file of the kernels")
    parser.add_argument("--workers", type=int, default=count() or 1, help="processes")
    parser.add_argument("--list", action="store_true", help="count, and compile nothing")
    options = parser.parse_args(arguments)
    settings = needed.settings(options.arch, tuning.Planning())
    by_run = needed.by_run(runs(), settings)
    watched = kernels(sanitize.launches(few=True), options.arch)
    jobs = {job.key: job for found in (*by_run.values(), watched) for job in found}
    if options.list:
        for run, found in by_run.items():
            print(f"{len(found)} for {run}")
        print(f"{len(watched)} for benchmarks.sanitize --few")
        print(f"{len(jobs)} kernels")
        return 0
    outcome = fill(list(jobs.values()), options.workers, progress=True)
    print(outcome)
    for run, found in by_run.items():
        needed.note(run, found, settings[0])
    if options.out is not None:
        print(cache.pack(cache_folder(), options.out, compiled(jobs.values())))
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
