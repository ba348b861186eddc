"""Train a detector with a VoVNet backbone on digits in photographs, and look at what it found.

Makes scenes of scikit-learn's handwritten digits on scikit-image's photographs,
trains mmdet's RetinaNet with ``VoVNetFast`` on them from scratch, evaluates it
with COCO metrics on scenes of other digits on other photographs, and draws the
detections. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from display import Display
    from training import Result

    from vovnet_fast.specs import VoVNetSpec

MARKER = ".vovnet_fast_demo"
"""Empty file that tells an output folder of this demo from any other folder."""

OUTPUTS = (
    "scenes",
    "logs",
    "config.py",
    "checkpoint.pth",
    "detections.bbox.json",
    "loss_curve.png",
    "detections.png",
    "metrics.json",
)


class DemoError(Exception):
    """The demo cannot run as asked; the message says what to change."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="demo/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The folder gets detections.png, loss_curve.png, metrics.json, checkpoint.pth, "
        "config.py, \ndetections.bbox.json (COCO results), scenes/ (the dataset) and logs/.",
    )
    add_training_arguments(parser, Path("work_dirs/demo"))
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to train (default: %(default)s)",
    )
    return parser.parse_args(argv)


def add_training_arguments(parser: argparse.ArgumentParser, out: Path) -> None:
    """Add what says where the results go, and what is trained on what, and how long."""
    parser.add_argument(
        "--out",
        type=Path,
        default=out,
        help="output folder; what an earlier run left there is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--spec",
        default="V-19-slim-dw-eSE",
        help="any architecture that vovnet_fast.specs.names() lists (default: %(default)s)",
    )
    parser.add_argument(
        "--iterations",
        type=_positive,
        default=1000,
        help="length of the training, 8 scenes each (default: %(default)s)",
    )
    parser.add_argument(
        "--train-scenes",
        type=_positive,
        default=2000,
        help="different scenes to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--val-scenes",
        type=_positive,
        default=200,
        help="scenes to evaluate on, of other digits and photographs (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_not_negative,
        default=0,
        help="of the scenes, the weights and the order of training (default: %(default)s)",
    )
    parser.add_argument("--amp", action="store_true", help="train in bf16 by autocast")


def _positive(text: str) -> int:
    return _whole_number(text, 1, 2**31 - 1)


def _not_negative(text: str) -> int:
    return _whole_number(text, 0, 2**32 - 1)


def _whole_number(text: str, smallest: int, largest: int) -> int:
    if not text.isdecimal() or not smallest <= int(text) <= largest:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {smallest} to {largest}, got {text!r}"
        )
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the process's exit status."""
    args = parse_arguments(argv)
    return report_errors("demo/run.py", lambda: run(args))


