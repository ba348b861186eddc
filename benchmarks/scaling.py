"""How time, memory and tuning grow: every number of docs/performance.md.

``python -m benchmarks.scaling`` counts them, and says where docs/performance.json differs.
``--update`` writes that file, the tables of docs/performance.md and its plots anew. Nothing
is measured but the seconds of compilations, with ``--compile-seconds``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn

from vovnet_fast import VoVNet, tuning
from vovnet_fast.ops.features import run as run_features
from vovnet_fast.tools.memory import training_memory
from vovnet_fast.tools.plan import Rates, conv_weight, launch_work, plan_forward

from . import communication as comm
from .counts import moved, title, training_step
from .networks import Shape
from .precompile import different
from .scaling_tables import Rows, filled

if TYPE_CHECKING:
    from vovnet_fast.kernels._common import Launch

DOCS = Path(__file__).parent.parent / "docs"
UPDATE = "python -m benchmarks.scaling --update"

RATES = Rates()
PROCESSORS = 132  # Of an H100 or H200.
GRAPH_LAUNCH = 1.5e-6
"""Seconds between two kernels of a CUDA graph; assumed."""

DETECTOR: Shape = (1, 800, 1344)
SIZES = ((224, 224), (480, 800), (640, 1088), (800, 1344), (1200, 2016))
BATCHES = (1, 2, 4, 8, 16, 32)
DEPTHS = ("V-19-slim-dw-eSE", "V-19-eSE", "V-39-eSE", "V-57-eSE", "V-99-eSE")
TRAININGS: tuple[tuple[str, Shape], ...] = (
    ("V-39-eSE", (2, 800, 1344)),
    ("V-99-eSE", (2, 800, 1344)),
    ("V-99-eSE", (6, 320, 800)),
    ("V-99-eSE", (6, 640, 1600)),
)
SHORT_SIDES = range(480, 801, 32)
"""mmdet's multi-scale training of detectors: the long side is at most 1333."""


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def _gb(count: float) -> float:
    return round(count / 1e9, 4)


# --------------------------------------------------------------------------------------
# Time and memory of one GPU
# --------------------------------------------------------------------------------------


@functools.cache
def _forward(spec: str, shape: Shape) -> tuple[Launch, ...]:
    """The launches of a forward pass in bf16, with the static choices."""
    from vovnet_fast.backends import triton
    from vovnet_fast.kernels._common import recording

    with torch.device("meta"), torch.no_grad():
        model = VoVNet(spec).to(torch.bfloat16).eval()
        params = model.fold(torch.bfloat16).packed(torch.bfloat16)
        image = torch.empty(*shape, 3, dtype=torch.bfloat16)
        with recording() as found:
            run_features(triton, image, params, model.out_features)
    return tuple(found)


def _programs(launch: Launch) -> int:
    return functools.reduce(lambda a, b: a * b, launch.grid, 1)


def _inference_row(spec: str, shape: Shape) -> dict[str, Any]:
    plan = plan_forward(spec, shape)
    fused, eager = plan.fused.total, plan.eager.total
    by_kind = {row.kind: row.floor_seconds for row in plan.fused.rows}
    idle = sum(_programs(launch) < PROCESSORS for launch in _forward(spec, shape))
    return {
        "network": title(spec, shape),
        "images": shape[0],
        "megapixels": round(shape[1] * shape[2] / 1e6, 4),
        "GFLOP": round(fused.flop / 1e9, 1),
        "launches": fused.launches,
        "launches eager": eager.launches,
        "GB": _gb(fused.bytes_moved),
        "GB eager": _gb(eager.bytes_moved),
        "floor ms": _ms(fused.floor_seconds),
        "floor ms an image": _ms(fused.floor_seconds / shape[0]),
        "floor ms eager": _ms(eager.floor_seconds),
        "of it 3x3 ms": _ms(by_kind.get("conv 3x3", 0)),
        "of it 1x1 ms": _ms(by_kind.get("conv 1x1", 0)),
        "launching ms": _ms(fused.launches * GRAPH_LAUNCH),
        "small launches": idle,
    }


def floors() -> Rows:
    """Inference of the networks and sizes that people use."""
    shapes: tuple[Shape, ...] = (
        DETECTOR, (8, 800, 1344), (6, 320, 800), (6, 640, 1600), (8, 224, 224)
    )  # fmt: skip
    return [_inference_row(*each) for each in itertools.product(("V-39-eSE", "V-99-eSE"), shapes)]


def _kept_gb(spec: str, shape: Shape) -> dict[str, float]:
    rows = training_memory(spec, shape).rows
    return {f"kept GB {row.mode}": _gb(row.kept) for row in rows}


def image_sizes() -> Rows:
    """V-39 on one image of growing size."""
    shapes = [(1, *size) for size in SIZES]
    return [_inference_row("V-39-eSE", s) | _kept_gb("V-39-eSE", s) for s in shapes]


