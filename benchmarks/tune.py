"""Measure which engines are the fastest for the layers of networks, and export what was found.

``python -m benchmarks.tune --out tuning.json``: an inference pass and a training step of each of
the headline's networks (:data:`benchmarks.networks.HEADLINE`) on the Triton backend, whose
layers are measured as they are met (:mod:`vovnet_fast.tuning`). The file is written after each
network, so that whoever stops it keeps what there is. ``VOVNET_FAST_TUNE`` and
``VOVNET_FAST_CACHE`` say what is measured, and what is known already. On a CPU nothing can be
measured; the networks are small, and run on plain PyTorch.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch

from vovnet_fast import tuning, use_backend
from vovnet_fast.tools.bench.training import Shape, TrainingStep, image

from .networks import HEADLINE, build, build_training, text

SMALL: tuple[tuple[str, Shape], ...] = (("V-19-slim-dw-eSE", (1, 32, 32)),)


def export(path: Path) -> int:
    """Write what was chosen, and what it was chosen by, to a file; returns how many choices."""
    found = tuning.table().choices()
    tuning.export(found, path)
    return sum(map(len, found.values()))


def infer(spec: str, shape: Shape, device: torch.device) -> None:
    """An inference pass in the dtype of the benchmarks."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.no_grad():
        build(spec, dtype, device)(image(shape, dtype, device))


def train(spec: str, shape: Shape, device: torch.device) -> None:
    """A training step as the benchmarks do it."""
    TrainingStep(build_training(spec, device), shape, device)()


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m benchmarks.tune``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description="Measure engines for the headline's layers."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what is written")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    count = export(options.out)
    with use_backend("triton" if on_gpu else "reference"):
        for work in (infer, train):
            for spec, shape in HEADLINE if on_gpu else SMALL:
                begin = time.perf_counter()
                work(spec, shape, device)
                before, count = count, export(options.out)
                seconds = time.perf_counter() - begin
                print(
                    f"{work.__name__} {spec} {text(shape)}: {count - before} layers measured, "
                    f"{seconds:.1f} s",
                    flush=True,
                )
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
    print(f"{count} choices" if on_gpu else "nothing is measured on a CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
