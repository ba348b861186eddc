"""Somebody whose speed on whole networks is measured, and on what."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vovnet_fast import _optional, backends, quantize, tuning, use_backend
from vovnet_fast.quantization import QuantizedVoVNet
from vovnet_fast.tools.bench.training import Shape, image
from vovnet_fast.tools.plan import DTYPES

from .networks import build, counted, extension_launches, operations, text

Model = Callable[[Any], Sequence[Tensor]]
"""Makes the four features of images."""


class Missing(Exception):
    """This machine does not have the peer; the message says why."""


_CALIBRATION = 320
"""Height and width, at most, of the image that a network in eight bits is calibrated on. On one of
64 pixels a last stage would see four of them, and cut much of what larger images make."""


class Case(NamedTuple):
    """A network on images of one size; ``dtype`` is that of activations."""

    spec: str
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.spec}-{text(self.shape)}-{str(self.dtype).removeprefix('torch.')}"

    def network(self) -> nn.Module:
        """The plain network in this dtype, ``channels_last``, in eval mode."""
        return build(self.spec, self.dtype, self.device)

    def quantized(self, dtype: str) -> QuantizedVoVNet:
        """The network in ``int8`` or ``fp8``, calibrated on a part of the first image."""
        some = self.images()[:1, :, :_CALIBRATION, :_CALIBRATION].float()
        network = build(self.spec, torch.float32, self.device)
        with use_backend("reference"):
            return quantize(
                network, [some], dtype, calibrator="minmax", stem="int8", bias_correction=False,
                report=False,
            )  # fmt: skip

    def images(self) -> Tensor:
        """``channels_last``, in this dtype."""
        with torch.inference_mode(False):
            return image(self.shape, self.dtype, self.device)


def _same(x: Tensor) -> Tensor:
    return x


class Peer(NamedTuple):
    """Someone who makes features of images.

    Attributes:
        provider: as rows name it.
        build: makes it; may compile, convert, capture.
        settings: which ones it got, in words.
        images: of ``channels_last`` images in the case's dtype, those that it wants.
        backend: under which it runs; that of a row is None for the plain modules.
        same: computes the same function of the same weights as eager.
        slow: takes minutes to build.
        opaque: the reason why nobody can count its launches, where that is so.
        apart: how far its last feature may be from eager's, relative, in norms; None for what
            rounding in the dtype makes.
    """

    provider: str
    build: Callable[[Case], Model]
    settings: str
    images: Callable[[Tensor], Any] = _same
    backend: str = "reference"
    same: bool = True
    slow: bool = False
    opaque: str = ""
    apart: float | None = None

    @property
    def ours(self) -> str | None:
        """The backend, where this is vovnet_fast."""
        return self.backend if self.provider.startswith(("fused", "frozen")) else None

    def ready(self, case: Case) -> Model:
        """Build it, unless it is missing here.

        Raises:
            Missing: the reason why it is.
        """
        reason = backends.why_not(self.backend, case.device)
        if reason is None and self.backend == "triton" and case.device.type == "cpu":
            reason = "the time of Triton's interpreter says nothing"
        if reason is not None:
            raise Missing(f"backend {self.backend}: {reason}")
        # As its user would: outside inference mode, which makes tensors of another kind.
        with torch.inference_mode(False), torch.no_grad():
            return self.build(case)

    def launches(self, case: Case, model: Model) -> int:
        """How many kernels ``model``, which :meth:`ready` made, launches; counted, not measured.

        Of plain PyTorch ATen's operations, of Triton what it would launch with the choices that
        need no measurement, of the extension its calls. Of a CUDA graph, what was captured.

        Raises:
            Missing: it cannot be counted; the message says why.
        """
        if self.opaque:
            raise Missing(self.opaque)
        if self.apart is not None and self.ours == "triton":
            return _recorded(getattr(model, "captured", model), self.images(case.images()))
        if self.ours == "triton":
            dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
            launches: int = counted(case.spec, case.shape, dtype)["launches"]["fused"]
            return launches
        if self.ours in ("cpu", "cuda"):
            return extension_launches(self.ours, *case)
        images = self.images(case.images())
        captured: Model = getattr(model, "captured", model)
        return operations(lambda: captured(images))


def _recorded(model: Model, images: Tensor) -> int:
    """Kernels of Triton that a call launches."""
    from vovnet_fast.kernels._common import recording

    with use_backend("triton"), tuning.static_choices(), recording() as found:
        model(images)
    return len(found)


def only(case: Case, kind: str, what: str) -> None:
    """Raise :class:`Missing`, with what was said, on another type of device."""
    if case.device.type != kind:
        raise Missing(f"{what}; this is a {case.device.type.upper()}")


def imported(module: str) -> Any:
    """A module of an optional package, which is missing where it cannot be used."""
    reason = _optional.why_not(module)
    if reason is not None:
        raise Missing(reason)
    return importlib.import_module(module)
