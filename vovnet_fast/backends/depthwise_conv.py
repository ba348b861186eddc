"""A depthwise 3x3 and the 1x1 that follows it in one kernel, an engine of ``cuda``: CUDA C++.

What is between the two never leaves shared memory: where it would be written and read again, a map
is read once and written once. ``csrc/cuda/depthwise_conv/launch.cu`` has the arithmetic. Tiles,
fetching, products and epilogues are those of :mod:`.conv_sm80`: scale, shift and ReLU with pool
partials, or statistics of the batch.

No GPU has run it yet. It cannot hang, as no thread waits for what another one has to see, and like
every engine it is chosen only where it is right, on numbers like the layer's, and fastest
(:mod:`vovnet_fast.tuning`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _extension, conv_sm80
from ._engines import tf32
from ._extension import fields
from .conv_sm80 import MIN_CAPABILITY, ROW_BYTES, Launch, capability, tiles_of

NAME = "depthwise-conv"
"""Names of engines begin with it; the pixels and the output channels of a tile follow."""

SEPARATE = "separate"
"""The engine of the depthwise pass and then a convolution."""

PIXELS = 128
"""Output pixels of a tile: kPixels of csrc/cuda/depthwise_conv/layout.h."""

TAPS = 9

STAGES = (3, 2)
"""Depths of the rings, the better first."""

_BLOCKS = (224, 192, 160, 128, 112, 96, 80, 64)
"""Output channels of a tile."""

_NARROW = 128
"""Of tiles that are no wider a processor has registers for two."""

_TILE_WIDTHS = (8, 16, 32)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

why_not = conv_sm80.why_not


@dataclass(frozen=True)
class Config:
    """How a block tiles its work.

    Attributes:
        block_out: output channels of a tile.
    """

    block_out: int

    @property
    def name(self) -> str:
        """What the engine is called. The shape of the tile follows from the image."""
        return f"{NAME} {PIXELS}x{self.block_out}"

    def tile(self, height: int, width: int, stride: int) -> tuple[int, int]:
        """Height and width of a tile: the fewest tiles, and of these the least to fetch."""
        shapes = [(PIXELS // tile_w, tile_w) for tile_w in _TILE_WIDTHS]

        def cost(shape: tuple[int, int]) -> tuple[int, int]:
            return tiles_of(height, width, shape), conv_sm80.strip_rows(shape, 3, stride)

        return min(shapes, key=cost)

    def shared_bytes(self, tile: tuple[int, int], stride: int, stages: int) -> int:
        """Bytes of shared memory of a block."""
        ring = conv_sm80.strip_rows(tile, 3, stride) + TAPS + self.block_out
        return (stages * ring + 2 * PIXELS) * ROW_BYTES

    def stages(self, tile: tuple[int, int], stride: int, capability: tuple[int, int]) -> int | None:
        """The deepest rings with which most blocks fit a device; None: not one fits."""
        room = conv_sm80.room(capability)
        # Beside each block, 1 KiB of a processor's memory is the driver's.
        least = self.shared_bytes(tile, stride, STAGES[-1])
        blocks = 2 if self.block_out <= _NARROW and 2 * least + (1 << 10) <= room else 1
        most = (room + (1 << 10)) // blocks - (1 << 10)
        return next((s for s in STAGES if self.shared_bytes(tile, stride, s) <= most), None)


def configs(c_out: int) -> list[Config]:
    """Tiles for a number of output channels, widest first; empty where none has whole blocks.

    The widest, as other tiles of the same pixels make the depthwise part again; and the widest of
    which a processor has room for two, which are more blocks where a map is small.
    """
    whole = [block for block in _BLOCKS if c_out % block == 0]
    narrow = [block for block in whole if block <= _NARROW]
    return [Config(block) for block in dict.fromkeys((*whole[:1], *narrow[:1]))]


def refusal(x: Tensor, taps: Tensor, weight: Tensor, out: Tensor, *, stride: int) -> str | None:
    """The reason why the kernel cannot take these arguments of :func:`run`, or None.

    Copies and stores of whole units want addresses and strides, and numbers of channels, that are
    multiples of 16 bytes.
    """
    c_out, kernel, _, c_in = weight.shape
    if x.dtype not in _DTYPES:
        return f"no kernel for {x.dtype}, only for fp16, bf16, and fp32 as TF32"
    if x.dtype == torch.float32 and x.is_cuda and not tf32(x):
        return "products of fp32 may not be rounded to TF32 (torch.backends.cudnn.allow_tf32)"
    if kernel != 1:
        return f"a depthwise convolution is followed by a 1x1, not by a {kernel}x{kernel}"
    if not configs(c_out):
        return f"no tiles of whole blocks for {c_out} output channels"
    if c_in == 0:
        return "no input channels"
    return conv_sm80.unfit(3, stride, x=x, taps=taps[None], weight=weight, out=out)


def fitting(out: Tensor, stride: int, device: tuple[int, int]) -> list[Config]:
    """Of :func:`configs` those that a device's shared memory has room for."""
    height, width = out.shape[1:3]
    return [
        config
        for config in configs(out.shape[3])
        if config.stages(config.tile(height, width, stride), stride, device)
    ]


