"""Images in, ranges of all activations out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import int8
from ..network.model import VoVNet
from ..ops.features import check_size
from .floating import Floating, Folded
from .formats import Format
from .ranges import Histogram, Range, choose
from .walking import DEPTHWISE, IMAGE

KEPT = 8
"""Images on which the report, the stem's precision, equalisation and biases are measured: the first
ones, of one size."""


class Images:
    """Batches for calibration, looked at as they come.

    Args:
        images: an iterable of ``[N, C, H, W]`` tensors, or one such tensor. It is gone through
            once.
        model: which they are for.

    Attributes:
        kept: the first :data:`KEPT` images of the first one's size, fp32 on the model's device.

    Raises:
        TypeError: something else than tensors of floating point.
        ValueError: there are none, or they have wrong channels, NaN, Inf or too few pixels.
    """

    def __init__(self, images: Iterable[Tensor], model: VoVNet) -> None:
        if isinstance(images, Tensor):
            images = [images]
        if not isinstance(images, Iterable):
            raise TypeError(
                "quantize: images must be an iterable of [N, C, H, W] tensors, got "
                f"{type(images).__name__}"
            )
        first = model.first_weight
        self._device = None if first is None else first.device
        self._model = model
        self._total = len(images) if isinstance(images, Sized) else 0
        self._rest = iter(images)
        self._begin: list[Tensor] = []
        kept: list[Tensor] = []
        count = 0
        for batch in self._rest:
            self._begin.append(self._checked(batch, len(self._begin)))
            if self._begin[-1].shape[1:] == self._begin[0].shape[1:]:
                kept.append(self._begin[-1])
                count += len(self._begin[-1])
            if count >= KEPT:
                break
        if count == 0:
            raise ValueError(
                "quantize: there are no images, and without them nothing is known of the "
                "activations: give some dozens of those that the network is for, normalised as in "
                "training"
            )
        self.kept = torch.cat(kept)[:KEPT]

    def __iter__(self) -> Iterator[Tensor]:
        seen = len(self._begin)
        yield from self._begin
        self._begin = []
        for i, batch in enumerate(self._rest):
            yield self._checked(batch, seen + i)

    def __len__(self) -> int:
        return self._total

    def _checked(self, batch: Any, number: int) -> Tensor:
        what, channels = f"quantize: batch {number} of the images", self._model.input_ch
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"{what} must be a tensor [N, {channels}, H, W], got {type(batch).__name__}: of a "
                "data loader's pairs take the images alone"
            )
        if batch.ndim != 4 or batch.shape[1] != channels:
            raise ValueError(f"{what} must be [N, {channels}, H, W], got {list(batch.shape)}")
        if not batch.is_floating_point():
            raise TypeError(
                f"{what} must be floating point and normalised as in training, got {batch.dtype}"
            )
        check_size(self._model.spec, self._model.out_features, batch.shape[2], batch.shape[3])
        if not batch.isfinite().all():
            raise ValueError(f"{what} holds NaN or Inf: leave such images out, or mend them")
        return batch.detach().to(device=self._device, dtype=torch.float32)


def calibrate(
    folded: Folded,
    images: Images,
    out_features: tuple[str, ...],
    form: Format,
    calibrators: Sequence[str],
    percentile: float,
) -> list[dict[str, Range]]:
    """The range of every activation by its name, as each calibrator has it.

    That of the images is what they reach, whatever the calibrator: they are cut by whoever made
    them, and have no outliers.

    Args:
        folded: weights in fp32.
        images: to measure on.
        out_features: names.
        form: for whom.
        calibrators: some of :data:`.ranges.CALIBRATORS`.
        percentile: of that calibrator.

    Raises:
        ValueError: each channel of all images is one value throughout; an activation is not finite.
    """
    histograms: dict[str, Histogram] = {}
    ends: list[Tensor] = []  # The least and the largest value of each channel of a batch.

    def observe(name: str, x: Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError(
                f"quantize: {name} holds NaN or Inf on these images in fp32: the weights have "
                "diverged, or the images are not normalised as in training"
            )
        if name not in histograms:
            groups = x.shape[1] if name.endswith(DEPTHWISE) else 1
            histograms[name] = Histogram(groups, x.device)
        histograms[name].add(x)

    network = Floating(folded, observe)
    for batch in _shown(images):
        ends.append(torch.stack([batch.amin((0, 2, 3)), batch.amax((0, 2, 3))]))
        observe(IMAGE, batch)
        network.run(batch, out_features)
    least, largest = torch.stack(ends)[:, 0].amin(0), torch.stack(ends)[:, 1].amax(0)
    if torch.equal(least, largest):
        values = ", ".join(f"{value:g}" for value in dict.fromkeys(least.tolist()))
        raise ValueError(
            f"quantize: all images are {values} throughout, and what is measured on them holds "
            "for no others: give some dozens of those that the network is for"
        )
    return [_ranges(folded, histograms, form, name, percentile) for name in calibrators]


def _ranges(
    folded: Folded,
    histograms: dict[str, Histogram],
    form: Format,
    calibrator: str,
    percentile: float,
) -> dict[str, Range]:
    found = {}
    for name, histogram in histograms.items():
        chosen = "minmax" if name == IMAGE else calibrator
        found[name] = choose(histogram, chosen, percentile, form.rounding(name))
        if name.endswith(DEPTHWISE) and form.dtype == "int8":
            weight = folded.layers[name[: -len(DEPTHWISE)]].weight[:, 0, 0].double()
            found[name] = _balanced(found[name], weight, histogram.mean_square, form.levels)
    return found


def _balanced(reached: Range, weight: Tensor, mean_square: Tensor, levels: int) -> Range:
    """Wider ranges for channels of a depthwise convolution whose steps are too fine to be of use.

    The 1x1 after it takes up the steps t of its input channels. Those of a channel add the noise
    ``t**2 / 12 * sum(W**2)`` by their own rounding, and ``sum(s**2) / 12 * mean(x**2) / t**2`` by
    that of the weights, of steps s: the sum is least at

        t**4 = sum(s**2) * mean(x**2) / sum(W**2)

    Args:
        reached: ``[C]``.
        weight: ``[C_out, C]``.
        mean_square: ``[C]`` of x.
        levels: in which a range is divided.
    """
    steps = least = (reached.high - reached.low) / levels
    for _ in range(4):  # For s depends on t.
        squares = ((weight * steps).abs().amax(1) / int8.LARGEST).square().sum()
        best = (squares * mean_square / weight.square().sum(0).clamp_min(1e-30)) ** 0.25
        steps = torch.maximum(least, torch.minimum(best, least.max()))
    factor = torch.where(least > 0, steps / least.clamp_min(1e-30), torch.ones_like(steps))
    return Range(reached.low * factor, reached.high * factor)


def _shown(images: Images) -> Iterator[Tensor]:
    """With a bar on a terminal, if there are more than a few."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quick = not sys.stderr.isatty() or 0 < len(images) <= 2
    yield from track(
        images, "calibrating", total=len(images) or None, console=console, disable=quick,
        transient=True,
    )  # fmt: skip
