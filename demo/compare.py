"""Train the demo's detector twice, on plain PyTorch and on the fused path, and compare.

Both trainings have the same scenes, first weights and order. Rounding differs, and what
starts equal drifts apart as two trainings do: the losses of the first iterations should
agree in digits, the curves in shape, and the average precisions up to noise.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import run as base
from run import DemoError

if TYPE_CHECKING:
    import numpy as np
    from display import Display
    from training import Result

    from vovnet_fast.specs import VoVNetSpec

REFERENCE = "reference"
FIRST_ITERATIONS = 5
"""Before two trainings have drifted apart."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="demo/compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The folder gets comparison.png, metrics.json, scenes/ (the dataset), and a folder "
        "for each \nbackend with its checkpoint, detections and logs.",
    )
    base.add_training_arguments(parser, Path("work_dirs/compare"))
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda",
        help="where to train (default: %(default)s)",
    )
    parser.add_argument(
        "--backend", default="triton", help="of the fused path (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Compare; returns the process's exit status."""
    args = parse_arguments(argv)
    return base.report_errors("demo/compare.py", lambda: compare(args))


def compare(args: argparse.Namespace) -> None:
    """Do everything, in order.

    Raises:
        DemoError: see :func:`check`.
    """
    spec = check(args)
    # Imported late: --help and wrong arguments should not wait for mmdet.
    import drawing
    from display import Display
    from rich.console import Console

    display = Display(Console(file=sys.stdout))
    out, backends = args.out.resolve(), (REFERENCE, args.backend)
    base.prepare_folder(out, ("scenes", *backends, "comparison.png", "metrics.json"))
    base.write_scenes(out / "scenes", args, display)
    results, reports = {}, {}
    for backend in backends:
        display.say(f"RetinaNet with {spec.name} on {args.device}, {backend} backend")
        results[backend], peak = train(backend, args, spec, out, display)
        reports[backend] = report_of(results[backend], peak)
    drawing.draw_comparison(
        {backend: result.losses["loss"] for backend, result in results.items()},
        {backend: result.metrics for backend, result in results.items()},
        out / "comparison.png",
        f"RetinaNet, {spec.name}, {args.iterations} iterations, seed {args.seed}",
    )
    apart = distances(*(result.losses["loss"] for result in results.values()))
    base.write_json(
        out / "metrics.json",
        {
            "backends": reports,
            **apart,
            "spec": spec.name,
            "device": device_name(args.device),
            "amp": args.amp,
            "seed": args.seed,
            "iterations": args.iterations,
            "train_scenes": args.train_scenes,
            "val_scenes": args.val_scenes,
            "versions": base.versions(),
        },
    )
    maps = ", ".join(f"{name} {r['bbox_mAP']:.3f}" for name, r in reports.items())
    display.say(f"mAP {maps}; the first losses differ by {apart['first_loss_distances'][0]:.1e}")
    display.say(f"  {out / 'comparison.png'}\n  {out / 'metrics.json'}")


def check(args: argparse.Namespace) -> VoVNetSpec:
    """Refuse what cannot work before anything is written.

    Returns:
        The architecture that ``args.spec`` names.

    Raises:
        DemoError: as :func:`run.check`, or the fused backend cannot train on the device.
    """
    spec = base.check(args)
    import torch

    from vovnet_fast import backends

    if args.backend == REFERENCE:
        raise DemoError(f"--backend {REFERENCE} is what the other one is compared with")
    try:
        reason = backends.why_not(args.backend, torch.device(args.device))
    except ValueError as error:
        raise DemoError(f"--backend: {error}") from None
    if reason is None and (args.backend, args.device) == ("triton", "cpu"):
        reason = "in Triton's interpreter a training would take weeks"
    if reason is not None:
        raise DemoError(
            f"--backend {args.backend} cannot train on --device {args.device}: {reason}. "
            "python demo/run.py trains on plain PyTorch, on any device"
        )
    return spec


def train(
    backend: str, args: argparse.Namespace, spec: VoVNetSpec, out: Path, display: Display
) -> tuple[Result, int | None]:
    """One training and its evaluation; and on a GPU the peak of allocated bytes."""
    import torch
    import training

    from vovnet_fast import use_backend

    folder = out / backend
    (folder / "logs").mkdir(parents=True)
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with open(folder / "logs" / "stdout.log", "w") as log, redirect_stdout(log):
        cfg = training.make_config(
            spec, out / "scenes", folder, args.device, args.iterations, args.seed, amp=args.amp
        )
        cfg.experiment_name = f"compare_{backend}"  # mmengine keeps histories by this name.
        with use_backend(backend):
            result = training.train_and_evaluate(cfg, folder, display)
    return result, torch.cuda.max_memory_allocated() if on_gpu else None


def report_of(result: Result, peak: int | None) -> dict[str, Any]:
    """What metrics.json says of one training."""
    return {
        **result.metrics,
        "AP50_by_class": result.class_ap50,
        "first_loss": float(result.losses["loss"][0]),
        "final_loss": float(result.losses["loss"][-30:].mean()),
        "training_seconds": round(result.training_seconds, 1),
        "peak_bytes": peak,
    }


def distances(reference: np.ndarray, fused: np.ndarray) -> dict[str, Any]:
    """Of two curves of losses, ``[iterations]``, relative to the first one.

    Returns:
        the distances of the first iterations, of which the first one depends on the forward
        pass alone and the next ones on gradients too, and the mean distance of the smoothed
        curves.
    """
    import drawing

    smooth = drawing.smooth(reference)
    first = abs(fused - reference)[:FIRST_ITERATIONS] / reference[:FIRST_ITERATIONS]
    return {
        "first_loss_distances": first.tolist(),
        "smoothed_loss_distance": float((abs(drawing.smooth(fused) - smooth) / smooth).mean()),
    }


def device_name(device: str) -> str:
    """``cpu``, or the GPU's own name."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


if __name__ == "__main__":
    sys.exit(main())