def engines(x: Tensor, taps: Tensor, weight: Tensor, out: Tensor, *, stride: int) -> list[str]:
    """Names of what is on offer for these arguments of :func:`run`, widest tile first."""
    if why_not(x.device) is not None or refusal(x, taps, weight, out, stride=stride) is not None:
        return []
    return [config.name for config in fitting(out, stride, capability(x.device))]


def plan(
    config: Config,
    x: Tensor,
    taps: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: int = 1,
    relu: bool = False,
    on: tuple[int, int] = MIN_CAPABILITY,
) -> Launch:
    """Decide the launch of :func:`run` on a device of capability ``on``. Nothing may be empty."""
    n, h, w, c_in = x.shape
    c_out, height, width = weight.shape[0], *out.shape[1:3]
    size = tuple((s - 1) // stride + 1 for s in (h, w))
    assert size == (height, width), f"x is {tuple(x.shape)}, out {tuple(out.shape)}, not {size}"
    tile = config.tile(height, width, stride)
    stages = config.stages(tile, stride, on)
    assert stages is not None, f"{config.name} does not fit into shared memory on {on}"
    given = dict(
        x=fields.view("x", x, x, n, h, w, c_in),
        out=fields.view("out", out, x, n, height, width, c_out),
        taps=fields.packed("taps", taps, x.dtype, 3, 3, c_in),
        weight=fields.packed("weight", weight, x.dtype, c_out, 1, 1, c_in),
        scale=fields.packed("scale", scale, torch.float32, c_out),
        shift=fields.packed("shift", shift, torch.float32, c_out),
        n=n, height=h, width=w, out_height=height, out_width=width, c_in=c_in, c_out=c_out,
        stride=stride, tile_h=tile[0], tile_w=tile[1], block_out=config.block_out, stages=stages,
        relu=int(relu), dtype=fields.DTYPES[x.dtype],
    )  # fmt: skip
    return Launch(given, tiles_of(height, width, tile))


def run(
    engine: str,
    x: Tensor,
    taps: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: int = 1,
    relu: bool = False,
    pool: bool = False,
    statistics: bool = False,
) -> Tensor | None:
    """out = relu(conv(depthwise(x, taps), weight) * scale + shift), or without scale, shift, ReLU.

    The depthwise convolution is padded by one. Both are summed in fp32; what is between them is
    rounded to the dtype of ``x``, as if it were stored, and in fp32, like the weight, to TF32. NaN
    stays NaN.

    Args:
        engine: a name that :func:`engines` gave for these arguments.
        x: ``[N, H, W, C_in]`` view in fp16, bf16 or fp32.
        taps: ``[3, 3, C_in]`` of the depthwise convolution, contiguous, dtype of ``x``.
        weight: ``[C_out, 1, 1, C_in]``, contiguous, dtype of ``x``.
        out: ``[N, H', W', C_out]`` view, dtype of ``x``. Nothing outside it is written.
        scale, shift: ``[C_out]``, fp32, or None.
        stride: of the depthwise convolution, 1 or 2.
        relu: apply it; only with ``scale``.
        pool: return partial sums of the output, ``[N, T, C_out]`` in fp32; only with ``scale``.
        statistics: return partial statistics, ``[N * T, 3, C_out]`` in fp32; only without.
    """
    config = next(config for config in configs(weight.shape[0]) if config.name == engine)
    launch = plan(
        config, x, taps, weight, out, scale=scale, shift=shift, stride=stride, relu=relu,
        on=capability(x.device),
    )  # fmt: skip
    n, c_out = out.shape[0], out.shape[3]
    shape = (n, launch.tiles, c_out) if pool else (n, launch.tiles, 3, c_out)
    partials = fields.new_high(x, *shape) if pool or statistics else None
    address = None if partials is None else fields.pointer("partials", partials)
    _extension.CUDA.call(
        "depthwise_conv",
        x.device,
        pool_partials=address if pool else None,
        statistics=address if statistics else None,
        **launch.fields,
    )
    return partials.flatten(0, 1) if partials is not None and statistics else partials
