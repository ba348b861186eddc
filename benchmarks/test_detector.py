"""Faster R-CNN with V-39 in mmdetection: plain modules in the backbone against fused ones.

``pytest benchmarks/test_detector.py --benchmark-only``, where mmdet is installed. A detector of
``configs/faster_rcnn`` with random weights and images: ``test_step`` as it is and with a frozen
backbone, and ``train_step``. At 800x1344 with automatic mixed precision on a GPU, small images
and few proposals in fp32 on a CPU. ``extra_info["images_per_s"]`` counts whole detectors, heads,
losses and optimiser included, and ``distance`` is that of the last feature from eager's.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vovnet_fast import _optional, backends, freeze, use_backend

from .op_rows import skip_unless_usable
from .timing import FEWEST, measure

TRAINS = True
"""conftest.py: not in inference mode."""

ON_GPU = torch.cuda.is_available()
CONFIG = (
    Path(__file__).parents[1] / "configs" / "faster_rcnn" / "faster-rcnn_vovnet-39_fpn_1x_coco.py"
)
SHAPE = (2, 800, 1344) if ON_GPU else (1, 128, 192)
PROPOSALS = 1000 if ON_GPU else 16
MAX_DISTANCE = 0.1 if ON_GPU else 1e-3


class Provider(NamedTuple):
    """The backend of the backbone, whether it is frozen, and the settings in words."""

    name: str
    settings: str
    backend: str = "reference"
    frozen: bool = False


def _providers():
    yield "eager", Provider("eager", "plain modules in the backbone")
    yield "frozen", Provider("frozen", "vovnet_fast.freeze on plain PyTorch", frozen=True)
    if not ON_GPU:  # There it is one of those below.
        words = "VoVNetFast, backend auto: ops, or plain modules where these are faster"
        yield "fused-auto", Provider("fused, auto", words, "auto")
    for backend in backends.NAMES:
        if backend != "reference":
            fused = f"VoVNetFast, backend {backend}"
            yield f"fused-{backend}", Provider("fused", fused, backend)
            words = f"{fused}, frozen"
            yield f"fused-frozen-{backend}", Provider("fused, frozen", words, backend, True)


PROVIDERS = dict(_providers())


def build(device):
    """The detector of the config, the same weights at every call."""
    import mmdet.registry
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm

    register_all_modules(init_default_scope=True)
    model = Config.fromfile(CONFIG).model
    # Untrained, it is sure of nothing; without a threshold there is something to suppress.
    model.test_cfg.rcnn.update(score_thr=0.0)
    model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = PROPOSALS
    model.train_cfg.rcnn.sampler.num = min(model.train_cfg.rcnn.sampler.num, PROPOSALS)
    torch.manual_seed(0)
    detector = revert_sync_batchnorm(mmdet.registry.MODELS.build(model)).to(device)
    detector.backbone.to(memory_format=torch.channels_last)
    return detector


class Detector:
    """A detector under a provider; its baseline is another one under eager."""

    def __init__(self, provider, direction, device):
        from mmdet.testing import demo_mm_inputs

        self.backend, self.direction, self.device = provider.backend, direction, device
        self.model = build(device).train(direction == "step")
        if provider.frozen:
            dtype = torch.bfloat16 if ON_GPU else torch.float32
            options = dict(dtype=dtype, out_dtype=torch.float32)
            self.model.backbone = freeze(self.model.backbone, **options)
        images, height, width = SHAPE
        self._data = demo_mm_inputs(
            images, [[3, height, width]] * images, num_items=[8] * images, num_classes=80,
            device=str(device),
        )  # fmt: skip
        if direction == "step":
            self.optimizer = self._optimizer()

    def _optimizer(self):
        from mmengine.optim import AmpOptimWrapper, OptimWrapper

        # So small a rate that all providers stay where they are.
        sgd = torch.optim.SGD(self.model.parameters(), lr=1e-12, momentum=0.9)
        return AmpOptimWrapper(optimizer=sgd, dtype="bfloat16") if ON_GPU else OptimWrapper(sgd)

    def __call__(self):
        with use_backend(self.backend):
            torch.manual_seed(0)  # Samplers draw proposals.
            if self.direction == "step":
                return self.model.train_step(self._data, self.optimizer)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU):
                return self.model.test_step(self._data)

    def feature(self):
        """The last feature of the images, in inference."""
        torch.manual_seed(1)
        images = torch.randn(SHAPE[0], 3, *SHAPE[1:], device=self.device)
        amp = torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU)
        with use_backend(self.backend), torch.no_grad(), amp:
            training = self.model.training
            found = self.model.eval().backbone(images)[-1].float()
            self.model.train(training)
        return found


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("direction", ["forward", "step"])
def test_detector(direction, name, benchmark, watch, device):
    missing = list(filter(None, map(_optional.why_not, ("mmcv.ops", "mmdet"))))
    if missing:
        pytest.skip(missing[0])
    provider = PROVIDERS[name]
    if direction == "step" and provider.frozen:
        pytest.skip("a frozen backbone is not trained")
    skip_unless_usable(provider.backend, device)
    baseline = Detector(PROVIDERS["eager"], direction, device)
    detector = Detector(provider, direction, device)
    expected, found = baseline.feature(), detector.feature()
    distance = ((found - expected).norm() / expected.norm()).item()
    assert distance < MAX_DISTANCE
    what = "inference" if direction == "forward" else "training"
    text = f"{SHAPE[0]}x3x{SHAPE[1]}x{SHAPE[2]}"
    benchmark.group = f"Faster R-CNN V-39, {what}"
    benchmark.extra_info.update(
        kind="detector",
        name=f"Faster R-CNN V-39 {what} {text}",
        provider=provider.name,
        backend=provider.backend if provider.name.startswith("fused") else None,
        spec="vovnet-39",
        shape=text,
        dtype="bfloat16" if ON_GPU else "float32",
        settings=provider.settings + (", automatic mixed precision" if ON_GPU else ""),
        distance=distance,
    )
    benchmark.extra_info["pass"] = direction
    # On a CPU a step takes so long that more rounds would be most of the time of all suites.
    fewest = FEWEST if ON_GPU else 6  # No interval of 95 % takes fewer.
    measured = measure(benchmark, watch, detector, baseline, fewest=fewest)
    benchmark.extra_info["images_per_s"] = SHAPE[0] / (measured.median_ms / 1e3)
