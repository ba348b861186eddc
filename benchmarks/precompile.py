"""Compile on all cores what the benchmarks and the tuning will launch.

``python -m benchmarks.precompile --spec V-99-eSE``: Triton compiles one kernel at a time, in
the process that launches it. Here several processes fill its cache beforehand. Launches
are planned on meta tensors as for compute capability 9.0 (:mod:`vovnet_fast.kernels`), so on
other GPUs there is nothing to gain.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from . import sanitize
from .networks import SHAPES, SPECS, TRAINING_SHAPES, Shape, launches

if TYPE_CHECKING:
    from vovnet_fast.kernels._common import Launch

PLANNED_FOR = (9, 0)


def different(networks: Iterable[tuple[str, Shape]], *, training: bool = False) -> Iterator[Launch]:
    """What these networks launch, each different kernel once, and without ``training`` what
    :mod:`benchmarks.sanitize` does.
    """
    from vovnet_fast.kernels._variants import variant

    seen = set()
    everything = [launches(*network, training=training) for network in networks]
    if not training:
        everything.append(iter(sanitize.launches()))
    for launch in itertools.chain(*everything):
        key = variant(launch).key
        if key not in seen:
            seen.add(key)
            yield launch


def compile_share(
    networks: list[tuple[str, Shape]], training: bool, share: int, of: int
) -> tuple[int, int]:
    """Compile every ``of``-th different kernel, without running it.

    Returns:
        how many were compiled, and how many the compiler refused.
    """
    done = refused = 0
    for launch in itertools.islice(different(networks, training=training), share, None, of):
        options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
        try:
            launch.kernel.warmup(**launch.args, **launch.constants, **options, grid=launch.grid)
            done += 1
        except Exception as error:  # The benchmarks will say it again, with the layer.
            print(f"{launch.kernel.fn.__name__} {launch.constants}: {error}", file=sys.stderr)
            refused += 1
    return done, refused


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m benchmarks.precompile``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precompile")
    parser.add_argument("--spec", nargs="+", default=list(SPECS), choices=SPECS)
    parser.add_argument("--training", action="store_true", help="what training steps launch")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--list", action="store_true", help="count launches, compile nothing")
    options = parser.parse_args(arguments)
    shapes = TRAINING_SHAPES if options.training else SHAPES
    networks = [(spec, shape) for spec in options.spec for shape in shapes]
    if options.list:
        count = sum(1 for _ in different(networks[:1], training=options.training))
        print(f"{count} different kernels, {options.spec[0]} at its first shape among them")
        return 0
    if torch.cuda.get_device_capability() != PLANNED_FOR:
        print("this GPU is not of compute capability 9.0: kernels are compiled as they are met")
        return 0
    begin, count = time.perf_counter(), options.workers
    # A forked process could not use the GPU.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        shares = [
            pool.submit(compile_share, networks, options.training, share, count)
            for share in range(count)
        ]
        results = [share.result() for share in shares]
    done, refused = map(sum, zip(*results, strict=True))
    print(f"{done} kernels compiled, {refused} refused, {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
