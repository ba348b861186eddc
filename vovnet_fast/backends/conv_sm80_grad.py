"""The weight gradient of :mod:`.conv_sm80` as an engine: fp16, bf16 and TF32, summed in fp32.

A step is 64 pixels, or 32 in fp32: those of the gradient, and the strip of the input with its
halo, which all taps read; of images the patches, as rows of 27 channels. The pixels are divided
into parts, whose sums are added up in order: results do not change from run to run.
``csrc/cuda/conv_sm80/weight_grad.cuh`` has the kernel, which no GPU has run yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _extension, conv_sm80
from ._engines import tf32
from ._extension import fields
from .conv_sm80 import IMAGE_CHANNELS, capability, room, strip_rows, tiles_of

_IMAGE = "image"
_TILES = {3: (64, 64), 1: (128, 128), _IMAGE: (64, 32)}
"""Output and input channels of a block, by form: grad_block_out and grad_block_in there."""

_SHAPES = {2: ((4, 16), (2, 32), (1, 64)), 4: ((4, 8), (2, 16), (1, 32))}
"""Heights and widths of steps, by the bytes of a number."""

_STAGES = (3, 2)  # Steps that are in shared memory, the better first.
_BLOCKS = 264  # To be made of a layer, by parts: two for each processor of a large device.
_FEWEST_STEPS = 4  # Of a part.


Form = int | str
"""The kernel of a layer, or of the first one, whose images have three channels, "image"."""


def form(kernel: int, c_in: int) -> Form:
    """The form of a layer."""
    return _IMAGE if kernel == 3 and c_in == IMAGE_CHANNELS else kernel


def name(form: Form) -> str:
    """What the engine is called: the channels of its tiles follow."""
    return f"{conv_sm80.NAME} {'x'.join(map(str, _TILES[form]))}"


def refusal(x: Tensor, g: Tensor, kernel: int, *, stride: int = 1) -> str | None:
    """The reason why the kernel cannot take these arguments of :func:`run`, or None."""
    if x.dtype not in fields.DTYPES or x.dtype == torch.float64:
        return f"no kernel for {x.dtype}, only for fp16, bf16, and fp32 as TF32"
    if x.dtype == torch.float32 and x.is_cuda and not tf32(x):
        return "products of fp32 may not be rounded to TF32 (torch.backends.cudnn.allow_tf32)"
    if form(kernel, x.shape[3]) != _IMAGE:
        return conv_sm80.unfit(kernel, stride, x=x, g=g)
    if x.shape[:3].numel() >= conv_sm80.PIXEL_LIMIT:
        return f"{x.shape[:3].numel()} pixels are counted in 64 bits"
    return conv_sm80.unfit(kernel, stride, g=g)


def engines(x: Tensor, g: Tensor, kernel: int, *, stride: int = 1) -> list[str]:
    """The name of the engine where it is on offer for these arguments of :func:`run`."""
    if conv_sm80.why_not(x.device) is not None:
        return []
    if refusal(x, g, kernel, stride=stride) is not None:
        return []
    return [name(form(kernel, x.shape[3]))]


def shapes(form: Form, stride: int, itemsize: int = 2) -> list[tuple[int, int]]:
    """Heights and widths of steps of which every device has room for two."""
    least = room((8, 6))
    return [
        shape
        for shape in _SHAPES[itemsize]
        if 2 * stage_bytes(shape, form, stride, itemsize) <= least
    ]


def _rows(tile: tuple[int, int], form: Form, stride: int) -> int:
    """Pixels of the input of a step, or its patches."""
    return tile[0] * tile[1] if isinstance(form, str) else strip_rows(tile, form, stride)


def _shape(height: int, width: int, form: Form, stride: int, itemsize: int = 2) -> tuple[int, int]:
    """That with the fewest steps, and of these with the least to fetch."""

    def cost(shape: tuple[int, int]) -> tuple[int, int]:
        return tiles_of(height, width, shape), _rows(shape, form, stride)

    return min(shapes(form, stride, itemsize), key=cost)


def run(x: Tensor, g: Tensor, kernel: int, *, stride: int = 1) -> Tensor:
    """Gradient of the weight of a convolution, padded by K // 2: ``[C_out, K, K, C_in]`` in fp32.

    Args:
        x: ``[N, H, W, C_in]`` view, the input, in fp16, bf16 or fp32.
        g: ``[N, H', W', C_out]`` view, the gradient of the output, dtype of ``x``.
        kernel: K, 1 or 3.
        stride: 1, or 2 where K is 3.
    """
    n, h, w, c_out = g.shape
    c_in = x.shape[3]
    size = tuple((s - 1) // stride + 1 for s in x.shape[1:3])
    assert size == (h, w), f"x is {tuple(x.shape)}, g {tuple(g.shape)}, stride {stride}"
    height, width = (h, w)
    if kernel == 1 and all(v.stride(1) == w * v.stride(2) for v in (x, g)):
        height, width = 1, h * w
    of, itemsize = form(kernel, c_in), x.dtype.itemsize
    tile = _shape(height, width, of, stride, itemsize)
    blocks = 1 if of == _IMAGE else -(-c_in // _TILES[of][1])
    blocks *= -(-c_out // _TILES[of][0])
    steps = n * tiles_of(height, width, tile)
    parts = max(min(-(-_BLOCKS // blocks), steps // _FEWEST_STEPS), 1)
    out = fields.new_high(x, c_out, kernel, kernel, c_in)
    partials = fields.new_high(x, parts, *out.shape) if parts > 1 else None
    given = dict(
        x=fields.view("x", x, x, n, *x.shape[1:3], c_in),
        g=fields.view("g", g, x, n, h, w, c_out),
        partials=None if partials is None else fields.pointer("partials", partials),
        out=fields.pointer("out", out),
        n=n, out_height=height, out_width=width, c_in=c_in, c_out=c_out, parts=parts,
        height=height if kernel == 1 else x.shape[1], width=width if kernel == 1 else x.shape[2],
        kernel=kernel, stride=stride, tile_h=tile[0], tile_w=tile[1],
        stages=_stages(tile, of, stride, capability(x.device), itemsize),
        dtype=fields.DTYPES[x.dtype],
    )  # fmt: skip
    _extension.CUDA.call("conv_sm80_weight_grad", x.device, **given)
    return out


def stage_bytes(tile: tuple[int, int], form: Form, stride: int, itemsize: int = 2) -> int:
    """Bytes of shared memory of a step."""
    outputs, inputs = _TILES[form]
    return itemsize * (tile[0] * tile[1] * outputs + _rows(tile, form, stride) * inputs)


def _stages(
    tile: tuple[int, int], form: Form, stride: int, on: tuple[int, int], itemsize: int = 2
) -> int:
    """The most that a device has room for; every device has it for two."""
    size = stage_bytes(tile, form, stride, itemsize)
    return next((stages for stages in _STAGES if stages * size <= room(on)), _STAGES[-1])