def batches() -> Rows:
    """V-39 on growing batches."""
    return [_inference_row("V-39-eSE", (n, *DETECTOR[1:])) for n in BATCHES]


def depths() -> Rows:
    """Architectures on one image of a detector."""
    found = []
    for spec in DEPTHS:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in VoVNet(spec).parameters())
        row = {"spec": spec, "million parameters": round(parameters / 1e6, 2)}
        found.append(row | _inference_row(spec, DETECTOR) | _kept_gb(spec, DETECTOR))
    return found


def trainings() -> Rows:
    """Training steps in bf16 with parameters in fp32, norms with fixed statistics."""
    found = []
    for spec, shape in TRAININGS:
        step = training_step(spec, shape)
        forward, backward = (sum(map(RATES.floor, w)) for w in (step.forward, step.backward))
        row = {
            "network": title(spec, shape),
            "launches": len(step.forward) + len(step.backward),
            "GB": _gb(moved(step.forward) + moved(step.backward)),
            "floor ms forward": _ms(forward),
            "floor ms backward": _ms(backward),
        }
        found.append(row | _kept_gb(spec, shape))
    return found


# --------------------------------------------------------------------------------------
# Convolutions
# --------------------------------------------------------------------------------------


def convolutions() -> Rows:
    """The convolutions of V-39 on a detector's image: tiles, waves, and traffic from L2.

    A program multiplies a tile of pixels by a block of output channels, and for each step
    fetches both operands from L2 into shared memory, whoever else has fetched them.
    """
    found: dict[str, dict[str, Any]] = {}
    for launch in _forward("V-39-eSE", DETECTOR):
        if launch.kernel.fn.__name__.startswith("conv"):
            row = _convolution(launch)
            found.setdefault(row["layer"], row)
    return list(found.values())


