"""What fewer bits cost a trained detector: ``python -m benchmarks.accuracy FOLDER...``.

Each folder is one that ``demo/run.py`` has left: a config of mmdet's, a checkpoint, scenes. The
detector's backbone is replaced by networks in other formats, all made from the same weights and
calibrated on the same training scenes, and the detector finds digits in the validation scenes:

* its mAP, and how far that is from fp32's, with an interval: scenes are drawn anew with
  replacement, the same for both (a paired bootstrap of the scenes, not of trainings);
* the least signal-to-noise ratio of a feature against fp64, in dB, on scenes of photographs and
  digits that neither training nor calibration saw;
* the time of the backbone for a batch of the evaluation, all formats in turn.

``--out results`` writes ``results.json``, ``results.md`` and ``results.png``. The first two take
minutes and any machine; times want one at rest. ``--no-speed`` leaves them out, and ``--only-speed
--out results`` adds them to what is there, of the same folders at the same commit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import vovnet_fast
from vovnet_fast import use_backend
from vovnet_fast._files import replacing
from vovnet_fast.tools.bench.stopwatch import (
    Interval,
    Stopwatch,
    interleaved,
    ratio_interval,
    spread,
)

from .writing import begin

CPU = torch.device("cpu")
CALIBRATION = 4
"""Batches of training scenes."""
UNSEEN = 2
"""Batches of validation scenes whose features are compared."""
RESAMPLES = 300
"""Sets of scenes. COCO's curves take some 30 ms each."""

Images = Sequence[Tensor]
Row = dict[str, Any]


class Format(NamedTuple):
    """Numbers that a backbone computes with.

    Attributes:
        name: as the tables call it.
        make: the network, of the trained one and images to calibrate on.
        fast: something faster than a reference runs it on this processor.
    """

    name: str
    make: Callable[[vovnet_fast.VoVNet, Images], nn.Module]
    fast: bool = True


class Choice(NamedTuple):
    """How the numbers of eight bits are chosen."""

    name: str
    options: dict[str, Any]


def _same(model: vovnet_fast.VoVNet, _: Images) -> nn.Module:
    return model


def _frozen(dtype: torch.dtype, model: vovnet_fast.VoVNet, _: Images) -> nn.Module:
    return vovnet_fast.freeze(model, dtype=dtype, out_dtype=torch.float32)


def _quantized(
    options: dict[str, Any], model: vovnet_fast.VoVNet, images: Images
) -> vovnet_fast.QuantizedVoVNet:
    return vovnet_fast.quantize(model, images, **{"report": False, **options})


FP32 = Format("fp32, plain PyTorch", _same)
FORMATS = (
    FP32,
    Format("fp32, frozen", functools.partial(_frozen, torch.float32)),
    Format("bf16, frozen", functools.partial(_frozen, torch.bfloat16)),
    Format("int8", functools.partial(_quantized, {})),
    Format("int8, 255 levels", functools.partial(_quantized, {"levels": 255})),
    Format("fp8", functools.partial(_quantized, {"dtype": "fp8"}), fast=False),
)
EIGHT_BITS = (
    Choice("int8", {}),
    Choice("int8, 255 levels", {"levels": 255}),
    Choice("fp8", {"dtype": "fp8"}),
)
MSE = {"calibrator": "mse"}
CHOICES = (
    Choice("auto", {}),
    *(Choice(name, {"calibrator": name}) for name in ("minmax", "percentile", "entropy", "mse")),
    Choice("mse, biases not corrected", {**MSE, "bias_correction": False}),
    Choice("mse, equalised", {**MSE, "equalize": True}),
)


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    about = begin(options)
    rows = _rows_there(parser, options.out, about) if options.only_speed else []
    with torch.no_grad(), warnings.catch_warnings(), Progress(console=Console(stderr=True)) as bar:
        warnings.simplefilter("ignore")
        for folder in options.folders:
            with contextlib.redirect_stdout(io.StringIO()):
                detector = Detector(folder)
                spec = detector.backbone.spec.name
                if not options.only_speed:
                    rows += measure(detector, bar)
                if not options.no_speed:
                    add_speed([r for r in rows if r["spec"] == spec], detector, options.rounds, bar)
    text: list[str] = []
    for spec in dict.fromkeys(row["spec"] for row in rows):
        text += table([row for row in rows if row["spec"] == spec])
    text += ["", "## Where and with what", "", *(f"* {k}: {v}" for k, v in about.items())]
    Console().print("\n".join(text), markup=False, highlight=False, soft_wrap=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"provenance": about, "rows": rows}, indent=1, allow_nan=False)
        for ending, data in ((".json", content), (".md", "\n".join(text))):
            with replacing(options.out.with_suffix(ending)) as temporary:
                Path(temporary).write_text(data + "\n", encoding="utf-8")
        draw(rows, options.out.with_suffix(".png"))