def report_errors(program: str, work: Callable[[], None]) -> int:
    """Do the work of a program; returns its exit status."""
    # Read by OpenMP when PyTorch is loaded. By default its threads wait by spinning, and
    # one other busy process on a small machine then makes training ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # An optional package of mmdet's, for a metric that is not used here.
    warnings.filterwarnings("ignore", message="faster_coco_eval is not installed")
    try:
        work()
    except DemoError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the output folder is incomplete", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Do everything, in order.

    Raises:
        DemoError: see :func:`check`.
    """
    start = time.perf_counter()
    spec = check(args)
    # Imported late: --help and wrong arguments should not wait for mmdet.
    import drawing
    import training
    from display import Display
    from rich.console import Console

    display = Display(Console(file=sys.stdout))
    out = args.out.resolve()
    prepare_folder(out)
    display.say(
        f"RetinaNet with {spec.name} on {args.device}: {args.iterations} iterations on "
        f"{args.train_scenes} scenes, seed {args.seed}"
    )
    scene_seconds = write_scenes(out / "scenes", args, display)
    (out / "logs").mkdir()
    # What mmdet and pycocotools print would run through the progress display. It is kept
    # in a file; errors and warnings go to stderr all the same.
    with open(out / "logs" / "stdout.log", "w") as log, redirect_stdout(log):
        cfg = training.make_config(
            spec, out / "scenes", out, args.device, args.iterations, args.seed, amp=args.amp
        )
        cfg.dump(str(out / "config.py"))
        result = training.train_and_evaluate(cfg, out, display)

    title = (
        f"RetinaNet, {spec.name}, {args.iterations} iterations: "
        f"mAP50 {result.metrics['bbox_mAP_50']:.2f} on unseen digits and photographs"
    )
    drawing.draw_losses(result.losses, result.learning_rates, out / "loss_curve.png", title)
    drawing.draw_detections(
        out / "scenes", out / "detections.bbox.json", out / "detections.png", title
    )
    report = make_report(args, spec, result, scene_seconds, time.perf_counter() - start)
    write_json(out / "metrics.json", report)
    say_summary(display, out, report)


def check(args: argparse.Namespace) -> VoVNetSpec:
    """Refuse what cannot work before anything is written.

    Returns:
        The architecture that ``args.spec`` names.

    Raises:
        DemoError: a package is missing, the architecture is unknown, there is no
            GPU, or the output folder belongs to something else.
    """
    try:
        import matplotlib  # noqa: F401
        import mmcv.ops  # noqa: F401
        import mmdet  # noqa: F401
        import rich  # noqa: F401
        import skimage  # noqa: F401
        import sklearn  # noqa: F401
        import torch

        from vovnet_fast import specs
    except ImportError as error:
        raise DemoError(
            f"importing what the demo needs failed with: {error}. Install it with: "
            'pip install "vovnet-fast[demo,onedl]" (see the README for mmcv and its compiled ops)'
        ) from error
    try:
        spec = specs.get(args.spec)
    except specs.UnknownSpecError as error:
        raise DemoError(f"--spec: {error}") from None
    if args.device == "cuda" and not torch.cuda.is_available():
        raise DemoError(
            f"--device cuda: PyTorch {torch.__version__} finds no CUDA GPU on this machine; "
            "use --device cpu"
        )
    out = args.out
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out {out} is a file")
    if out.is_dir() and not (out / MARKER).exists() and any(out.iterdir()):
        raise DemoError(
            f"--out {out} holds files that this demo did not write; give a new or an empty folder"
        )
    return spec


def prepare_folder(out: Path, outputs: tuple[str, ...] = OUTPUTS) -> None:
    """Make the output folder, without what an earlier run left in it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    for name in outputs:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_scenes(folder: Path, args: argparse.Namespace, display: Display) -> float:
    """Write both splits; returns the seconds it took."""
    import scenes

    start = time.perf_counter()
    with display.phase("scenes", args.train_scenes + args.val_scenes) as step:
        for split, count in (("train", args.train_scenes), ("val", args.val_scenes)):
            scenes.write_split(folder, split, count, args.seed, on_scene=step)
    return time.perf_counter() - start


def make_report(
    args: argparse.Namespace,
    spec: VoVNetSpec,
    result: Result,
    scene_seconds: float,
    total_seconds: float,
) -> dict:
    """The content of metrics.json."""
    return {
        **result.metrics,
        "AP50_by_class": result.class_ap50,
        "spec": spec.name,
        "device": args.device,
        "amp": args.amp,
        "seed": args.seed,
        "iterations": args.iterations,
        "train_scenes": args.train_scenes,
        "val_scenes": args.val_scenes,
        "final_loss": float(result.losses["loss"][-30:].mean()),
        "seconds": {
            "scenes": round(scene_seconds, 1),
            "training": round(result.training_seconds, 1),
            "evaluation": round(result.evaluation_seconds, 1),
            "total": round(total_seconds, 1),
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what the results depend on."""
    import mmcv
    import mmdet
    import mmengine
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mmdet": mmdet.__version__,
        "mmcv": mmcv.__version__,
        "mmengine": mmengine.__version__,
    }


def write_json(target: Path, content: dict) -> None:
    """Write a JSON file that is never there by half.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    partial.replace(target)


def say_summary(display: Display, out: Path, report: dict) -> None:
    """The last lines on the console."""
    seconds = report["seconds"]
    display.say(
        f"\nmAP {report['bbox_mAP']:.3f}   mAP50 {report['bbox_mAP_50']:.3f}   on "
        f"{report['val_scenes']} scenes of digits and photographs that training never saw "
        f"({seconds['total']:.0f} s, {seconds['training']:.0f} s of them training)"
    )
    for name, what in (
        ("detections.png", "what it found"),
        ("loss_curve.png", "how it learned"),
        ("metrics.json", "all metrics"),
        ("checkpoint.pth", "the trained weights"),
        ("config.py", "the config they belong to"),
    ):
        display.say(f"  {what:26s} {out / name}")


if __name__ == "__main__":
    sys.exit(main())
