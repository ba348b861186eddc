"""The convolution of :mod:`.conv_sm90` in e4m3, as an engine of networks in fp8.

Products are summed from zero for a tap and 128 input channels, and added in fp32, since tensor
cores keep some 14 bits of what they sum. A byte of activations takes half the copies of fp16, and
products are twice as fast, so that tiles ask as much of L2 as they do there. What registers hold
twice are sums: 256 pixels by 128 channels is the largest tile.

Where :mod:`.conv_sm90` is on offer, so is this, once :func:`conv` has been held against the
arithmetic there (:mod:`vovnet_fast.selfcheck.eight_bits`); what is chosen for a layer is held
against it for that layer's sizes before (:mod:`vovnet_fast.tuning`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import selfcheck, tuning
from ..arithmetic import fp8
from ..arithmetic.layers import QuantizedConv
from ..compat import zip
from . import _extension, conv_sm90
from ._extension.fields import packed, pointer, view
from .conv_sm90 import NAME, Config, Launch, config_of, configs
from .conv_sm90_tiles import Shape, splits, tiles_of

__all__ = ["IN_FP8", "NAME", "conv", "engines", "plan", "refusal", "run", "sources", "why_not"]

IN_FP8 = f"{NAME} in fp8"
"""What it is called beside that of fp16 and bf16."""

_ALIGNMENT = 16  # Bytes; of what bulk copies fetch, and of stores.
_PIXEL_LIMIT = 2**30  # Tiles are counted in 32 bits, and any tile has a pixel.


def sources(function: str) -> tuple[str, ...]:
    """Modules of this package that compute :func:`conv`; as those of :mod:`.cuda`."""
    return "backends.conv_sm90_fp8", "backends.conv_sm90_tiles", "_C"


def why_not(device: torch.device) -> str | None:
    """The reason why nothing at all is offered on ``device``, or None."""
    reason = conv_sm90.why_not(device) or fp8.why_not()
    if reason is None and not hasattr(_extension.load("cuda"), "conv_sm90_fp8"):
        return "the extension was built from older sources: build it again"
    return reason


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
    if refusal(x, weight, out, feature, stride=stride) is not None or not _checked(x.device):
        return []
    return _names(x, weight)


_verdicts: dict[torch.device, bool] = {}  # It is asked at every launch.


def _checked(device: torch.device) -> bool:
    """Whether it computed right numbers, which is found out unless nothing may be measured now."""
    if device not in _verdicts:
        assert fp8.ACTIVATION is not None
        subject = __name__.rpartition(".")[2], device, fp8.ACTIVATION, ("conv",)
        if tuning.only_static() or _capturing():
            return bool(selfcheck.remembered(*subject))
        _verdicts[device] = selfcheck.trusted(*subject)
    return _verdicts[device]


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


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


def conv(
    x: Tensor,
    layer: QuantizedConv,
    out: Tensor | None,
    *,
    levels: int = fp8.LARGEST,
    feature: Tensor | None = None,
    pool: bool = False,
) -> Tensor | None:
    """See :func:`vovnet_fast.arithmetic.fp8.conv`; on an engine by itself, to be checked.

    A 3x3 in the largest tile, a 1x1 in parts where the map is small enough for that.

    Raises:
        ValueError: the kernel cannot take the arguments.
    """
    stride = 1 if layer.depthwise is not None else layer.stride
    reason = refusal(x, layer.weight, out, feature, stride=stride)
    if reason is not None:
        raise ValueError(reason)
    names = _names(x, layer.weight)
    engine = names[0] if layer.weight.shape[1] > 1 else names[-1]
    return run(engine, x, layer, out, feature=feature, pool=pool and out is not None)
