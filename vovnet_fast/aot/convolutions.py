"""The convolutions to compile: layers of the published networks, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .job import Job, capability, meta

if TYPE_CHECKING:
    from ..kernels._common import Launch
    from ..kernels.conv_config import ConvConfig


def _conv_job(
    config: ConvConfig,
    c_in: int,
    c_out: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    dtype: torch.dtype = torch.float16,
    tf32: bool = False,
    essential: bool = True,
) -> Job:
    """A convolution of a slot of a concat buffer into the next; a 1x1 pools, as in a block."""
    from ..kernels import conv

    height, width = 50, 84
    buffer = meta(2, height, width, c_in + 5 * max(c_out, 16), dtype=dtype)
    x = buffer[..., :c_in] if c_in > 3 else meta(2, height, width, c_in, dtype=dtype)
    out_size = conv.output_size(height, width, kernel, stride)
    out = meta(2, *out_size, c_in + 5 * max(c_out, 16), dtype=dtype)[..., c_in : c_in + c_out]
    if c_in == 3:
        out = meta(2, *out_size, c_out, dtype=dtype)
    weight = meta(c_out, kernel, kernel, c_in, dtype=dtype)
    vector = meta(c_out, dtype=torch.float32)
    pool = None
    if kernel == 1:
        tiles = conv.pool_tiles(x, weight, out, stride=stride, tf32=tf32, config=config)
        pool = meta(2, tiles, c_out, dtype=torch.float32)
    launch = conv.plan(
        x, weight, vector, vector, out,
        stride=stride, pool_partials=pool, tf32=tf32, config=config,
    )  # fmt: skip
    precision = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    layer = f"{c_in}>{c_out} {kernel}x{kernel}/{stride} {precision}"
    return Job("conv", layer, config.name, launch, essential)


LAYERS: tuple[tuple[int, int, int, int], ...] = (
    # C_in, C_out, kernel, stride: layers of the specs that together meet every configuration.
    (3, 64, 3, 2),
    (64, 64, 3, 1),
    (128, 128, 3, 1),
    (192, 192, 3, 1),
    (160, 160, 3, 1),
    (224, 224, 3, 1),
    (768, 256, 1, 1),
    (1056, 512, 1, 1),
    (80, 80, 3, 1),
    (96, 96, 3, 1),
    (112, 112, 3, 1),
    (64, 128, 3, 2),
    (496, 256, 1, 1),
    (672, 384, 1, 1),
    (1472, 768, 1, 1),
    (1888, 1024, 1, 1),
    (768, 224, 3, 1),
    (512, 192, 3, 1),
    (64, 64, 1, 1),
    (80, 80, 1, 1),
)


def _bulk_copies(channels: int, stride: int, tf32: bool) -> bool:
    """Whether they can fetch a layer's input."""
    from ..kernels._triton import ROUNDS_TO_TF32, TensorDescriptor

    if TensorDescriptor is None:
        return False
    return stride == 1 and channels >= 16 and (ROUNDS_TO_TF32 or not tf32)


def _conv_jobs(capability: tuple[int, int]) -> Iterator[Job]:
    from ..kernels.conv_config import candidates

    halves = (torch.float16, torch.bfloat16)
    variants = [(dtype, False) for dtype in halves] + [(torch.float32, t) for t in (True, False)]
    seen = set()
    for dtype, tf32 in variants:
        for c_in, c_out, kernel, stride in LAYERS:
            tma = _bulk_copies(c_in, stride, tf32)
            for config in candidates(
                capability, c_in, c_out, kernel=kernel, dtype=dtype, tf32=tf32, tma=tma
            ):
                # The two half precisions compile to the same code but for the type.
                key = (config, kernel, dtype.itemsize, tf32)
                yield _conv_job(
                    config, c_in, c_out,
                    kernel=kernel, stride=stride, dtype=dtype, tf32=tf32,
                    essential=key not in seen,
                )  # fmt: skip
                seen.add(key)


def _statistics_launch(
    config: ConvConfig, layer: tuple[int, int, int, int], dtype: torch.dtype, tf32: bool
) -> Launch:
    """A raw convolution and its statistics, from a slot."""
    from ..kernels import conv

    c_in, c_out, kernel, stride = layer
    channels = c_in if c_in == 3 else c_in + 5 * max(c_out, 16)
    x = meta(2, 50, 84, channels, dtype=dtype)[..., :c_in]
    out = meta(2, *conv.output_size(50, 84, kernel, stride), c_out, dtype=dtype)
    weight = meta(c_out, kernel, kernel, c_in, dtype=dtype)
    options: dict[str, Any] = dict(stride=stride, tf32=tf32, config=config)
    tiles = conv.pool_tiles(x, weight, out, **options)
    statistics = meta(2, tiles, 3, c_out, dtype=torch.float32)
    return conv.plan(x, weight, None, None, out, relu=False, statistics=statistics, **options)


