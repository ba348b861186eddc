"""What the launchers share: launch plans, index widths, how programs share a pass.

:mod:`._device_functions` has what the kernels share.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _interpreter
from ._any_size import strides, vector
from ._triton import interpreted

INT32_LIMIT = 2**31
PARTS = 3
"""A CTA computes its output channels in at most this many accumulators."""

REDUCTION_PROGRAMS = 6
"""Programs of a reduction a processor: as many as its registers let be resident at once."""

_INTERPRETED_PROCESSORS = 3  # Such runs are tiny: three programs make persistent ones loop.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is traced: slow, at every launch."""
    return -(-a // b)


if interpreted():
    _interpreter.repair()


@dataclass(frozen=True)
class Launch:
    """One kernel launch, fully decided, so that it can be run or only compiled.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: number of programs along each axis.
        args: run-time arguments by name. None stands for an absent tensor.
        constants: ``tl.constexpr`` arguments by name.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    def run(self, device: torch.device) -> None:
        """Enqueue on the current stream of ``device``, or note it for :func:`recording`."""
        recorded = _recorded.get()
        if recorded is not None:
            recorded.append(self)
            return
        assert device.type == "cuda" or interpreted(), (
            f"Triton kernels need tensors on a CUDA device, got one on {device}"
        )
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            self.kernel[self.grid](
                **self.args,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
            )


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of this thread, in order, and run none: outputs stay unwritten.

    On meta tensors this says, on any machine, what a network would launch.
    """
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


class Target(NamedTuple):
    """A GPU for which launches on meta tensors are planned; an H100 by default.

    Attributes:
        capability: compute capability.
        processors: streaming multiprocessors.
        name: of the card, a part of what torch calls it.
        gpu: where it is, if it is here.
    """

    capability: tuple[int, int] = (9, 0)
    processors: int = 132
    name: str = ""
    gpu: torch.device | None = None


_HOPPER = Target()
_target: ContextVar[Target] = ContextVar("target", default=_HOPPER)


@contextlib.contextmanager
def planning_for(target: Target) -> Iterator[None]:
    """Inside, in this thread, launches on meta tensors are those of another GPU."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def planned_for() -> Target:
    """What :func:`planning_for` was given."""
    return _target.get()


@functools.cache
def target_of(device: torch.device) -> Target:
    """What the GPU ``device`` is."""
    found = torch.cuda.get_device_properties(device)
    return Target((found.major, found.minor), found.multi_processor_count, found.name, device)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of ``device``; that of :func:`planning_for` where no GPU is involved."""
    return (target_of(device) if device.type == "cuda" else _target.get()).capability


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; those of :func:`planning_for` on meta tensors."""
    if device.type == "cpu":
        return _INTERPRETED_PROCESSORS
    return (target_of(device) if device.type == "cuda" else _target.get()).processors


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums, scales and shifts for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    """:func:`accumulator` as a constant for kernels."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def soft_bf16(dtype: torch.dtype) -> bool:
    """Whether kernels must work around Triton's interpreter, which is wrong about bf16.

    Its ``tl.dot`` multiplies the bits as integers, and its conversion from fp32
    truncates instead of rounding to nearest.
    """
    return interpreted() and dtype == torch.bfloat16


def assert_nhwc(name: str, tensor: Tensor, *shape: int | None) -> None:
    """Assert a ``[N, H, W, C]`` view of the given sizes (None: any), channels adjacent."""
    assert tensor.ndim == 4, f"{name} must be [N, H, W, C], got {tuple(tensor.shape)}"
    for size, wanted in zip(tensor.shape, shape):
        assert wanted is None or size == wanted, (
            f"{name} must have shape {shape}, got {tuple(tensor.shape)}"
        )
    assert tensor.shape[3] == 1 or tensor.stride(3) == 1 or tensor.numel() == 0, (
        f"{name} must have channel stride 1, got strides {tensor.stride()}"
    )


def assert_packed(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Assert a contiguous tensor of exactly this shape and dtype."""
    found = (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous())
    assert found == (shape, dtype, True), (
        f"{name} must be a contiguous {dtype} tensor of shape {shape}, "
        f"got {tensor.dtype}, {tuple(tensor.shape)}, strides {tensor.stride()}"
    )


def assert_same(name: str, tensor: Tensor, like: Tensor) -> None:
    """Assert the dtype and the device of another tensor."""
    assert (tensor.dtype, tensor.device) == (like.dtype, like.device), (
        f"{name} must be {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}"
    )


def same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two views begin at the same element; meta tensors have no address to tell it by."""
    storages = (tensor.untyped_storage()._cdata for tensor in (a, b))
    return next(storages) == next(storages) and a.storage_offset() == b.storage_offset()


def in_raster_order(*tensors: Tensor) -> bool:
    """Whether the rows of every ``[N, H, W, C]`` view follow each other at the pixel stride."""
    return all(t.shape[1] == 1 or t.stride(1) == t.shape[2] * t.stride(2) for t in tensors)


def collapse_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """View ``[N, H, W, C]`` tensors as ``[N, 1, H*W, C]``, if that is possible for all.

    An operation on single pixels then needs no row arithmetic, and its tiles end
    only where the image ends. Otherwise the tensors are returned as they are.
    """
    if not in_raster_order(*tensors):
        return tensors
    return tuple(
        t.as_strided(
            (t.shape[0], 1, t.shape[1] * t.shape[2], t.shape[3]),
            (t.stride(0), t.shape[1] * t.shape[2] * t.stride(2), t.stride(2), t.stride(3)),
        )
        for t in tensors
    )


def needs_int64(*tensors: Tensor) -> bool:
    """Whether offsets inside one image of ``[N, H, W, C]`` views may leave 32 bits.

    The batch offset is computed in 64 bits always. A border of one pixel around
    the image is counted in: masked loads compute its offsets as well.
    """
    for t in tensors:
        _, height, width, channels = t.shape
        assert (height + 2) * (width + 2) < INT32_LIMIT, f"image too large: {height} x {width}"
        reach = (height + 1) * t.stride(1) + (width + 1) * t.stride(2) + channels
        if reach >= INT32_LIMIT:
            return True
    return False


def channel_block(channels: int) -> int:
    """Channels of a tile in the elementwise kernels: a power of two, 16 to 128.

    The largest one that divides the channels, so that no lane idles; where that
    is less than 16 (as for 56), the tile covers the channels and masks the rest.
    """
    divisor = min(channels & -channels, 128)
    return divisor if divisor >= 16 else min(max(triton.next_power_of_2(channels), 16), 128)


class Sweep(NamedTuple):
    """How programs share an elementwise pass, each looping over pixels.

    Attributes:
        block_c: channels of a tile.
        block_p: pixels of a tile.
        steps: tiles of an image that a program takes one after the other.
        tiles: programs an image and block of channels.
        programs: all of them.
    """

    block_c: int
    block_p: int
    steps: int
    tiles: int
    programs: int


def sweep(x: Tensor, elements: int, per_processor: int) -> Sweep:
    """Share ``[N, H, W, C]`` among programs that loop, so that each has more to do.

    What a program leaves (partial sums) or loads once (vectors of channels) then
    weighs little.

    Args:
        x: what is passed over.
        elements: that a program holds at a time.
        per_processor: programs on each processor, about, where there is work for so many.
            If all of them are resident at once they end together; many more end evenly too.
    """
    n, height, width, c = x.shape
    block_c = channel_block(c)
    block_p = elements // block_c
    groups = n * cdiv(c, block_c)
    wanted = cdiv(per_processor * processors(x.device), groups)
    steps = cdiv(cdiv(height * width, block_p), wanted)
    tiles = cdiv(height * width, block_p * steps)
    return Sweep(block_c, block_p, steps, tiles, groups * tiles)


def pixelwise(
    kernel: Any,
    views: dict[str, Tensor | None],
    *,
    elements: int,
    tile: int | None = None,
    widths: dict[str, int] | None = None,
    args: dict[str, Any] | None = None,
    constants: dict[str, Any] | None = None,
    num_warps: int = 4,
) -> Launch:
    """A kernel that does the same to every pixel: a program for a tile and a block of channels.

    Args:
        kernel: takes ``<name>_ptr`` and strides of each view, ``height``, ``width``, ``tiles``,
            ``vectors``, ``VECTOR``, ``BLOCK_C``, ``BLOCK_P``, ``ACC``, ``SOFT_BF16`` and ``WIDE``.
        views: ``[N, H, W, C]`` by name. The first one has the channels of the launch; None
            stands for one that is absent, which the kernel must not read.
        elements: of a view that a program holds at a time.
        tile: pixels of a program, if not those that it holds at a time.
        widths: numbers of channels that the kernel takes besides, in vectors.
        args, constants: what else the kernel takes.
        num_warps: warps a program.
    """
    present = {name: view for name, view in views.items() if view is not None}
    given = dict(zip(present, collapse_rows(*present.values())))
    first = next(iter(given.values()))
    n, height, width, c = first.shape
    block_c = channel_block(c)
    block_p = min(elements // block_c, tile or elements)
    tiles = cdiv(height * width, tile or block_p)
    pointers = {f"{name}_ptr": given.get(name) for name in views}
    size = vector(*given.values())
    all_strides = [strides(name, given.get(name, first), size) for name in views]
    return Launch(
        kernel,
        grid=(n * tiles * cdiv(c, block_c),),
        args=dict(
            height=height,
            width=width,
            tiles=tiles,
            vectors=c // size,
            **{name: width // size for name, width in (widths or {}).items()},
            **pointers,
            **{key: value for found in all_strides for key, value in found.items()},
            **(args or {}),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            ACC=triton_accumulator(first.dtype),
            SOFT_BF16=soft_bf16(first.dtype),
            WIDE=needs_int64(*given.values()),
            **(constants or {}),
        ),
        num_warps=num_warps,
    )