# --------------------------------------------------------------------------------------
# The detector
# --------------------------------------------------------------------------------------


class Detector:
    """A trained detector whose backbone can be replaced, and its validation scenes.

    Attributes:
        backbone: the trained one, in evaluation mode.
        about: what the folder's ``metrics.json`` says of the training.
    """

    def __init__(self, folder: Path) -> None:
        from mmengine.config import Config
        from mmengine.runner import Runner

        for name in ("config.py", "checkpoint.pth", "metrics.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}: give folders that demo/run.py has written"
                )
        self.about = json.loads((folder / "metrics.json").read_text())
        config = Config.fromfile(folder / "config.py")
        config.load_from = str(folder / "checkpoint.pth")
        config.log_level = "ERROR"
        config.experiment_name = f"accuracy_{folder.name}"
        config.work_dir = str(folder / "logs" / "accuracy")
        config.test_evaluator.outfile_prefix = str(folder / "logs" / "accuracy" / "found")
        self._found = folder / "logs" / "accuracy" / "found.bbox.json"
        self._truth = folder / "scenes" / "val.json"
        self.runner = Runner.from_cfg(config)
        self.runner.load_or_resume()
        self.model = self.runner.model.to(memory_format=torch.channels_last).eval()
        self.backbone = self.model.backbone

    @functools.cached_property
    def calibration(self) -> list[Tensor]:
        """Batches of training scenes."""
        return self.images(self.runner.train_dataloader, CALIBRATION)

    @functools.cached_property
    def unseen(self) -> list[Tensor]:
        """Batches of validation scenes."""
        return self.images(self.runner.test_dataloader, UNSEEN)

    def images(self, loader: Any, batches: int) -> list[Tensor]:
        """Batches as the backbone gets them."""
        prepare = self.model.data_preprocessor
        return [prepare(data)["inputs"] for data in itertools.islice(loader, batches)]

    def find(self, backbone: nn.Module) -> Scores:
        """Detect in all validation scenes."""
        self.model.backbone = backbone
        self._found.unlink(missing_ok=True)
        try:
            self.runner.test()
        finally:
            self.model.backbone = self.backbone
        return Scores(self._truth, self._found)


class Scores:
    """COCO's average precisions of detections, of all images or of some drawn from them."""

    def __init__(self, truth: Path, found: Path) -> None:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        coco = COCO(str(truth))
        detections = json.loads(found.read_text()) if found.exists() else []
        self._eval = COCOeval(coco, coco.loadRes(detections) if detections else COCO(), "bbox")
        if not detections:  # COCO reads no empty results; all is missed then.
            self._eval.cocoDt.dataset = {"images": coco.dataset["images"], "annotations": []}
            self._eval.cocoDt.createIndex()
        self._eval.evaluate()
        params = self._eval.params
        self.images = len(params.imgIds)
        # By class and image, of all sizes: COCOeval has them class by class, size by size.
        grid = np.empty(len(self._eval.evalImgs), dtype=object)
        grid[:] = self._eval.evalImgs
        self._cells = grid.reshape(len(params.catIds), len(params.areaRng), self.images)[:, 0]

    def mean(self, drawn: np.ndarray | None = None) -> tuple[float, float]:
        """mAP and mAP50 of all images, or of those drawn, some of them more than once."""
        drawn = np.arange(self.images) if drawn is None else drawn
        scores = self._eval
        params = copy.deepcopy(scores.params)
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
        params.maxDets = params.maxDets[-1:]
        params.imgIds = list(range(len(drawn)))
        scores.evalImgs = list(self._cells[:, drawn].reshape(-1))
        scores._paramsEval = params
        scores.accumulate(params)
        precision = scores.eval["precision"]  # By IoU, recall, class, size and count.
        return _known(precision), _known(precision[0])

    @functools.cached_property
    def resampled(self) -> np.ndarray:
        """mAP of scenes drawn anew with replacement, the same ones for all detectors."""
        draw = np.random.default_rng(0)
        drawn = draw.integers(self.images, size=(RESAMPLES, self.images))
        return np.array([self.mean(row)[0] for row in drawn])


