"""Training and evaluation of the demo's detector through mmengine's Runner."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from display import Display
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import channels_last, nn

from vovnet_fast.specs import FIRST_STAGE, VoVNetSpec

CONFIG_FILE = Path(__file__).parents[1] / "configs" / "digits" / "retinanet_vovnet_digits.py"


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        metrics: mmdet's COCO metrics (``bbox_mAP``, ``bbox_mAP_50``, ...), None
            where the scenes hold no object of that size.
        class_ap50: AP at IoU 0.5 of each class by name.
        losses: ``[iterations]`` float64 of every loss term by name; ``loss`` is
            their sum.
        learning_rates: ``[iterations]`` float64.
        training_seconds: wall time of the iterations.
        evaluation_seconds: wall time of inference on all validation scenes and
            of the metrics.
    """

    metrics: dict[str, float | None]
    class_ap50: dict[str, float | None]
    losses: dict[str, np.ndarray]
    learning_rates: np.ndarray
    training_seconds: float
    evaluation_seconds: float


def make_config(
    spec: VoVNetSpec,
    scenes: Path,
    out: Path,
    device: str,
    iterations: int,
    seed: int,
    *,
    amp: bool = False,
) -> Config:
    """The repository's config for one run.

    Args:
        spec: backbone; the neck's ``in_channels`` follow it.
        scenes: dataset folder as :mod:`scenes` writes it.
        out: output folder; mmengine's logs go to its ``logs``, the detections
            to ``detections.bbox.json``.
        device: ``cpu`` or ``cuda``.
        iterations: length of the training. The schedule is stretched to it.
        seed: of the weights and of the order of the scenes.
        amp: train in bf16 by autocast.
    """
    cfg = Config.fromfile(CONFIG_FILE)
    for loader, split in ((cfg.train_dataloader, "train"), (cfg.val_dataloader, "val")):
        loader.dataset.data_root = str(scenes)
        loader.dataset.ann_file = f"{split}.json"
    cfg.val_evaluator.ann_file = str(scenes / "val.json")
    cfg.val_evaluator.outfile_prefix = str(out / "detections")
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.data_root = str(scenes)

    backbone = cfg.model.backbone
    backbone.spec_name = cfg.spec = spec.name
    channels = spec.feature_channels()
    cfg.model.neck.in_channels = [
        channels[f"stage{FIRST_STAGE + index}"] for index in backbone.out_indices
    ]
    set_iterations(cfg, iterations)
    if amp:
        cfg.optim_wrapper.type = "AutocastOptimWrapper"
    cfg.default_hooks.checkpoint = None  # run.py saves one checkpoint, under its own name.
    cfg.work_dir = str(out / "logs")
    cfg.device = device
    cfg.randomness = dict(seed=seed)
    return cfg


def set_iterations(cfg: Config, iterations: int) -> None:
    """Stretch or shorten the schedule, warm-up and cosine alike, to ``iterations``."""
    warmup = iterations * cfg.warmup_iters // cfg.max_iters
    cfg.max_iters, cfg.warmup_iters = iterations, warmup
    cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = iterations
    linear, cosine = cfg.param_scheduler
    linear.end = cosine.begin = warmup
    cosine.end = iterations
    cosine.T_max = iterations - warmup
    if warmup == 0:
        cfg.param_scheduler = [cosine]


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Forward passes in bf16 by autocast, on any device.

    mmengine's AmpOptimWrapper refuses CPUs. Gradients in bf16 do not underflow as fp16's do, and
    need no scaling.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield


class DemoRunner(Runner):
    """mmengine's Runner with two differences.

    It runs on ``cfg.device``, where mmengine takes any accelerator that it
    finds, and in the channels-last layout. The console gets warnings and errors
    only, on stderr: everything else is in the log file.
    """

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.WARNING)
                handler.setStream(sys.stderr)
                # mmengine warns of the age of functions that it calls itself.
                handler.addFilter(lambda record: "deprecated" not in record.getMessage())
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        return model.to(self.cfg.device).to(memory_format=channels_last)


