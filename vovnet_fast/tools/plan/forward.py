"""A network's forward pass, counted on meta tensors: fused, and eager."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ... import _optional, backends, specs
from ...network.model import STAGE_NAMES, VoVNet
from ...ops._checks import nhwc
from ...ops.features import check_size
from ...ops.features import run as run_features
from ...quantization import layout
from ...quantization.formats import Format
from ...quantization.layout import Architecture
from ...quantization.rehearsing import launch
from ...specs import VoVNetSpec
from .aten import AtenRecorder, marking_ese
from .launches import launch_work
from .work import Rates, Tally, Work, tally

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class Plan:
    """A forward pass of one network on one input, fused and eager.

    Attributes:
        spec: canonical name of the architecture.
        shape: N, H, W of the images.
        dtype: a key of :data:`DTYPES`.
        rates: those of which the floors are made.
        fused: from the launches of the Triton backend.
        eager: from the ATen operations of the plain modules, one launch each.
    """

    spec: str
    shape: tuple[int, int, int]
    dtype: str
    rates: Rates
    fused: Tally
    eager: Tally

    def as_dict(self) -> dict[str, Any]:
        """Everything, and the totals, as what JSON can hold. Units: FLOP, bytes, seconds."""
        found = asdict(self)
        found["measured"] = False  # Bounds from counts: nothing has run.
        for name in ("fused", "eager"):
            found[name]["total"] = asdict(getattr(self, name).total)
        return found


def plan_forward(
    spec: str | VoVNetSpec,
    shape: tuple[int, int, int],
    *,
    dtype: str = "bf16",
    rates: Rates | None = None,
) -> Plan:
    """Count a forward pass in inference, from ``channels_last`` images to the four stages.

    Batch norms are taken as folded already: folding depends on parameters only.
    No GPU is needed; tiles are chosen as for a GPU of compute capability 9.0.

    Args:
        spec: an architecture or its name.
        shape: N, H, W of the images, which have three channels.
        dtype: of images and parameters, a key of :data:`DTYPES`.
        rates: of the device, an H200 by default. That default is a bf16 rate: for
            ``fp32`` the floor is then true, but too low.

    Raises:
        UnknownSpecError: no architecture has that name.
        ValueError: a size below 1, images too small for the network, unknown dtype.
        BackendError: Triton is not installed, or cannot be imported.
    """
    reason = _optional.why_not("triton")
    if reason is not None:
        raise backends.BackendError(
            f"the launches of the fused path are planned with Triton: {reason}"
        )
    check_input(shape, dtype)
    rates = rates or Rates()
    batch, height, width = shape
    with torch.device("meta"), torch.no_grad():
        model = VoVNet(spec, input_ch=IMAGE_CHANNELS).to(DTYPES[dtype]).eval()
        image = torch.empty(batch, IMAGE_CHANNELS, height, width, dtype=DTYPES[dtype])
        image = image.to(memory_format=torch.channels_last)
        eager = eager_work(model, image)
        fused = fused_work(model, image)
    return Plan(model.spec.name, shape, dtype, rates, tally(fused, rates), tally(eager, rates))


def check_input(shape: tuple[int, int, int], dtype: str) -> None:
    """Refuse sizes below 1, and what is no key of :data:`DTYPES`, with a ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if min(shape) < 1:
        raise ValueError(f"N, H and W must be at least 1, got {tuple(shape)}")


def fused_work(model: VoVNet, image: Tensor) -> list[Work]:
    """The launches of the Triton backend, and any ATen operation between them."""
    from ...backends import triton
    from ...kernels._common import recording

    params = model.fold(image.dtype).packed(image.dtype)
    with AtenRecorder() as recorder, recording() as launches:
        run_features(triton, nhwc(image), params, model.out_features)
    return [launch_work(launch) for launch in launches] + recorder.works


def quantized_work(spec: str | VoVNetSpec, shape: tuple[int, int, int], form: Format) -> list[Work]:
    """The launches of a network in eight bits on Triton's ops, for the GPU of :func:`plan_forward`.

    Raises:
        UnknownSpecError: no architecture has that name.
        ValueError: a size below 1, or images too small for the network.
    """
    from ...kernels._common import recording

    check_input(shape, "fp32")
    batch, height, width = shape
    architecture = Architecture(specs.get(spec), form, STAGE_NAMES, IMAGE_CHANNELS)
    check_size(architecture.spec, STAGE_NAMES, height, width)
    image = torch.empty(batch, IMAGE_CHANNELS, height, width, device="meta")
    image = image.to(memory_format=torch.channels_last)
    network = layout.blank(architecture, "meta")
    with AtenRecorder() as recorder, recording() as launches:
        launch(network, image)
    return [launch_work(found) for found in launches] + recorder.works


def eager_work(model: VoVNet, image: Tensor) -> list[Work]:
    """The ATen operations of the plain modules."""
    recorder = AtenRecorder()
    with backends.use_backend("reference"), marking_ese(model, recorder), recorder:
        model(image)
    return recorder.works