def _input_grad_launch(
    config: ConvConfig,
    layer: tuple[int, int, int, int],
    dtype: torch.dtype,
    tf32: bool,
    *,
    channels: int,
) -> Launch:
    """The gradient of a layer's input, in its slot, added to and masked in so many channels."""
    from ..kernels import conv

    c_in, c_out, kernel, stride = layer
    small = conv.output_size(50, 84, kernel, stride)
    g = meta(2, *small, c_out + 16, dtype=dtype)[..., :c_out]
    slots = meta(2, 50, 84, c_in + 5 * c_out, dtype=dtype)
    out = slots[..., :c_in]
    add, mask = (out[..., :channels], out[..., -channels:]) if channels else (None, None)
    packed = meta(c_in, kernel, kernel, c_out, dtype=dtype)
    return conv.plan_input_grad(
        g, packed, out, stride=stride, add=add, mask=mask, tf32=tf32, config=config
    )


_ADDED_AND_MASKED: dict[str, tuple[tuple[str, Callable[[int], int]], ...]] = {
    # Of a number of channels, those that an input gradient is added to and masked in.
    "gradient": (("", lambda channels: channels), (", half", lambda channels: channels // 2)),
    "forward": ((", none", lambda channels: 0),),
}


def _conv_training_jobs(capability: tuple[int, int]) -> Iterator[Job]:
    """Statistics, and input gradients with and without ``add`` and ``mask``.

    Their loops are those of :func:`_conv_jobs`, and only their epilogues are new: of
    configurations that differ in anything but their accumulators one is essential.
    """
    from ..kernels.conv_config import Kind, candidates

    variants = ((torch.float16, False), (torch.float32, True), (torch.float32, False))
    kinds: tuple[Kind, ...] = ("statistics", "gradient", "forward")
    seen = set()
    for dtype, tf32 in variants:
        precision = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        for layer, kind in itertools.product(LAYERS, kinds):
            c_in, c_out, kernel, stride = layer
            # A product of the gradient of the output is as wide as the input.
            k, width = (c_in, c_out) if kind == "statistics" else (c_out, c_in)
            if width == 3:  # Nobody asks for the gradient of an image.
                continue
            text = f"{k}>{width} {kernel}x{kernel}/{stride} {precision}"
            for config in candidates(
                capability, k, width,
                kernel=kernel, dtype=dtype, tf32=tf32, tma=_bulk_copies(k, stride, tf32),
                kind=kind,
            ):  # fmt: skip
                arguments = (config, layer, dtype, tf32)
                accumulators = (config.form, config.pixels, config.block_out, config.persistent)
                key = (kind, stride, *accumulators)
                essential = key not in seen and kind != "forward"
                seen.add(key)
                if kind == "statistics":
                    launch = _statistics_launch(*arguments)
                    yield Job("conv statistics", text, config.name, launch, essential)
                    continue
                for note, channels in _ADDED_AND_MASKED[kind]:
                    launch = _input_grad_launch(*arguments, channels=channels(c_in))
                    kept = essential and not note
                    yield Job("conv input gradient", text + note, config.name, launch, kept)


def _conv_weight_grad_jobs(capability: tuple[int, int]) -> Iterator[Job]:
    """Main passes of weight gradients, from slots.

    In fp32 configurations that differ in their output channels only count as one.
    """
    from ..kernels import conv, conv_weight_grad

    variants = ((torch.float16, False), (torch.float32, True), (torch.float32, False))
    seen = set()
    for (dtype, tf32), layer in itertools.product(variants, LAYERS):
        c_in, c_out, kernel, stride = layer
        precision = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        channels = c_in if c_in == 3 else c_in + 5 * c_out
        x = meta(2, 50, 84, channels, dtype=dtype)[..., :c_in]
        size = conv.output_size(50, 84, kernel, stride)
        g = meta(2, *size, 5 * c_out, dtype=dtype)[..., :c_out]
        options: dict[str, Any] = dict(stride=stride, tf32=tf32, capability=capability)
        for config in conv_weight_grad.choices(x, g, kernel, **options)[0]:
            launch, _, _ = conv_weight_grad.plan(
                x, g, kernel, stride=stride, tf32=tf32, config=config
            )
            text = f"{c_in}>{c_out} {kernel}x{kernel}/{stride} {precision}"
            tiles = config if dtype.itemsize == 2 else (config.columns, config.pixels)
            key = (tiles, dtype, tf32)
            yield Job("conv weight gradient", text, config.name, launch, key not in seen)
            seen.add(key)


def conv_jobs(arch: str) -> Iterator[Job]:
    """The convolutions of :func:`~vovnet_fast.aot.jobs`."""
    number = capability(arch)
    yield from _conv_jobs(number)
    yield from _conv_training_jobs(number)
    yield from _conv_weight_grad_jobs(number)
