"""A VoVNet in eight bits, calibrated on images.

>>> import torch, vovnet_fast
>>> model = vovnet_fast.VoVNet("V-19-slim-eSE").eval()
>>> images = [torch.randn(4, 3, 64, 64) for _ in range(2)]
>>> quantized = vovnet_fast.quantize(model, images)
>>> stage2, stage3, stage4, stage5 = quantized(images[0])
>>> print(quantized.report())  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arithmetic.layers import QuantizedNetwork
from ..deploy.freeze import folded as fold
from ..deploy.freeze import require_model, require_options
from ..deploy.frozen import FrozenVoVNet
from ..network.model import VoVNet
from . import adjusting, formats
from .building import build
from .calibrating import Images, calibrate
from .fine_tuning import FineTuning
from .floating import Folded
from .formats import Format
from .network import QuantizedVoVNet
from .ranges import CALIBRATORS, Range
from .report import Row, least_sqnr, measure

AUTO = "auto"
STEMS = (AUTO, "int8", "wide")

TRIED = ("mse", "minmax")
"""Calibrators that ``auto`` chooses from. Each activation's own error is least by ``mse``, but what
is cut of large values adds up over layers, where roundings average out: of trained networks some
are far better by one, and some a little by the other (docs/quantization.md)."""

GAIN = 0.1
"""dB of the least SQNR of a feature by which a wide stem has to be better under ``auto``."""


def quantize(
    model: VoVNet,
    images: Iterable[Tensor],
    dtype: str = "int8",
    calibrator: str = AUTO,
    *,
    levels: int | None = None,
    percentile: float = 99.99,
    stem: str = "auto",
    equalize: bool = False,
    bias_correction: bool = True,
    report: bool = True,
    out_dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    told: Callable[[str], None] = lambda text: None,
) -> QuantizedVoVNet:
    """Make an inference module in eight bits of a VoVNet, which is left as it is.

    Batch norms are folded first. Weights have a scale for each output channel, activations one for
    each slot of a concat buffer, and outputs of depthwise convolutions one for each channel.
    :mod:`vovnet_fast.arithmetic` says what is computed.

    Args:
        model: any :class:`vovnet_fast.VoVNet` in evaluation mode, with checkpoints loaded.
        images: iterable of ``[N, C, H, W]`` batches, floating point, normalised as in training, of
            any sizes; or one such batch. It is gone through once.
        dtype: ``int8``, or ``fp8`` for e4m3.
        calibrator: how the range of an activation is chosen, ``minmax``, ``percentile``, ``mse``
            or ``entropy``, see :mod:`.ranges`; ``auto`` takes the one of :data:`TRIED` by which the
            least SQNR of a feature is better on the first images.
        levels: the largest activation of int8: 127, which every instruction set multiplies
            exactly, or 255, whose error is half of that; see :mod:`vovnet_fast.arithmetic`.
        percentile: of the calibrator of that name: how many values of a hundred are not cut.
        stem: ``int8``; ``wide`` for images and weights of the first layer in 11 and 12 bits (fp32
            for fp8), still exact; ``auto`` takes that where it is better by :data:`GAIN`.
        equalize: give the channels of each activation like ranges first, where the network stays
            the same function; see :func:`.adjusting.equalize`.
        bias_correction: take from biases by how much rounding moves means; see
            :func:`.adjusting.correct_biases`.
        report: measure the SQNR of every activation on the first images, for
            :meth:`QuantizedVoVNet.report`.
        out_dtype: of the returned features.
        memory_format: of the returned features.
        told: is called with what is done next, once the images have been gone through.

    Returns:
        a :class:`QuantizedVoVNet` on the device of the model.

    Raises:
        TypeError: ``model`` is no VoVNet, images are no tensors of floating point, or there is no
            such ``out_dtype``.
        ValueError: there are no images, or they have NaN, Inf, wrong channels or but one value;
            weights or activations are not finite; the model is in training mode; an option is
            none of those above.
        BackendError: a part cannot be folded; see :func:`vovnet_fast.freeze`.
        RuntimeError: this torch has no e4m3.
    """
    require_options("quantize", torch.float32, out_dtype, memory_format)
    form = _require(model, dtype, levels, calibrator, percentile, stem)
    with torch.inference_mode(False), torch.no_grad():
        made = _prepare(
            model, images, form, calibrator, percentile, stem, equalize, bias_correction, told
        )
        if report:
            told("measuring what it costs")
        rows = made.rows(made.network()) if report else []
        return QuantizedVoVNet(made.network(), rows, out_dtype, memory_format)


def fine_tuning(
    model: VoVNet,
    images: Iterable[Tensor],
    dtype: str = "int8",
    calibrator: str = AUTO,
    *,
    levels: int | None = None,
    percentile: float = 99.99,
    stem: str = "auto",
    equalize: bool = False,
    bias_correction: bool = True,
) -> FineTuning:
    """A module that computes what :func:`quantize` would make, and can be trained.

    Its weights are those of the model with norms folded, its ranges stay as they are calibrated.
    :meth:`FineTuning.quantized` makes the inference module of what it has become.

    Args:
        model, images, dtype, calibrator, levels, percentile, stem, equalize, bias_correction: see
            :func:`quantize`.

    Raises:
        As :func:`quantize`.
    """
    form = _require(model, dtype, levels, calibrator, percentile, stem)
    with torch.inference_mode(False), torch.no_grad():
        made = _prepare(
            model, images, form, calibrator, percentile, stem, equalize, bias_correction
        )
    return FineTuning(made.folded, made.ranges, made.form, made.out_features)


@dataclass(frozen=True)
class _Prepared:
    """All that is chosen before weights are rounded.

    Attributes:
        exact: weights before biases were corrected: what a report compares with.
        folded: weights that are rounded.
        kept: images for the report.
    """

    exact: Folded
    folded: Folded
    ranges: dict[str, Range]
    form: Format
    out_features: tuple[str, ...]
    kept: Tensor

    def network(self) -> QuantizedNetwork:
        return build(self.folded, self.ranges, self.form, self.out_features)

    def rows(self, network: QuantizedNetwork) -> list[Row]:
        return measure(network, self.exact, self.kept)


def _prepare(
    model: VoVNet,
    images: Iterable[Tensor],
    form: Format,
    calibrator: str,
    percentile: float,
    stem: str,
    equalize: bool,
    bias_correction: bool,
    told: Callable[[str], None] = lambda text: None,
) -> _Prepared:
    wanted = model.out_features
    batches = Images(images, model)
    folded = Folded.of(fold(model, torch.float64))
    _require_finite(folded)
    exact = folded.map(torch.Tensor.float)
    if equalize:
        exact = adjusting.equalize(exact, batches.kept, wanted)
    names = TRIED if calibrator == AUTO else (calibrator,)
    found = calibrate(exact, batches, wanted, form, names, percentile)

    def candidates(form: Format) -> list[_Prepared]:
        made = []
        for ranges in found:
            weights = exact
            if bias_correction:
                weights = adjusting.correct_biases(exact, ranges, form, batches.kept, wanted)
            made.append(_Prepared(exact, weights, ranges, form, wanted, batches.kept))
        return made

    told("correcting biases" if bias_correction else "rounding weights")
    narrow = candidates(form)
    wide = candidates(form._replace(wide_stem=True)) if stem == AUTO else []
    if len(narrow) + len(wide) == 1:
        return narrow[0]
    told("comparing what was chosen in several ways")
    networks = [each.network() for each in (*narrow, *wide)]
    reached = least_sqnr(networks, exact, batches.kept)
    best = max(range(len(narrow)), key=reached.__getitem__)
    if wide:
        other = max(range(len(narrow), len(reached)), key=reached.__getitem__)
        best = other if reached[other] >= reached[best] + GAIN else best
    return (*narrow, *wide)[best]


def _require(
    model: VoVNet,
    dtype: str,
    levels: int | None,
    calibrator: str,
    percentile: float,
    stem: str,
) -> Format:
    if isinstance(model, (FrozenVoVNet, QuantizedVoVNet)):
        raise TypeError(
            f"quantize takes a vovnet_fast.VoVNet, got a {type(model).__name__}, whose weights "
            "are rounded already: quantise the model that it was made of"
        )
    require_model("quantize", model)
    if model.training:
        raise ValueError(
            "quantize: the model is in training mode, and what is measured holds for evaluation: "
            "call eval() first"
        )
    known_calibrators = (AUTO, *CALIBRATORS)
    for name, value, known in (
        ("calibrator", calibrator, known_calibrators),
        ("stem", stem, STEMS),
    ):
        if value not in known:
            raise ValueError(f"quantize: {name} must be one of {', '.join(known)}, got {value!r}")
    if not 50 < percentile <= 100:
        raise ValueError(
            f"quantize: percentile must be above 50 and at most 100, got {percentile!r}"
        )
    return formats.require(dtype, levels)._replace(wide_stem=stem == "wide")


def _require_finite(folded: Folded) -> None:
    for name, layer in folded.layers.items():
        tensors = [layer.weight, layer.shift, *(layer.depthwise,) * (layer.depthwise is not None)]
        if not all(tensor is None or tensor.isfinite().all() for tensor in tensors):
            raise ValueError(
                f"quantize: the weights of {name} hold NaN or Inf once its norm is folded: "
                "training had diverged, or the checkpoint is damaged"
            )
    for name, pair in folded.gates.items():
        if not all(tensor.isfinite().all() for tensor in pair):
            raise ValueError(f"quantize: the eSE weights of {name} hold NaN or Inf")
