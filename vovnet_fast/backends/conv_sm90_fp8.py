"""The convolution of :mod:`.conv_sm90` in e4m3, as an engine of networks in fp8.

Products are summed from zero for a tap and 128 input channels, and added in fp32, since tensor
cores keep some 14 bits of what they sum. A byte of activations takes half the copies of fp16, and
products are twice as fast, so that tiles ask as much of L2 as they do there. What registers hold
twice are sums: 256 pixels by 128 channels is the largest tile.

It is on offer as :mod:`.conv_sm90` is: where all of its own kernels have been held against the
arithmetic in a process of their own (:mod:`.conv_sm90_fp8_trial`). What is chosen for a layer is
held against it for that layer's sizes as well (:mod:`vovnet_fast.tuning`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arithmetic import fp8
from ..arithmetic.layers import QuantizedConv
from ..compat import zip
from . import _extension, conv_sm90
from ._extension.fields import packed, pointer, view
from .conv_sm90 import NAME, Config, Launch, config_of, configs
from .conv_sm90_tiles import Shape, splits, tiles_of
from .conv_sm90_verdict import IN_FP8

__all__ = [
    "IN_FP8", "NAME", "engines", "plan", "refusal", "run", "run_config", "why_not",
]  # fmt: skip

_ALIGNMENT = 16  # Bytes; of what bulk copies fetch, and of stores.
_PIXEL_LIMIT = 2**30  # Tiles are counted in 32 bits, and any tile has a pixel.


def why_not(device: torch.device) -> str | None:
    """The reason why nothing at all is offered on ``device``, or None."""
    return fp8.why_not() or conv_sm90.why_not(device, IN_FP8, "conv_sm90_fp8")


def refusal(
    x: Tensor, weight: Tensor, out: Tensor | None, feature: Tensor | None, *, stride: int = 1
) -> str | None:
    """The reason why the kernel cannot take these arguments of :func:`run`, or None.

    Bulk copies, and stores of whole vectors, want addresses and strides that are multiples of 16
    bytes; a copy does not repeat a pixel (stride 0).
    """
    c_out, kernel, _, c_in = weight.shape
    if x.dtype != fp8.ACTIVATION or weight.dtype != fp8.ACTIVATION:
        return f"no kernel for {x.dtype} with weights in {weight.dtype}, only for e4m3"
    if stride != 1 or kernel not in (1, 3):
        return f"no kernel {kernel} with stride {stride}"
    if not configs(c_out, kernel, 1):
        return f"no tiles for {c_out} output channels, only for multiples of 16 from 64 on"
    if c_in % _ALIGNMENT:
        return f"{c_in} input channels are no multiple of {_ALIGNMENT}"
    views = (("x", x), ("weight", weight.flatten(1)), ("out", out), ("feature", feature))
    for name, each in views:
        if each is None:
            continue
        if each.data_ptr() % _ALIGNMENT:
            return f"{name} does not start at a multiple of {_ALIGNMENT} bytes"
        steps = [s for s, size in zip(each.stride(), each.shape, strict=True) if size > 1]
        if any(step < 1 or step * each.element_size() % _ALIGNMENT for step in steps[:-1]):
            return f"{name} has strides {each.stride()}: no multiples of {_ALIGNMENT} bytes"
    if x.shape[:3].numel() >= _PIXEL_LIMIT:
        return f"{x.shape[:3].numel()} pixels are counted in 64 bits"
    return None


def engines(
    x: Tensor, weight: Tensor, out: Tensor | None, feature: Tensor | None, *, stride: int = 1
) -> list[str]:
    """Names of what is on offer for these arguments of :func:`run`, largest tile first.

    Those whose CTAs share a tile come last, where the map is too small for the GPU.
    """
    if x.dtype != fp8.ACTIVATION or why_not(x.device) is not None:
        return []
    if refusal(x, weight, out, feature, stride=stride) is not None:
        return []
    return _names(x, weight)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _names(x: Tensor, weight: Tensor) -> list[str]:
    c_out, kernel, _, c_in = weight.shape
    n, height, width, _ = x.shape
    size = (1, height * width) if kernel == 1 else (height, width)
    # With pool partials or not, the same are on offer.
    shape = Shape(n, *size, c_in, c_out, kernel, pool=True, itemsize=1)
    found = (*configs(c_out, kernel, 1), *splits(shape, _processors(x.device)))
    return [config.name for config in found]


def plan(
    config: Config, x: Tensor, layer: QuantizedConv, out: Tensor | None, feature: Tensor | None
) -> Launch:
    """Decide the launch of :func:`run`. Nothing may be empty.

    A 1x1 convolution sees an image as one row, where the layout allows it.
    """
    n, height, width, c_in = x.shape
    weight = layer.weight
    c_out, kernel = weight.shape[:2]
    size, vector = (n, height, width, c_out), torch.float32
    views = {
        "x": view("x", x, weight, n, height, width, c_in),
        "out": view("out", out, x, *size),
        "feature": view("feature", feature, layer.bias, *size),
    }
    written = [each for each in (x, out, feature) if each is not None]
    raster = all(each.stride(1) == width * each.stride(2) for each in written)
    if kernel == 1 and (raster or height == 1):
        height, width = 1, height * width
    tile = config.tile(height, width, kernel)
    fields = dict(
        **views,
        weight=packed("weight", weight, x.dtype, c_out, kernel, kernel, c_in),
        bias=packed("bias", layer.bias, vector, c_out),
        multiplier=packed("multiplier", layer.multiplier, vector, c_out),
        unit=packed("unit", layer.unit, vector, c_out),
        n=n, height=height, width=width, c_in=c_in, c_out=c_out, kernel=kernel,
        tile_h=tile[0], tile_w=tile[1], block_out=config.block_out,
        cluster_pixels=config.cluster[0], cluster_channels=config.cluster[1], parts=config.parts,
    )  # fmt: skip
    return Launch(fields, tiles_of(height, width, tile) * config.parts)


def run(
    engine: str,
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    feature: Tensor | None = None,
    pool: bool = False,
) -> Tensor | None:
    """What :func:`vovnet_fast.arithmetic.fp8.conv` computes with stride 1, summed in fp32.

    Args:
        engine: a name that :func:`engines` gave for these arguments.
        x: ``[N, H, W, C_in]`` view in e4m3.
        layer: its ``weight``, ``bias``, ``multiplier`` and ``unit`` are read.
        out: ``[N, H, W, C_out]`` view in e4m3, or None. Nothing outside it is written.
        feature: the same in fp32, or None. Not both are.
        pool: return partial sums of ``out``, ``[N, T, C_out]`` in fp32; only with ``out``.
    """
    c_out, kernel = layer.weight.shape[:2]
    config = config_of(engine, c_out, kernel, 1)
    assert config is not None, f"no engine {engine} for {c_out} output channels"
    return run_config(config, x, layer, out, feature=feature, pool=pool)


def run_config(
    config: Config,
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    feature: Tensor | None,
    pool: bool,
) -> Tensor | None:
    """The same in tiles that need not be on offer."""
    c_out = layer.weight.shape[0]
    assert out is not None or not pool, "pool partials are sums of out, which is None"
    launch = plan(config, x, layer, out, feature)
    partials = layer.bias.new_empty(x.shape[0], launch.tiles, c_out) if pool else None
    address = None if partials is None else pointer("pool_partials", partials)
    _launch(x.device, pool_partials=address, **launch.fields)
    return partials


def _launch(device: torch.device, **fields: Any) -> None:
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        _extension.load("cuda").conv_sm90_fp8(stream, **fields)
