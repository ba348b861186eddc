"""Calls of the ``cpu`` backend, kept and made again without Python in between.

A network of seventy launches spends milliseconds in Python on a CPU: views, checks, allocations.
What it asks of the extension is the same for every image of a shape, but for the addresses of
the image and of the features: the calls are recorded once
(:mod:`vovnet_fast.backends.cpu.recording`), and then made by a single call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _environment
from .. import _pages as pages
from ..backends import _extension
from ..backends._extension.fields import pointer
from ..backends.cpu import convolution, recording, winograd
from ..ops._checks import nchw

Stamp = tuple[Any, ...]


class Replay:
    """Runs a network on images of one shape, and from the third time on by its recorded calls.

    What a recording depends on is looked at every time: where the image has other strides, or
    a weight has been written to, the next calls are recorded again. Between image and features
    it keeps the memory that nobody else does; arenas and weights are the caller's to keep. For
    one thread at a time.

    Args:
        at_once: record the first call: it is known that others will be like it.

    Attributes:
        calls: of the extension that are repeated; 0 as long as there is no recording.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.calls, self._at_once = 0, at_once
        self._stamp: Stamp | None = None
        self._recording: _Recording | None = None

    def __call__(
        self, work: Callable[[Tensor], list[Tensor]], image: Tensor, stamp: Stamp | None
    ) -> list[Tensor]:
        """Features of an image, ``[N, C, H, W]`` in ``channels_last``, each in new memory.

        Args:
            work: makes them, always in the same memory but for the features; all are
                ``[N, H, W, C]`` views.
            image: ``[N, H, W, C]`` view.
            stamp: what a recording of ``work`` depends on (:func:`stamp`), None if not known.
        """
        if stamp is None or stamp != self._stamp:
            self.calls, self._stamp, self._recording = 0, stamp, None
            if stamp is None or not self._at_once:
                return list(map(nchw, work(image)))
        if self._recording is None:
            features, self._recording = _record(work, image)
            self.calls = len(self._recording.calls or ())
        elif self._recording.calls is None:
            features = work(image)
        else:
            return self._recording.repeat(image)
        return list(map(nchw, features))


_version = operator.attrgetter("_version")


def stamp(image: Tensor, weights: Sequence[Tensor]) -> Stamp | None:
    """What a recording depends on: it holds for as long as this is the same.

    None where it cannot be known, because tensors made in inference mode do not count what is
    written to them, or where there is nothing to compute.

    Args:
        image: ``[N, H, W, C]`` view.
        weights: all tensors that the calls read beside it.
    """
    if image.numel() == 0:
        return None
    if _environment.flag("CHECK"):  # It looks at weights when they are used.
        return None
    addresses = list(map(Tensor.data_ptr, weights))
    try:
        versions = list(map(_version, weights))
    except RuntimeError:  # One was made in inference mode, which is cheaper not to ask.
        return None
    dtype = image.dtype
    return image.shape, image.stride(), dtype, engines(dtype), addresses, versions


def engines(dtype: torch.dtype) -> tuple[Any, ...]:
    """What decides, beside shapes, by which engines activations of a dtype are computed now."""
    return (
        convolution.choose_engine(dtype),
        _extension.load("cpu").isa(),
        winograd.largest_side(),
        torch.are_deterministic_algorithms_enabled(),  # Then by rules, not by measurement.
    )


class _Recording(NamedTuple):
    """Calls that made features.

    Attributes:
        calls: the extension's ``Recording``, which takes the addresses of image and features.
            None where not all of the work was the extension's: ATen's convolutions, for
            dtypes or processors without an engine, cannot be repeated so.
        features: shape, strides and dtype of each, ``[N, C, H, W]``.
        kept: memory that the calls write and read.
    """

    calls: Any
    features: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    kept: list[Tensor]

    def repeat(self, image: Tensor) -> list[Tensor]:
        features = [
            pages.advise(torch.empty_strided(shape, strides, dtype=dtype, device=image.device))
            for shape, strides, dtype in self.features
        ]
        addresses = [pointer("image", image), *(pointer("feature", each) for each in features)]
        self.calls.run(torch.get_num_threads(), addresses)
        return features


def _record(
    work: Callable[[Tensor], list[Tensor]], image: Tensor
) -> tuple[list[Tensor], _Recording]:
    features, found = recording.record(lambda: work(image))
    if not found.complete or not all(feature.is_contiguous() for feature in features):
        return features, _Recording(None, [], [])
    own = {feature.untyped_storage().data_ptr() for feature in features}
    kept = [t for t in found.allocated if t.untyped_storage().data_ptr() not in own]
    found.calls.move([recording.extent(tensor) for tensor in (image, *features)])
    forms = [(view.shape, view.stride(), view.dtype) for view in map(nchw, features)]
    return features, _Recording(found.calls, forms, kept)
