"""Every kernel of the Hopper convolution, tried: on odd maps, and with many tiles for every CTA.

In a process of its own (:mod:`._apart`), as threads that wait for each other may wait for ever.
Results are held against the reference's as those of any engine (:func:`._engines.conv_trial`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuning
from . import _apart, conv_sm90
from ._engines import conv_trial, input_grad_trial
from .conv_sm90_tiles import WIDTHS, Config, Shape, has_room, kernels

DTYPES = (torch.float16, torch.bfloat16)

_SOURCES = (
    "_engines", "_extension.fields", "conv_sm90", "conv_sm90_tiles", "conv_sm90_trial", "reference",
)  # fmt: skip
_CLUSTERS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2))
_SHARED = (((1, 1), 2), ((1, 1), 7), ((2, 1), 3), ((2, 2), 2))
"""Clusters, and the parts of their tiles."""

_REFUSED = "conv_sm90: cannot "
"""So begin the messages of launches that come to nothing: csrc/cuda/conv_sm90/launch.cu."""

_GUARD = 16  # Channels on either side of a slot.


class Map(NamedTuple):
    """What is convolved.

    Attributes:
        size: images, height and width.
        c_in: input channels of a 3x3 and of a 1x1.
        across: tiles of output channels.
        times: every launch is made so often.
    """

    size: tuple[int, int, int]
    c_in: Mapping[int, int]
    across: int
    times: int


SMALL = Map((3, 9, 21), {3: 24, 1: 456}, across=2, times=1)


def large(processors: int) -> Map:
    """Five tiles of 128 pixels for each processor: each meets stages of its rings many times."""
    height, width = 51, 83
    images = -(-5 * 128 * processors // (height * width))
    return Map((images, height, width), {3: 136, 1: 200}, across=1, times=3)


def sources(function: str) -> tuple[str, ...]:
    """Modules that a verdict depends on (:func:`vovnet_fast.selfcheck.digest`)."""
    return ("_C", *(f"backends.{name}" for name in _SOURCES))


def main() -> None:
    """In the process that tries."""
    _apart.serve(trials)


def trials(given: Mapping[str, Any]) -> _apart.Trials:
    """All of them, on a GPU.

    Args:
        given: see :func:`device_of`.

    Raises:
        Unable: there is no such GPU here.
    """
    device, processors = device_of(given)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for pixels in (SMALL, large(processors)):
        for dtype in DTYPES:
            for block in WIDTHS:
                yield from of_tiles(device, dtype, pixels, block)


def device_of(given: Mapping[str, Any], function: str = "conv_sm90") -> tuple[torch.device, int]:
    """A GPU, and how many processors it has.

    Args:
        given: ``index`` of the GPU, and ``machine``, as :func:`vovnet_fast.tuning.machine` calls it
            in the process that asks.
        function: that the extension must have.

    Raises:
        Unable: there is no such GPU here.
    """
    reason = conv_sm90.missing(function)
    if reason is not None:
        raise _apart.Unable(reason)
    if torch.cuda.device_count() <= given["index"]:
        raise _apart.Unable(f"the process to try it in sees no GPU {given['index']}")
    device = torch.device("cuda", given["index"])
    found = tuning.machine(device)
    if found != given["machine"]:
        raise _apart.Unable(f"the process to try it in sees {found}, not {given['machine']}")
    return device, torch.cuda.get_device_properties(device).multi_processor_count


def of_tiles(device: torch.device, dtype: torch.dtype, pixels: Map, block: int) -> _apart.Trials:
    """Those of tiles with so many output channels, forward and of gradients of inputs."""
    for kernel in (1, 3):
        configs = {config.name: config for config in forms(pixels, block, kernel)}
        for kind, make in (("forward", _forward), ("gradient", _gradient)):
            trial = make(device, dtype, pixels, block, kernel, configs)
            for name, config in configs.items():
                words = f"{name}, {kernel}x{kernel} {kind} of {pixels.size} in {dtype}"
                yield words, functools.partial(made, trial, config, pixels.times)


def forms(pixels: Map, block: int, kernel: int, itemsize: int = 2) -> Iterator[Config]:
    """Every kernel there is with so many channels, in every kind of cluster."""
    n, height, width = pixels.size
    size = (1, height * width) if kernel == 1 else (height, width)
    shape = Shape(n, *size, pixels.c_in[kernel], pixels.across * block, kernel, True, itemsize)
    for alone in kernels(block, itemsize):
        for cluster in _CLUSTERS:
            if cluster[1] <= pixels.across:
                yield dataclasses.replace(alone, cluster=cluster)
        for cluster, parts in _SHARED:
            config = dataclasses.replace(alone, cluster=cluster, parts=parts)
            if cluster[1] <= pixels.across and has_room(config, shape):
                yield config


def made(trial: tuning.Trial, config: Config, times: int) -> str | None:
    """What is wrong with one of so many launches, or None.

    A cluster may be more than a GPU, or the part of one that is there, has room for: what is
    refused does no harm, and is left out by whoever measures it.

    Raises:
        Unable: there is not enough memory.
    """
    try:
        return next(filter(None, (trial(config.name) for _ in range(times))), None)
    except torch.cuda.OutOfMemoryError as error:
        raise _apart.Unable(f"there is no memory to try it in: {error}") from error
    except RuntimeError as error:
        if config.size == 1 or not str(error).startswith(_REFUSED):
            raise
        torch.cuda.synchronize()  # Raises where it was not this launch that failed.
        return None


def _slot(device: torch.device, dtype: torch.dtype, pixels: Map, c: int) -> Tensor:
    """A view whose layout a trial takes over."""
    wide = torch.empty(*pixels.size, c + 2 * _GUARD, dtype=dtype, device=device)
    return wide[..., _GUARD : _GUARD + c]


def _tensors(
    device: torch.device, dtype: torch.dtype, pixels: Map, block: int, kernel: int
) -> tuple[Tensor, Tensor, Tensor]:
    c_in, c_out = pixels.c_in[kernel], pixels.across * block
    x, out = (_slot(device, dtype, pixels, c) for c in (c_in, c_out))
    return x, torch.empty(c_out, kernel, kernel, c_in, dtype=dtype, device=device), out


def _forward(
    device: torch.device,
    dtype: torch.dtype,
    pixels: Map,
    block: int,
    kernel: int,
    configs: Mapping[str, Config],
) -> tuning.Trial:
    def run(name: str, *tensors: Tensor, stride: int, relu: bool, pool: bool) -> Tensor | None:
        return conv_sm90.run_config(configs[name], *tensors, relu=relu, pool=pool)

    tensors = _tensors(device, dtype, pixels, block, kernel)
    return conv_trial(run, *tensors, stride=1, relu=True, pool=True)


def _gradient(
    device: torch.device,
    dtype: torch.dtype,
    pixels: Map,
    block: int,
    kernel: int,
    configs: Mapping[str, Config],
) -> tuning.Trial:
    """Added to what is in the slot, but for the last channels of it, and masked from eight on."""

    def run(
        name: str, g: Tensor, packed: Tensor, out: Tensor, *, stride: int, **views: Any
    ) -> None:
        conv_sm90.run_config(configs[name], g, packed, None, None, out, **views)

    def pack(weight: Tensor, g: Tensor) -> Tensor:
        return weight.permute(3, 1, 2, 0).flip(1, 2).contiguous()

    g, packed, out = _tensors(device, dtype, pixels, block, kernel)
    add, mask = out[..., : out.shape[3] - 8], out[..., 8:]
    return input_grad_trial(run, pack, g, packed, out, stride=1, add=add, mask=mask)
