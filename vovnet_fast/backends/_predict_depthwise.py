"""Predicted times of the engines of a depthwise layer. Triton is imported on first use."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .. import tuning
from . import _predict, conv_sm80, depthwise_conv
from ._engines import ATEN
from .depthwise_conv import SEPARATE

if TYPE_CHECKING:
    from ..kernels.conv_config import Kind
    from ..kernels.cost import Layer, Prediction
    from ..kernels.device import Device

_COPY_INSTRUCTIONS = 12  # For 16 bytes: addresses and masks. As of conv_sm80.

_WIDENING = 1.5
"""Instructions of the depthwise part for each of its multiply-adds. From the compiled loops,
roughly: loads and conversions are shared by the pixels of a run."""


def _fused(name: str, layer: Layer, stride: int, device: Device) -> Prediction:
    """A step is 64 bytes of channels: its strip, its taps, and its share of the 1x1.

    ``layer`` is the 1x1, ``stride`` of the depthwise convolution before it.
    """
    from ..kernels._common import cdiv
    from ..kernels.cost import Work, predict_work
    from ..kernels.resources import Resources

    config = next(c for c in depthwise_conv.configs(layer.c_out) if c.name == name)
    itemsize, row, pixels = layer.dtype.itemsize, depthwise_conv.ROW_BYTES, depthwise_conv.PIXELS
    tile = config.tile(layer.height, layer.width, stride)
    tiles = layer.batch * conv_sm80.tiles_of(layer.height, layer.width, tile)
    strip = conv_sm80.strip_rows(tile, 3, stride)
    copied = (strip + depthwise_conv.TAPS + config.block_out) * row
    sums, channels = pixels * config.block_out, row // itemsize
    # A run is two pixels: three columns of four lines, or five, and the taps; then two are stored.
    lines = 4 if stride == 1 else 5
    units = pixels // 2 * (3 * lines + depthwise_conv.TAPS + 2) * row
    read = (2 * pixels + 4 * config.block_out) * row
    multiply_adds = pixels * channels * depthwise_conv.TAPS
    # Processors of sm_80 have half as many lanes of fp32 as they issue instructions for.
    slow = 2 if device.capability == (8, 0) else 1
    products = sums * channels / (16 * 8 * 32 / itemsize) * 32
    share = _predict.SM80_SHARE if device.capability[0] in (9, 10) else 1.0
    left = {"statistics": 3, "forward": 0}[layer.kind]
    read_once = layer.pixels * stride**2 * layer.c_in * itemsize
    written = layer.pixels * layer.c_out * itemsize
    weights = (layer.weight_elements + depthwise_conv.TAPS * layer.c_in) * itemsize
    stages = config.stages(tile, stride, device.capability) or depthwise_conv.STAGES[-1]
    work = Work(
        programs=tiles * (layer.c_out // config.block_out),
        steps=cdiv(layer.c_in * itemsize, row) + 1,
        flop=round(2 * sums * channels / share),
        copied=copied,
        shared=copied + units + read,
        instructions=multiply_adds * _WIDENING * slow
        + 1.5 * products
        + copied / 16 * _COPY_INSTRUCTIONS,
        last_instructions=sums * (10 if layer.kind == "statistics" else 6),
        last_bytes=sums * itemsize,
        stages=stages,
        compulsory=read_once + written + weights + 4 * left * tiles * layer.c_out,
    )
    registers = 128 if config.block_out <= 128 else 227
    shared = config.shared_bytes(tile, stride, stages)
    resources = Resources(warps=conv_sm80.WARPS, registers=registers, shared=shared)
    return predict_work(name, work, device, _predict.sm80_precision(layer), resources)


def _separate(name: str, layer: Layer, stride: int, device: Device) -> Prediction:
    """A pass that memory limits, then the fastest 1x1."""
    from ..kernels.cost import LAUNCH, Prediction

    itemsize = layer.dtype.itemsize
    moved = (stride**2 + 1) * layer.pixels * layer.c_in * itemsize
    names = (ATEN, *(config.name for config in conv_sm80.configs(layer.c_out)))
    pointwise = min((_predict.library(n, layer, device) for n in names), key=lambda p: p.seconds)
    dram = moved / device.dram
    return Prediction(
        name,
        dram + LAUNCH + pointwise.seconds,
        compute=pointwise.compute,
        dram=dram + pointwise.dram,
        launch=LAUNCH + pointwise.launch,
    )


def predict(name: str, layer: Layer, stride: int, device: Device) -> Prediction:
    """Time of an engine of a depthwise layer.

    Args:
        name: of one of :func:`.depthwise_conv.configs`, or of two passes.
        layer: the 1x1, whose size is that of the output's map.
        stride: of the depthwise convolution.
        device: where it runs.
    """
    fused = name.startswith(depthwise_conv.NAME)
    return (_fused if fused else _separate)(name, layer, stride, device)


@functools.lru_cache(1 << 13)
def _candidates(
    layer: Layer, stride: int, device: Device, own: tuple[str, ...]
) -> tuning.Candidates:
    seconds = {name: predict(name, layer, stride, device).seconds for name in (SEPARATE, *own)}
    best = min(own, key=lambda name: seconds[name])
    return tuning.Candidates(seconds, (SEPARATE, best))


def candidates(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    own: list[str],
    *,
    stride: int,
    tf32: bool,
    kind: Kind,
) -> tuning.Candidates:
    """All engines, for the tuner; two passes, and the best of ours, are measured."""
    from ..kernels import device
    from ..kernels.cost import Layer

    c_out, _, _, c_in = weight.shape
    n, height, width, _ = out.shape
    layer = Layer(
        n, height, width, c_in, c_out, kernel=1, dtype=x.dtype, tf32=tf32, tma=False, kind=kind
    )  # fmt: skip
    return _candidates(layer, stride, device.of(x.device), tuple(own))
