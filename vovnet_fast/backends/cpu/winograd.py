"""Which convolutions of the ``cpu`` backend are Winograd's (``csrc/cpu/conv_winograd.h``).

A 3x3 layer in fp32 with a stride of 1 takes 2.25 times fewer products in tiles of 2x2 outputs, and
4 times fewer in tiles of 4x4, than by its definition. The transformed weight is 1.8 or 4 times as
large, so that maps need to have pixels enough to pay for reading it, and weights to last: of those
that change at every step it would have to be made anew. Frozen networks say that theirs do
(:func:`lasting`).

Errors are rounding's. Against fp64, those of 2x2 tiles are as large as those of the extension's
other engines, and smaller than plain PyTorch's on a CPU; those of 4x4 tiles were 0.7 to 1.8 times
as large as PyTorch's, the more the fewer channels are summed. ``VOVNET_FAST_WINOGRAD`` is the
largest side that is used: ``0``, ``2`` or ``4``, the default. An infinity or NaN spreads over its
tiles, where otherwise it reaches its neighbours only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import _environment
from ...tuning import processor
from .. import _extension

SIDES = {"winograd2": 2, "winograd4": 4}
"""Of the tiles of outputs, by the engine's name."""

_FEWEST = {"winograd2": 192, "winograd4": 1024}
"""Pixels of all maps that pay for a transformed weight."""

_CHANNELS = {"winograd2": 32, "winograd4": 80}
"""Fewer of them, on either side, do not pay for transforming inputs and outputs. In tiles of 4x4
the sums of fewer of them would have more than twice the error of PyTorch's: 2.2 times of 64."""

_lasting = WeakTensorKeyDictionary()


def lasting(weights: Iterable[Tensor]) -> None:
    """Say of weights that they are used many times before they change."""
    for weight in weights:
        if not weight.is_inference():  # What is written to it is not counted.
            _lasting[weight] = True


def largest_side() -> int:
    """The largest side of a tile that the environment allows, 0 for none."""
    return _environment.number("WINOGRAD", "4")


def choose(
    x: Tensor,
    weight: Tensor,
    stride: int,
    trial: Callable[[], Callable[[str], None]],
    otherwise: str,
) -> str:
    """The engine of one convolution, which does not say what is in the image.

    Args:
        x: ``[N, H, W, C_in]``.
        weight: ``[C_out, K, K, C_in]``.
        stride: 1 or 2.
        trial: makes what runs an engine by name on some layer.
        otherwise: the engine where Winograd's does not pay.

    Returns:
        ``winograd2``, ``winograd4`` or ``otherwise``.
    """
    c_out, kernel, _, c_in = weight.shape
    if kernel != 3 or stride != 1 or x.dtype != torch.float32:
        return otherwise
    if weight not in _lasting or not _extension.load("cpu").conv_winograd_runs():
        return otherwise
    pixels, side = x.shape[0] * x.shape[1] * x.shape[2], largest_side()
    channels = min(c_in, c_out)
    found = [
        name
        for name in SIDES
        if SIDES[name] <= side and _FEWEST[name] <= pixels and _CHANNELS[name] <= channels
    ]
    if not found:
        return otherwise
    if torch.are_deterministic_algorithms_enabled():
        return found[-1]
    best = _fastest(_extension.load("cpu").isa(), otherwise, trial)
    return otherwise if best == otherwise else min(found[-1], best, key=SIDES.__getitem__)


@functools.cache
def _fastest(isa: str, otherwise: str, trial: Callable[[], Callable[[str], None]]) -> str:
    """Measured once in a process at most, on one layer."""
    names = (*reversed(SIDES), otherwise)
    return processor.choose(f"Winograd's convolution, {isa}", names, names[0], trial)
