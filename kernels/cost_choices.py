"""Which configurations a layer may take, and which of them it takes where nothing was measured."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from .conv_config import ConvConfig, candidates
from .conv_eight_bits_config import candidates as eight_bit_candidates
from .conv_weight_grad_config import WeightGradConfig
from .conv_weight_grad_config import candidates as weight_grad_candidates
from .cost_model import WEIGHT_GRAD, Layer, Prediction
from .cost_work import predict
from .device import Device

TIE = 1.05
"""By a smaller factor predictions do not differ: they know no better."""

SIZES = (1 << 20, 1 << 16, 1 << 13, 1 << 11)
"""Pixels of the maps whose choices stand for all: from a batch's largest to one image's least."""

STEADY = 1.25
"""By this factor a configuration must be faster than the favourites before it: at one of
:data:`SIZES` to become one, and at a layer's size to be taken instead."""

FAVOUR = 2.0
"""By this factor any other must be faster than a favourite, to be taken in its place."""

_ASPECT = 0.6  # Height over width of their maps.


@functools.cache  # Asked for at every launch.
def configurations(layer: Layer, capability: tuple[int, int]) -> tuple[Any, ...]:
    """The shipped configurations that can compute a layer, in one order for all layers."""
    if layer.precision == "int8" or layer.precision == "fp8":
        return eight_bit_candidates(
            capability, layer.c_in, layer.c_out, layer.precision,
            kernel=layer.kernel, tma=layer.tma, both=layer.added > 0,
        )  # fmt: skip
    options: dict[str, Any] = dict(
        kernel=layer.kernel, dtype=layer.dtype, tf32=layer.tf32, tma=layer.tma
    )
    if layer.kind == WEIGHT_GRAD:
        return tuple(weight_grad_candidates(capability, layer.c_in, layer.c_out, **options))
    options["kind"] = layer.kind
    return tuple(candidates(capability, layer.c_in, layer.c_out, **options))


@functools.lru_cache(256)  # What is made of them is kept, which is less.
def predictions(layer: Layer, device: Device) -> tuple[Prediction, ...]:
    """Of all :func:`configurations`, in their order."""
    return tuple(predict(c, layer, device) for c in configurations(layer, device.capability))


def _canonical(config: ConvConfig | WeightGradConfig) -> tuple[Any, ...]:
    """Sorts configurations by how many layers and sizes they are good for, the most first."""
    pixels = config.pixels if isinstance(config, ConvConfig) else _MIDDLE
    persistent = isinstance(config, ConvConfig) and config.persistent
    distance = abs(math.log2(pixels / _MIDDLE))
    return persistent, config.form == "pointer", distance, -sum(config.block_out)


_MIDDLE = 128  # Pixels of a tile.


def _tied(seconds: Sequence[float], factor: float, order: Callable[[int], Any]) -> list[int]:
    """Positions of what takes up to ``factor`` as long as the best, in some order; the others."""
    limit = min(seconds) * factor
    tied = [i for i, one in enumerate(seconds) if one <= limit]
    others = [i for i, one in enumerate(seconds) if one > limit]
    return sorted(tied, key=order) + sorted(others, key=lambda i: seconds[i])


def _sized(layer: Layer, pixels: int) -> Layer:
    """The same layer of one image of so many pixels."""
    height = 1 if layer.height == 1 else round((pixels * _ASPECT) ** 0.5)
    return dataclasses.replace(layer, batch=1, height=height, width=round(pixels / height))


@functools.cache
def _favourites(layer: Layer, device: Device) -> tuple[int, ...]:
    """Positions in :func:`configurations` of a few that are good for all :data:`SIZES`."""
    shipped = configurations(layer, device.capability)
    found: list[int] = []
    for pixels in SIZES:
        sized = _sized(layer, pixels)
        seconds = [predict(config, sized, device).seconds for config in shipped]
        if not found or min(seconds[i] for i in found) > STEADY * min(seconds):
            found.append(_tied(seconds, TIE, lambda i: (*_canonical(shipped[i]), i))[0])
    return tuple(found)


@functools.cache
def ranked(layer: Layer, device: Device) -> tuple[int, ...]:
    """Positions in :func:`configurations`, the best by prediction for the layer's size first.

    A few that are good for all sizes are favoured, the first of them most, so that images of
    many sizes share compiled kernels.
    """
    favourites = _favourites(_sized(layer, SIZES[0]), device)
    seconds = [one.seconds for one in predictions(layer, device)]
    favoured = [favourites[i] for i in _tied([seconds[i] for i in favourites], STEADY, lambda i: i)]
    others = sorted(set(range(len(seconds))) - set(favourites), key=lambda i: (seconds[i], i))
    faster = [i for i in others if FAVOUR * seconds[i] < seconds[favoured[0]]]
    return (*faster, *favoured, *others[len(faster) :])


def static_choice(layer: Layer, device: Device) -> Any:
    """The configuration that is taken where nothing was measured.

    It is that of the very size, although measured choices are remembered by sizes up to a power
    of two (:func:`vovnet_fast.backends._engines.problem`): the last wave of a small image may be
    a third of its time, and what is good for one size of such a family may be half as
    fast for another. What that costs in kernels, :data:`STEADY` and :data:`FAVOUR` keep small.
    """
    return configurations(layer, device.capability)[ranked(layer, device)[0]]


def choices(layer: Layer, device: Device) -> tuple[list[Any], Any]:
    """All :func:`configurations` of a layer, and the :func:`static_choice`."""
    return list(configurations(layer, device.capability)), static_choice(layer, device)