def _known(precision: np.ndarray) -> float:
    """Mean over classes that have objects; those that have none are -1."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else math.nan


def apart(scores: Scores, baseline: Scores) -> tuple[float, float]:
    """Between what mAP minus the baseline's lies, at 95 %, by drawing scenes anew."""
    low, high = np.quantile(scores.resampled - baseline.resampled, [0.025, 0.975])
    return float(low), float(high)


# --------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------


def measure(detector: Detector, bar: Progress) -> list[Row]:
    """Rows of all formats, and then of all ways to choose the numbers of eight bits."""
    spec = detector.backbone.spec.name
    calibration, unseen = detector.calibration, detector.unseen
    with use_backend("reference"):
        exact = copy.deepcopy(detector.backbone).double()
        wanted = [exact(x.double()) for x in unseen]

    about = dict(spec=spec, **{key: detector.about[key] for key in ("iterations", "seed")})
    rows: list[Row] = []
    baseline: Scores | None = None
    task = bar.add_task(f"{spec}, formats", total=len(FORMATS))
    for form in FORMATS:
        network = form.make(detector.backbone, calibration)
        scores = detector.find(network)
        mean, mean_50 = scores.mean()
        row = dict(about, table="formats", format=form.name, bbox_mAP=mean, bbox_mAP_50=mean_50)
        if baseline is None:
            baseline = scores
        else:
            low, high = apart(scores, baseline)
            row.update(
                mAP_minus_fp32=mean - baseline.mean()[0], mAP_minus_low=low, mAP_minus_high=high
            )
        rows.append({**row, "least_sqnr_db": least_sqnr(network, unseen, wanted)})
        bar.advance(task)

    task = bar.add_task(f"{spec}, calibrators", total=len(EIGHT_BITS) * len(CHOICES))
    for form, choice in itertools.product(EIGHT_BITS, CHOICES):
        network = _quantized({**form.options, **choice.options}, detector.backbone, calibration)
        sqnr = least_sqnr(network, unseen, wanted)
        rows.append(
            dict(about, table="choices", format=form.name, choice=choice.name, least_sqnr_db=sqnr)
        )
        bar.advance(task)
    return rows


def add_speed(rows: Sequence[Row], detector: Detector, rounds: int, bar: Progress) -> None:
    """Times of a batch of the evaluation, all formats in turn, into the rows of formats."""
    spec, images = detector.backbone.spec.name, detector.unseen[0]
    works = {
        form.name: functools.partial(
            _run, form, form.make(detector.backbone, detector.calibration), images
        )
        for form in FORMATS
        if form.fast
    }
    task = bar.add_task(f"{spec}, speed", total=len(works) * (rounds + 2))
    times = interleaved(
        works, rounds, watch=Stopwatch(CPU), cold=False, each=lambda _: bar.advance(task)
    )
    for row in rows:
        seconds = times.get(row["format"]) if row["table"] == "formats" else None
        if seconds is not None:
            ratio = ratio_interval(times[FP32.name], seconds).fields()
            row.update(images=len(images), **spread(seconds, "ms"), **ratio)


def _rows_there(parser: argparse.ArgumentParser, out: Path | None, about: Row) -> list[Row]:
    """What was measured before, of the same code."""
    if out is None or not out.with_suffix(".json").is_file():
        parser.error("--only-speed adds to results that are there: give them as --out")
    found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    if found["provenance"]["commit"] != about["commit"]:
        parser.error(
            f"{out}.json is of commit {found['provenance']['commit']}, and this is "
            f"{about['commit']}: measure all of it again"
        )
    rows: list[Row] = found["rows"]
    return rows


def _run(form: Format, network: nn.Module, images: Tensor) -> Any:
    # What everything is compared with is PyTorch, whatever `auto` would do there.
    with use_backend("reference" if form is FP32 else "auto"):
        return network(images)


def least_sqnr(network: nn.Module, images: Images, wanted: Sequence[Sequence[Tensor]]) -> float:
    """The least SQNR of a feature in dB, over all images."""
    found = [network(x) for x in images]
    return min(
        sqnr(torch.cat(a), torch.cat(b))
        for a, b in zip(zip(*found, strict=True), zip(*wanted, strict=True), strict=True)
    )


