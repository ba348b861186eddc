"""Depthwise layers of the ``cpu`` backend: a 3x3 by channels, and the 1x1 that follows.

An engine of the extension makes some pixels of the first and multiplies them while they lie in a
near cache (``csrc/cpu/conv_direct.h``, ``conv_gather.h``). The other way is one pass after the
other, through memory. Results are the same to the last bit. Which is faster is measured before the
first layer of a dtype, on one that is the same everywhere, and remembered
(:mod:`vovnet_fast.tuning.processor`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...tuning import processor
from .. import _extension, _steps
from . import convolution, unpacked

TOGETHER, APART = "together", "apart"


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    taps: Tensor,
    spatial: Callable[[], Tensor],
    stride: int = 1,
    relu: bool = True,
    pool: bool = False,
) -> Tensor | None:
    """See :mod:`vovnet_fast.backends`."""
    engine = convolution.choose_engine(x.dtype)
    if (
        not pool
        and out.numel()
        and engine != convolution.ATEN
        and not _unpacked(out, weight, engine)
    ):
        isa = _extension.load("cpu").isa()
        if _way(engine, x.dtype, isa, torch.get_num_threads()) == TOGETHER:
            return convolution.run_engine(
                engine,
                x,
                weight,
                scale,
                shift,
                out,
                stride=stride,
                relu=relu,
                pool=False,
                taps=taps,
            )
    between = _spatial(x, taps, spatial, stride)
    return convolution.conv(between, weight, scale, shift, out, relu=relu, pool=pool)


def depthwise_conv_statistics(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    taps: Tensor,
    spatial: Callable[[], Tensor],
    stride: int = 1,
) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    return convolution.conv_statistics(_spatial(x, taps, spatial, stride), weight, out)


def _spatial(x: Tensor, taps: Tensor, spatial: Callable[[], Tensor], stride: int) -> Tensor:
    between = spatial()
    _extension.CPU.depthwise(x, taps, between, stride=stride)
    return between


def _unpacked(out: Tensor, weight: Tensor, engine: str) -> bool:
    """Whether a training step multiplies the weight of the 1x1 as it lies."""
    if not _steps.training():
        return False
    layer = unpacked.layer_of("convolution of", out, weight, 1, out.dtype)
    return unpacked.faster(layer, engine, convolution.unpacked_trial)


@functools.cache
def _way(engine: str, dtype: torch.dtype, isa: str, threads: int) -> str:
    """How layers run here, which is measured once in a process at most."""
    problem = f"depthwise layers in {dtype} by {engine}, {isa}"
    return processor.choose(
        problem, (TOGETHER, APART), TOGETHER, functools.partial(_trial, engine, dtype)
    )


@torch.inference_mode(False)
def _trial(engine: str, dtype: torch.dtype) -> Callable[[str], None]:
    """Runs a layer like V-19's in either way, and refuses one call that differs from two passes."""
    pixels, channels = 80, 64
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    x, taps = normal(1, pixels, pixels, channels), normal(3, 3, channels)
    weight = normal(channels, 1, 1, channels) / 8
    scale, shift = torch.rand(2, channels, generator=random).unbind()
    between, expected, out = (torch.empty_like(x) for _ in range(3))
    options: dict[str, Any] = dict(stride=1, relu=True, pool=False)
    compared: list[bool] = []

    def apart() -> None:
        _extension.CPU.depthwise(x, taps, between)
        convolution.run_engine(engine, between, weight, scale, shift, expected, **options)

    def run(way: str) -> None:
        if way == APART:
            apart()
            return
        convolution.run_engine(engine, x, weight, scale, shift, out, taps=taps, **options)
        if not compared:
            apart()
            if not torch.equal(out, expected):
                raise RuntimeError("one call gave other results than two passes")
            compared.append(True)

    return run