class ProgressHook(Hook):
    """Shows training and evaluation on a :class:`Display` and times them.

    Attributes:
        seconds: wall time of ``training`` and ``evaluation``.
        metrics: what the evaluation returned.
    """

    priority = "VERY_LOW"  # After the hooks that record the losses.

    def __init__(self, display: Display, phases: ExitStack) -> None:
        self.display = display
        self.phases = phases
        self.seconds: dict[str, float] = {}
        self.metrics: dict[str, float] = {}

    def before_train(self, runner: Runner) -> None:
        self._begin("training", runner.max_iters)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None):
        # The mean of a few iterations: a single batch's loss jumps too much to read.
        loss = runner.message_hub.get_scalar("train/loss").mean(20)
        rate = runner.optim_wrapper.get_lr()["lr"][0]
        self.step(f"loss {loss:.3f}  lr {rate:.1e}")

    def before_val(self, runner: Runner) -> None:
        self._end("training")
        self._begin("evaluation", len(runner.val_dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None):
        self.step("")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._end("evaluation")
        self.metrics = metrics or {}

    def _begin(self, phase: str, steps: int) -> None:
        self._start = time.perf_counter()
        self.step = self.phases.enter_context(self.display.phase(phase, steps))

    def _end(self, phase: str) -> None:
        self.seconds[phase] = time.perf_counter() - self._start
        self.phases.close()


def train_and_evaluate(cfg: Config, out: Path, display: Display) -> Result:
    """Run a config; write the checkpoint, the detections and mmengine's logs.

    Args:
        cfg: from :func:`make_config`.
        out: output folder; gets ``checkpoint.pth``, ``detections.bbox.json``,
            ``logs``.
        display: shows the progress.

    Raises:
        AssertionError: the loss is no longer finite (mmdet's CheckInvalidLossHook).
    """
    runner = DemoRunner.from_cfg(cfg)
    with ExitStack() as phases:
        hook = ProgressHook(display, phases)
        runner.register_hook(hook)
        runner.train()
    runner.save_checkpoint(
        str(out), "checkpoint.pth", save_optimizer=False, save_param_scheduler=False
    )
    hub = runner.message_hub
    losses = {
        name.removeprefix("train/"): np.array(hub.get_scalar(name).data[0])
        for name in hub.log_scalars
        if name.startswith("train/loss")
    }
    return Result(
        metrics=_coco_metrics(hook.metrics),
        class_ap50=_class_ap50(Path(cfg.data_root), out),
        losses=losses,
        learning_rates=np.array(hub.get_scalar("train/lr").data[0]),
        training_seconds=hook.seconds["training"],
        evaluation_seconds=hook.seconds["evaluation"],
    )


_METRICS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


def _coco_metrics(found: dict[str, float]) -> dict[str, float | None]:
    """mmdet's metrics without their prefix; pycocotools' -1 for "no such object" is None.

    mmdet gives none at all where the detector found nothing: that is zero.
    """
    values = {f"bbox_{name}": found.get(f"coco/bbox_{name}", 0.0) for name in _METRICS}
    return {
        name: None if value < 0 or math.isnan(value) else value for name, value in values.items()
    }


def _class_ap50(scenes: Path, out: Path) -> dict[str, float | None]:
    """AP at IoU 0.5 for each class, from the files of the evaluation.

    mmdet returns each class's mean over all IoU thresholds only.
    """
    truth = COCO(str(scenes / "val.json"))
    names = [category["name"] for category in truth.loadCats(truth.getCatIds())]
    if not json.loads((out / "detections.bbox.json").read_text()):
        return dict.fromkeys(names, 0.0)
    evaluation = COCOeval(truth, truth.loadRes(str(out / "detections.bbox.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    # Precision by IoU (0 is 0.5), recall, class, area (0 is all), detections (-1 is 100).
    precision = evaluation.eval["precision"][0, :, :, 0, -1].mean(axis=0)
    return {
        name: round(float(value), 3) if value >= 0 else None
        for name, value in zip(names, precision, strict=True)
    }