def sqnr(found: Tensor, wanted: Tensor) -> float:
    noise = (found.double() - wanted).square().sum()
    return float(10 * (wanted.square().sum() / noise).log10())


# --------------------------------------------------------------------------------------
# What is shown
# --------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Both tables of one network, in Markdown."""
    formats = [row for row in rows if row["table"] == "formats"]
    choices = [row for row in rows if row["table"] == "choices"]
    first = formats[0]
    yield f"# {first['spec']}, a RetinaNet of {first['iterations']} iterations"
    yield ""
    yield "mAP on validation scenes, its difference to fp32 with an interval of 95 % over scenes"
    yield "drawn anew, and plain PyTorch's time over the row's for the backbone on a batch of"
    yield f"{first.get('images', 'some')} images. SQNR: the least of a feature, against fp64."
    yield ""
    yield "| format | mAP | mAP50 | mAP minus fp32's | SQNR, dB | times as fast | median ms |"
    yield "|---|---|---|---|---|---|---|"
    for row in formats:
        yield (
            f"| {row['format']} | {row['bbox_mAP']:.4f} | {row['bbox_mAP_50']:.4f} | "
            f"{_difference(row)} | {row['least_sqnr_db']:.1f} | {_speed(row)} |"
        )
    yield ""
    yield "Least SQNR of a feature in dB, by how the numbers of eight bits are chosen:"
    yield ""
    names = list(dict.fromkeys(row["format"] for row in choices))
    yield f"| | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    found = {(row["choice"], row["format"]): row["least_sqnr_db"] for row in choices}
    for choice in dict.fromkeys(row["choice"] for row in choices):
        yield f"| {choice} | {' | '.join(f'{found[choice, name]:.1f}' for name in names)} |"
    yield ""


def _difference(row: Row) -> str:
    if "mAP_minus_fp32" not in row:
        return ""
    least, most = row["mAP_minus_low"], row["mAP_minus_high"]
    return f"{row['mAP_minus_fp32']:+.4f} ({least:+.4f} to {most:+.4f})"


def _speed(row: Row) -> str:
    if "ms" not in row:
        return "no kernels for it | "
    return f"{Interval.of(row).text()} | {row['ms']:.1f}"


def draw(rows: Sequence[Row], target: Path) -> None:
    """Accuracy against speed, a panel for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["spec"] for row in rows))
    figure = Figure(figsize=(4.6 * len(networks), 4.2), layout="constrained")
    for axes, spec in zip(
        figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True
    ):
        formats = [r for r in rows if r["spec"] == spec and r["table"] == "formats"]
        axes.axhline(formats[0]["bbox_mAP"], color="0.6", linewidth=0.8, zorder=0)
        for index, row in enumerate(formats):
            # Without kernels there is no speed: that of the reference says nothing of the format.
            x, style = (row["ratio_to_eager"], "o") if "ms" in row else (1.0, "_")
            spans = {}
            if "ms" in row:
                spans["xerr"] = [[x - row["ratio_low"]], [row["ratio_high"] - x]]
            if "mAP_minus_fp32" in row:
                gap = row["mAP_minus_fp32"]
                spans["yerr"] = [[gap - row["mAP_minus_low"]], [row["mAP_minus_high"] - gap]]
            name = row["format"] if "ms" in row else f"{row['format']} (not timed)"
            axes.errorbar(
                x, row["bbox_mAP"], fmt=style, color=f"C{index}", label=name, capsize=2, **spans
            )
        axes.set_title(f"{spec}, {formats[0].get('images', 'some')} images", fontsize=10)
        axes.set_xlabel("times as fast as plain PyTorch in fp32 (backbone)")
        axes.set_ylabel("mAP, with the interval of its distance from fp32")
        axes.legend(fontsize=7)
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="demo/run.py --spec V-39-eSE --amp --out FOLDER trains such a detector",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="that demo/run.py has written")
    parser.add_argument("--rounds", type=int, default=30, help="of timing (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)"
    )
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--no-speed", action="store_true", help="time nothing")
    times.add_argument(
        "--only-speed", action="store_true",
        help="time, and add that to the files of an earlier run with --no-speed",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="files to write, without their endings")
    return parser


if __name__ == "__main__":
    main()
