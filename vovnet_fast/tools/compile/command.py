"""``vovnet-fast compile``: compile beforehand what networks will launch."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ... import arithmetic, backends, tuning
from ..bench.command import parse_shape
from ..plan import DTYPES

if TYPE_CHECKING:
    from ...first_use.rehearsal import Setting
    from .needed import Run

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of ``vovnet-fast``."""
    command = commands.add_parser(
        "compile",
        help="compile the Triton kernels that networks will launch, on all cores",
        description=(
            "Compile every Triton kernel that these networks need on images of these sizes: "
            "of inference, with --train of a training step, of the engines that tuning will "
            f"measure (unless {tuning.ENVIRONMENT}=0), and of the self-check of the functions "
            "that are used. They go into Triton's cache, where the networks find them. No GPU "
            "is needed."
        ),
        epilog=(
            "example, for the image of a cluster: TRITON_CACHE_DIR=/opt/kernels vovnet-fast "
            "compile V-99-eSE 6x640x1600 --train --arch sm_90, with the same TRITON_CACHE_DIR, "
            "Triton and vovnet_fast where it runs. --pack makes one file of the kernels, for "
            "vovnet_fast.compiling.cache.unpack."
        ),
    )
    command.add_argument(
        "networks",
        nargs="+",
        metavar="SPEC NxHxW",
        help="an architecture (see: vovnet-fast specs) and sizes of images; several of each "
        "may follow",
    )
    command.add_argument(
        "--train", action="store_true", help="also a training step, weights in fp32 (autocast)"
    )
    command.add_argument(
        "--batch-norm",
        action="store_true",
        help="also a training step in which batch norms take the batch's statistics "
        "(norm_eval=False)",
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        choices=(*DTYPES, *arithmetic.DTYPES),
        default=["bf16"],
        help="of activations (bf16); int8 and fp8 are for what vovnet-fast quantize writes",
    )
    command.add_argument(
        "--levels",
        type=int,
        choices=arithmetic.LEVELS,
        help="the largest activation of int8 (127)",
    )
    command.add_argument(
        "--arch", choices=ARCHITECTURES, help="of the GPU; by default of the one that is here"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="Triton's cache, by default TRITON_CACHE_DIR or ~/.triton/cache",
    )
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes; by default as many as cores"
    )
    command.add_argument(
        "--pack", type=Path, metavar="FILE.tar.xz", help="write the kernels into one file, too"
    )
    command.add_argument(
        "--list", action="store_true", help="print a line for each kernel, and compile nothing"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compile, or list; the exit status is 1 if a kernel could not be compiled.

    Raises:
        BackendError: Triton is missing or interprets, or the processes could not be started.
        ValueError, UnknownSpecError, OSError: an argument does not fit; the message says which.
    """
    _check_triton()
    import triton

    from ...compiling import cache
    from ...compiling.filling import fill
    from ...compiling.workers import WorkersError, count
    from ...kernels._triton import cache_folder
    from . import needed

    settings, runs = _settings(args.arch), list(_runs(args))
    by_run = needed.by_run(runs, settings)
    jobs = list({job.key: job for found in by_run.values() for job in found}.values())
    if args.list:
        for job in jobs:
            print(job)
        print(f"{len(jobs)} kernels")
        return 0
    with triton.knobs.cache.scope():
        if args.out is not None:
            triton.knobs.cache.dir = str(args.out.absolute())
        try:
            outcome = fill(jobs, args.workers or count() or 1, progress=True)
        except WorkersError as error:
            raise backends.BackendError(str(error)) from error
        print(f"{outcome}: {cache_folder()}")
        for network, found in by_run.items():
            needed.note(network, found, settings[0])
        if args.pack is not None:
            made = {job.key for job in jobs} & set(cache.kernels(cache_folder()))
            print(f"{args.pack}: {cache.pack(cache_folder(), args.pack, made)}")
    return 1 if outcome.failed else 0


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise backends.BackendError("Triton, which compiles, is not installed: pip install triton")
    from ...kernels._triton import AHEAD, interpreted

    if not AHEAD:
        raise backends.BackendError(
            "nothing is compiled ahead with a Triton older than 3.6, which kernels themselves "
            "run with: install torch 2.10 or newer, which brings it"
        )
    if not hasattr(os, "fork"):
        raise backends.BackendError(
            "kernels are compiled ahead by processes that are forked, which this system does not "
            "do: they are compiled when they are met"
        )
    if interpreted():
        raise backends.BackendError(
            "nothing is compiled while Triton interprets: unset TRITON_INTERPRET"
        )


def _settings(arch: str | None) -> list[Setting]:
    """The GPU that is here, or the cards of ``arch``."""
    from ...compiling.jobs import arch_of
    from ...first_use.rehearsal import Setting
    from . import needed

    if torch.cuda.is_available() and torch.version.hip is None:
        here = Setting.here(torch.device("cuda", torch.cuda.current_device()))
        if arch in (None, arch_of(here.target.capability)):
            return [here]
    if arch is None:
        raise ValueError(
            "torch sees no NVIDIA GPU here: name the one that the kernels are for with --arch, "
            f"one of {', '.join(ARCHITECTURES)}"
        )
    return needed.settings(arch, tuning.Planning(measured=tuning.enabled()))


def _runs(args: argparse.Namespace) -> Iterator[Run]:
    from .needed import Run

    modes = ["inference"]
    modes += ["training"] if args.train else []
    modes += ["training-batch"] if args.batch_norm else []
    spec, shapes = "", 0
    for word in [*args.networks, ""]:
        if word[:1].isdecimal() and spec:
            shapes += 1
            for dtype in args.dtype:
                levels = args.levels if dtype == "int8" else None
                for mode in modes:
                    yield Run(spec, parse_shape(word), dtype, mode, levels)
        elif spec and not shapes:
            raise ValueError(f"{spec} has no size of images: NxHxW must follow, like 6x640x1600")
        else:
            spec, shapes = word, 0