def _convolution(launch: Launch) -> dict[str, Any]:
    c, weight = launch.constants, conv_weight(launch.args)
    c_out, c_in = weight.shape[0], weight[0].numel() // c["KERNEL"] ** 2
    pixels = c["TILE_H"] * c["TILE_W"] if "TILE_H" in c else c["BLOCK_P"]
    blocks = [c[f"BLOCK_{i}"] for i in range(3) if c.get(f"BLOCK_{i}")]
    steps = c["KERNEL"] ** 2 * -(-c_in // c["BLOCK_K"])
    if c_in < c["BLOCK_K"]:  # The taps of the first layer are one step.
        steps = -(-(c["KERNEL"] ** 2) * c_in // c["BLOCK_K"])
    step_bytes = (pixels + sum(blocks)) * c["BLOCK_K"] * 2
    # Persistent programs loop over tiles.
    programs = launch.args["tiles"] if c.get("PERSISTENT") else _programs(launch)
    work = launch_work(launch)
    out = launch.args.get("out_ptr", launch.args.get("out_desc_0"))
    n, height, width, _ = getattr(out, "base", out).shape
    covered = programs * pixels * sum(blocks)
    needed = n * height * width * c_out
    floor = RATES.floor(work)
    stride = " stride 2" if c.get("STRIDE") == 2 else ""
    return {
        "layer": f"{c['KERNEL']}x{c['KERNEL']} {c_in}>{c_out}{stride}, {height}x{width}",
        "tile": f"{pixels}x{'+'.join(map(str, blocks))}",
        "programs": programs,
        "waves": round(programs / PROCESSORS, 2),
        "useful": round(needed / covered, 3),
        "GFLOP": round(work.flop / 1e9, 2),
        "floor us": round(floor * 1e6, 1),
        "KB a step": round(step_bytes / 1e3, 1),
        "FLOP a byte": round(2 * pixels * sum(blocks) * c["BLOCK_K"] / step_bytes),
        "L2 GB": _gb(programs * steps * step_bytes),
        "L2 TB/s": round(programs * steps * step_bytes / floor / 1e12, 1),
    }


# --------------------------------------------------------------------------------------
# Tuning
# --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _asking() -> Iterator[dict[str, tuple[int, int]]]:
    """Number of the candidates, and of those that the tuner would measure, by problem."""
    found: dict[str, tuple[int, int]] = {}

    def choose(device, problem, candidates, static, run, timer=None, prepare=None):
        found[problem] = len(candidates), len(tuning.measured(candidates))
        return static

    with mock.patch.object(tuning, "choose", choose):
        yield found


def tunings() -> Rows:
    """What is compiled and measured before everything is chosen, on a GPU like an H200."""
    found = []
    for spec, shape in (("V-39-eSE", (2, 800, 1344)), ("V-99-eSE", (2, 800, 1344))):
        with _asking() as forward:
            _forward.__wrapped__(spec, shape)
        with _asking() as both:
            training_step(spec, shape)
        found.append(
            {
                "network": title(spec, shape),
                "problems forward": len(forward),
                "candidates forward": sum(offered for offered, _ in forward.values()),
                "trials forward": sum(trials for _, trials in forward.values()),
                "problems training": len(both),
                "candidates training": sum(offered for offered, _ in both.values()),
                "trials training": sum(trials for _, trials in both.values()),
                "kernels training": sum(1 for _ in different([(spec, shape)], training=True)),
            }
        )
    return found


def multi_scale() -> Rows:
    """Problems of V-39 in inference over the sizes of a multi-scale training."""
    seen: dict[str, int] = {}
    found = []
    for short in SHORT_SIDES:
        size = (short, min(1333, -(-short * 5 // 3)))
        padded: Shape = (1, *(-(-length // 32) * 32 for length in size))
        with _asking() as asked:
            _forward.__wrapped__("V-39-eSE", padded)
        new = {problem: count for problem, count in asked.items() if problem not in seen}
        seen |= new
        found.append({"size": f"{padded[1]}x{padded[2]}", "new": len(new), "all": len(seen)})
    return found


# --------------------------------------------------------------------------------------
# Several GPUs, on paper
# --------------------------------------------------------------------------------------


def several_gpus() -> Rows:
    """A data-parallel training step with 2 to 64 GPUs, each with the same batch."""
    found = []
    for spec, shape in TRAININGS[::3]:
        step = training_step(spec, shape)
        ends = [0.0, *itertools.accumulate(map(RATES.floor, step.backward))]
        gradients = [comm.Gradient(p.numel() * 4, ends[count]) for p, count in step.ready]
        sent = comm.buckets(gradients)
        step_seconds = sum(map(RATES.floor, step.forward)) + ends[-1]
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in _meta(spec).modules())
        for gpus in (1, 2, 8, 16, 64):
            over = comm.link(gpus)
            exposed = comm.exposed_seconds(sent, ends[-1], gpus, over)
            waiting = comm.sync_batch_norm_seconds(norms, gpus, over)
            total = sum(gradient.size for gradient in gradients)
            alone = comm.all_reduce_seconds(total, gpus, over) if gpus > 1 else 0.0
            found.append(
                {
                    "network": title(spec, shape),
                    "GPUs": gpus,
                    "link": over.name if gpus > 1 else "",
                    "gradients MB": round(total / 1e6, 1),
                    "buckets": len(sent),
                    "floor ms": _ms(step_seconds),
                    "sum ms": _ms(alone),
                    "exposed ms": _ms(exposed),
                    "efficiency": round(step_seconds / (step_seconds + exposed), 3),
                    "SyncBN ms": _ms(waiting),
                }
            )
    return found


def _meta(spec: str) -> VoVNet:
    with torch.device("meta"):
        return VoVNet(spec)


# --------------------------------------------------------------------------------------
# The files
# --------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[], Rows]] = {
    "floors": floors,
    "image sizes": image_sizes,
    "batches": batches,
    "depths": depths,
    "trainings": trainings,
    "convolutions": convolutions,
    "tunings": tunings,
    "multi-scale": multi_scale,
    "several GPUs": several_gpus,
}


def count() -> dict[str, Rows]:
    """All sections."""
    return {name: section() for name, section in SECTIONS.items()}


def compile_seconds(number: int = 40) -> dict[str, Any]:
    """Compile some of the kernels of V-39's training, and take the time on one core."""
    from vovnet_fast import aot

    found = list(different([("V-39-eSE", (2, 800, 1344))], training=True))
    seconds = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
    ):
        for launch in found[:: max(1, len(found) // number)]:
            begin = _processor_seconds()
            aot.compile_launch(launch, "sm_90")
            seconds.append(_processor_seconds() - begin)
    return {
        "kernels": len(seconds),
        "median s": round(statistics.median(seconds), 2),
        "longest s": round(max(seconds), 2),
        "mean s": round(statistics.mean(seconds), 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor_seconds() -> float:
    """Of this process and those it has waited for: what else runs here does not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m benchmarks.scaling``; returns 1 if the files are not up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--update", action="store_true", help="write files, tables and plots anew")
    parser.add_argument("--compile-seconds", action="store_true", help="measure them as well")
    options = parser.parse_args(arguments)
    file, document = DOCS / "performance.json", DOCS / "performance.md"
    written = json.loads(file.read_text()) if file.exists() else {}
    content: dict[str, Any] = dict(count())
    measure = options.compile_seconds or "compile seconds" not in written
    content["compile seconds"] = compile_seconds() if measure else written["compile seconds"]
    if options.update:
        from .plot_scaling import draw

        file.write_text(json.dumps(content, indent=1) + "\n")
        document.write_text(filled(document.read_text(), content))
        draw(content, DOCS)
        print(f"{file}, {document} and the plot beside them written")
        return 0
    stale = [section for section in content if content[section] != written.get(section)]
    if document.read_text() != filled(document.read_text(), content):
        stale.append(f"tables of {document}")
    print(f"differ: {', '.join(stale)}; {UPDATE}" if stale else f"{file} is what is counted")
    return 1 if stale else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # Before Triton is imported: it has to compile.
    sys.exit(main())
