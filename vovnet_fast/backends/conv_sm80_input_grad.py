"""Input gradients of :mod:`.conv_sm80` that are no convolution of the gradient, as engines.

With a stride of 2 every pixel of the input meets one, two or four pixels of the gradient, by the
parities of its line and column: four convolutions with stride 1, in one launch.
``csrc/cuda/conv_sm80/input_grad.cuh`` has them. The gradient of images, which have three channels,
is a kernel of its own without tensor cores (``image.cu``): it is seldom wanted. No GPU has run
either yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _extension, conv_sm80
from ._engines import tf32
from ._extension import fields
from .conv_sm80 import IMAGE_CHANNELS, NAME, Config, capability, room

IMAGE = f"{NAME} image"
"""Name of the engine for the gradient of images."""

_BLOCK = 64  # Input channels of a tile: kGradChannels there.
_PIXELS = (256, 128)  # Of a tile, of one parity.
_KERNEL = 2  # Lines and columns of the gradient that the pixels of a parity meet, at most.


def configs() -> list[Config]:
    """Tiles, the largest first."""
    return [Config(pixels, _BLOCK) for pixels in _PIXELS]


def is_image(packed: Tensor) -> bool:
    """Whether the input of a layer with these weights is an image."""
    return packed.shape[0] == IMAGE_CHANNELS and packed.shape[1] == 3


def takes(packed: Tensor, stride: int) -> bool:
    """Whether the gradient is none of :mod:`.conv_sm80`, but one of these."""
    return is_image(packed) or stride != 1


def refusal(
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> str | None:
    """The reason why no kernel can take these arguments of :func:`run`, or None."""
    if g.dtype not in fields.DTYPES or g.dtype == torch.float64:
        return f"no kernel for {g.dtype}, only for fp16, bf16 and fp32"
    if packed.numel() == 0:
        return "no channels"
    if is_image(packed):
        return conv_sm80.unfit(3, stride, g=g, packed=packed)
    if (packed.shape[1], stride) != (3, 2):
        return f"no kernel {packed.shape[1]} with stride {stride}"
    if g.dtype == torch.float32 and g.is_cuda and not tf32(g):
        return "products of fp32 may not be rounded to TF32 (torch.backends.cudnn.allow_tf32)"
    return conv_sm80.unfit(3, stride, g=g, packed=packed, out=out, add=add, mask=mask)


def engines(
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[str]:
    """Names of what is on offer for these arguments of :func:`run`, largest tile first."""
    if conv_sm80.why_not(g.device) is not None:
        return []
    if refusal(g, packed, out, stride=stride, add=add, mask=mask) is not None:
        return []
    if is_image(packed):
        return [IMAGE]
    return [config.name for config in configs()]


def tile(config: Config, height: int, width: int) -> tuple[int, int]:
    """Height and width of a tile of a gradient of that size."""
    return config.tile(height, width, _KERNEL)


def shared_bytes(config: Config, size: tuple[int, int], stages: int) -> int:
    """Bytes of shared memory of a block."""
    rows = conv_sm80.strip_rows(size, _KERNEL, 1) + config.block_out
    return stages * rows * conv_sm80.ROW_BYTES


def depth(config: Config, size: tuple[int, int], on: tuple[int, int]) -> int:
    """The deepest ring of which a processor has room for two, or for one.

    Every device has room for one of the shallowest.
    """
    fit = (
        stages
        for blocks in (2, 1)
        for stages in conv_sm80.STAGES
        if blocks * shared_bytes(config, size, stages) <= room(on)
    )
    return next(fit)


def run(
    engine: str,
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """out = mask(gradient of the input of a 3x3 convolution + add).

    Products are summed in fp32, and rounded once, when they are stored. Those of fp32 are of
    operands rounded to TF32, but for images. NaN stays NaN.

    Args:
        engine: a name that :func:`engines` gave for these arguments.
        g: ``[N, H', W', C_out]`` view in fp16, bf16 or fp32, the gradient of the output.
        packed: ``[C_in, 3, 3, C_out]``, contiguous, dtype of ``g``: transposed and flipped.
        out: ``[N, H, W, C_in]`` view, dtype of ``g``. Nothing outside it is written.
        stride: 2; or 1 for images.
        add: as ``out``, of its first channels, or None; may be ``out``.
        mask: as ``out``, activations of its last channels, or None.
    """
    n, height, width, c_in = out.shape
    c_out = packed.shape[3]
    size = tuple((s - 1) // stride + 1 for s in (height, width))
    assert size == tuple(g.shape[1:3]), f"out is {tuple(out.shape)}, g {tuple(g.shape)}"
    add_c, mask_c = (0 if view is None else view.shape[3] for view in (add, mask))
    given = dict(
        g=fields.view("g", g, g, n, *size, c_out),
        out=fields.view("out", out, g, n, height, width, c_in),
        add=fields.view("add", add, g, n, height, width, add_c),
        mask=fields.view("mask", mask, g, n, height, width, mask_c),
        weight=fields.packed("packed", packed, g.dtype, c_in, 3, 3, c_out),
        n=n, height=height, width=width, out_height=size[0], out_width=size[1], c_out=c_out,
        add_c=add_c, mask_c=mask_c, dtype=fields.DTYPES[g.dtype],
    )  # fmt: skip
    if engine == IMAGE:
        _extension.CUDA.call("conv_sm80_image_grad", g.device, stride=stride, **given)
        return
    config = conv_sm80.named(engine)
    tile_h, tile_w = tile(config, *size)
    stages = depth(config, (tile_h, tile_w), capability(g.device))
    _extension.CUDA.call(
        "conv_sm80_input_grad", g.device, c_in=c_in, tile_h=tile_h, tile_w=tile_w, stages=stages,
        **given,
    )  # fmt: skip
