"""A convolution of our own for sm_80 and newer as an engine: CUDA C++ with tensor cores' mma.sync.

Tiles have exactly C_out channels, 80, 96, 112, 160, 192 and 224 among them, or whole ones and a
part of one, and the pixels of a tile are fetched once, with their halo, for all nine taps;
``csrc/cuda/conv_sm80/launch.cu`` has the arithmetic. It reads and writes slots where they lie. One
kernel has all epilogues: scale, shift and ReLU with pool partials, statistics of the batch, or what
is added to a gradient and masks it. The first layer, whose images have three channels, has a kernel
of its own.

No GPU has run it yet. It cannot hang, as no thread waits for what another one has to see, and like
every engine it is chosen only where it is right, on numbers like the layer's, and fastest
(:mod:`vovnet_fast.tuning`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compat import zip
from . import _extension
from ._engines import tf32
from ._extension import fields

NAME = "conv-sm80"
"""Names of engines begin with it; the pixels and the output channels of a tile follow."""

MIN_CAPABILITY = (8, 0)

ROW_BYTES = 64
"""Input channels of a step, in bytes: kRowBytes of csrc/cuda/conv_sm80/layout.h."""

STRIP_STAGES = 2
"""Strips in shared memory that nine taps read: kStripStages there."""

WARPS = 8

PIXEL_LIMIT = 2**30
"""Tiles are counted in 32 bits, and any tile has a pixel."""

_UNIT = 16  # Bytes; of what is copied and stored at once.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_BLOCKS = {128: (256, 224, 192, 160, 128, 112, 96, 80, 64), 256: (128, 112, 96, 80, 64)}
"""Output channels of a tile, by its pixels: what registers have room for."""

IMAGE_CHANNELS = 3
"""Input channels of the first layer, whose pixels are gathered: kImageChannels there."""

STAGES = (4, 3)
"""Depths of the ring of weights, the better first."""

_TILE_WIDTHS = (8, 16, 32)

_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_SHARED_ELSEWHERE = 99
"""KiB of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide,
"Technical Specifications per Compute Capability"): 8.6, 8.9 and 12.x have the least."""


@dataclass(frozen=True)
class Config:
    """How a block tiles its work.

    Attributes:
        pixels: of a tile.
        block_out: output channels of a tile.
    """

    pixels: int
    block_out: int

    @property
    def name(self) -> str:
        """What the engine is called. The shape of the tile follows from the image."""
        return f"{NAME} {self.pixels}x{self.block_out}"

    def tile(self, height: int, width: int, kernel: int, stride: int = 1) -> tuple[int, int]:
        """Height and width of a tile: the fewest tiles, and of these the least to fetch."""
        if height == 1 and kernel == 1:
            return 1, self.pixels
        shapes = [(self.pixels // tile_w, tile_w) for tile_w in _TILE_WIDTHS]

        def cost(shape: tuple[int, int]) -> tuple[int, int]:
            return tiles_of(height, width, shape), strip_rows(shape, kernel, stride)

        return min(shapes, key=cost)

    def shared_bytes(self, tile: tuple[int, int], kernel: int, stride: int, stages: int) -> int:
        """Bytes of shared memory of a block."""
        strips = stages if kernel == 1 else STRIP_STAGES
        rows = strips * strip_rows(tile, kernel, stride) + stages * self.block_out
        return rows * ROW_BYTES

    def stages(
        self, tile: tuple[int, int], kernel: int, stride: int, capability: tuple[int, int]
    ) -> int | None:
        """The deepest ring of weights that a device has room for; None: it has none for any."""
        fit = (s for s in STAGES if self.shared_bytes(tile, kernel, stride, s) <= room(capability))
        return next(fit, None)


IMAGE_CONFIG = Config(128, 64)
"""Tiles of the first layer: kImageTile and kImageOut there."""


def room(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have."""
    return _SHARED.get(capability, _SHARED_ELSEWHERE) << 10


def tiles_of(height: int, width: int, tile: tuple[int, int]) -> int:
    """Tiles of an image."""
    return -(-height // tile[0]) * -(-width // tile[1])


def strip_rows(tile: tuple[int, int], kernel: int, stride: int) -> int:
    """Pixels of the input of a tile, with its halo."""
    height, width = ((size - 1) * stride + kernel for size in tile)
    return height * width


def configs(c_out: int) -> list[Config]:
    """Tiles for a number of output channels, largest first: those with the fewest in vain."""
    found = []
    for pixels in sorted(_BLOCKS, reverse=True):
        covered = {block: -(-c_out // block) * block for block in _BLOCKS[pixels]}
        best = [block for block in covered if covered[block] == min(covered.values())]
        # Of the narrower ones a processor has room for two.
        narrow = [block for block in best if block <= _BLOCKS[256][0]]
        found += [Config(pixels, block) for block in dict.fromkeys((*best[:1], *narrow[:1]))]
    return found


def layer_configs(weight: Tensor) -> list[Config]:
    """Tiles for a layer with these weights, ``[C_out, K, K, C_in]``."""
    return [IMAGE_CONFIG] if is_image(weight) else configs(weight.shape[0])


def named(name: str) -> Config:
    """The tiles of an engine.

    Raises:
        ValueError: no engine is called so.
    """
    for pixels, blocks in _BLOCKS.items():
        for block in blocks:
            if Config(pixels, block).name == name:
                return Config(pixels, block)
    raise ValueError(f"no tiles are called {name!r}")


def is_image(weight: Tensor) -> bool:
    """Whether a layer with these weights is one of images, ``[C_out, 3, 3, 3]``."""
    return weight.shape[1] == 3 and weight.shape[3] == IMAGE_CHANNELS


# --------------------------------------------------------------------------------------
# What it takes
# --------------------------------------------------------------------------------------


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; elsewhere the least that the kernel takes."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else MIN_CAPABILITY


def why_not(device: torch.device) -> str | None:
    """The reason why nothing at all is offered on ``device``, or None."""
    if device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, these are on {device}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    found = capability(device)
    if found < MIN_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below 8.0 (Ampere)"
    return _extension.why_not("cuda")


def refusal(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> str | None:
    """The reason why the kernel cannot take these arguments of :func:`run`, or None.

    Copies and stores of whole units want addresses and strides, and numbers of channels, that are
    multiples of 16 bytes; of images and their filters it wants nothing.
    """
    c_out, kernel, _, c_in = weight.shape
    if x.dtype not in _DTYPES:
        return f"no kernel for {x.dtype}, only for fp16, bf16, and fp32 as TF32"
    if x.dtype == torch.float32 and x.is_cuda and not tf32(x):
        return "products of fp32 may not be rounded to TF32 (torch.backends.cudnn.allow_tf32)"
    if c_in == 0 or c_out == 0:
        return "no channels"
    if is_image(weight):
        if add is not None or mask is not None:
            return "nothing is added to a layer of images, and nothing masks it"
        if x.shape[:3].numel() >= PIXEL_LIMIT:
            return f"{x.shape[:3].numel()} pixels are counted in 64 bits"
        return unfit(kernel, stride, out=out)
    return unfit(kernel, stride, x=x, weight=weight, out=out, add=add, mask=mask)


def unfit(kernel: int, stride: int, **views: Tensor | None) -> str | None:
    """The reason why views do not consist of whole units, or are no layer's, or None."""
    if (kernel, stride) not in ((1, 1), (3, 1), (3, 2)):
        return f"no kernel {kernel} with stride {stride}"
    for name, view in views.items():
        if view is None:
            continue
        if view.data_ptr() % _UNIT:
            return f"{name} does not start at a multiple of {_UNIT} bytes"
        steps = [s for s, size in zip(view.stride()[:3], view.shape, strict=False) if size > 1]
        size = view.element_size()
        if any(step * size % _UNIT for step in steps) or view.shape[3] * size % _UNIT:
            return (
                f"{name} has {view.shape[3]} channels and strides {view.stride()}: no multiples "
                f"of {_UNIT} bytes"
            )
        if view.shape[:3].numel() >= PIXEL_LIMIT:
            return f"{view.shape[:3].numel()} pixels are counted in 64 bits"
    return None


def fitting(
    out: Tensor, weight: Tensor, stride: int, device: tuple[int, int], *views: Tensor
) -> list[Config]:
    """Of :func:`layer_configs` those that a device's shared memory has room for."""
    if is_image(weight):
        return layer_configs(weight)  # 24 KiB.
    height, width = _size(out, weight.shape[1], *views)
    kernel = weight.shape[1]
    return [
        config
        for config in configs(weight.shape[0])
        if config.stages(config.tile(height, width, kernel, stride), kernel, stride, device)
    ]


def engines(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[str]:
    """Names of what is on offer for these arguments of :func:`run`, largest tile first."""
    if why_not(x.device) is not None:
        return []
    if refusal(x, weight, out, stride=stride, add=add, mask=mask) is not None:
        return []
    views = (view for view in (add, mask) if view is not None)
    return [config.name for config in fitting(out, weight, stride, capability(x.device), x, *views)]


# --------------------------------------------------------------------------------------
# Launches
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One call of the extension.

    Attributes:
        fields: of the struct, ``csrc/cuda/conv_sm80/params.h``, but for the partials.
        tiles: of an image, each with a partial.
    """

    fields: dict[str, Any]
    tiles: int


def _size(out: Tensor, kernel: int, *views: Tensor) -> tuple[int, int]:
    """Height and width that are tiled: a 1x1 convolution sees one row where all views allow it."""
    height, width = out.shape[1:3]
    if kernel == 1 and all(v.stride(1) == width * v.stride(2) for v in (out, *views)):
        return 1, height * width
    return height, width


def plan(
    config: Config,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: int = 1,
    relu: bool = False,
    add: Tensor | None = None,
    mask: Tensor | None = None,
    on: tuple[int, int] = MIN_CAPABILITY,
) -> Launch:
    """Decide the launch of :func:`run` on a device of capability ``on``. Nothing may be empty."""
    n, h, w, c_out = out.shape
    kernel, c_in = weight.shape[1], weight.shape[3]
    input_shape = (n, *x.shape[1:3], c_in)
    size = tuple((s - 1) // stride + 1 for s in x.shape[1:3])
    assert size == (h, w), f"x is {tuple(x.shape)}, out {tuple(out.shape)}, stride {stride}"
    add_c, mask_c = (0 if view is None else view.shape[3] for view in (add, mask))
    beside = [view for view in (add, mask) if view is not None]
    height, width = _size(out, kernel, x, *beside)
    # Patches of images are gathered, whose tiles have no halo, and at once: stages say nothing.
    image = is_image(weight)
    tile = config.tile(height, width, kernel, 1 if image else stride)
    stages = STAGES[0] if image else config.stages(tile, kernel, stride, on)
    assert stages is not None, f"{config.name} does not fit into shared memory on {on}"
    in_size = (height, width) if kernel == 1 else x.shape[1:3]
    given = dict(
        x=fields.view("x", x, x, *input_shape),
        out=fields.view("out", out, x, n, h, w, c_out),
        add=fields.view("add", add, x, n, h, w, add_c),
        mask=fields.view("mask", mask, x, n, h, w, mask_c),
        weight=fields.packed("weight", weight, x.dtype, c_out, kernel, kernel, c_in),
        scale=fields.packed("scale", scale, torch.float32, c_out),
        shift=fields.packed("shift", shift, torch.float32, c_out),
        n=n, height=in_size[0], width=in_size[1], out_height=height, out_width=width,
        c_in=c_in, c_out=c_out, add_c=add_c, mask_c=mask_c, kernel=kernel, stride=stride,
        tile_h=tile[0], tile_w=tile[1], block_out=config.block_out, stages=stages,
        relu=int(relu), dtype=fields.DTYPES[x.dtype],
    )  # fmt: skip
    return Launch(given, tiles_of(height, width, tile))


def run(
    engine: str,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: int = 1,
    relu: bool = False,
    add: Tensor | None = None,
    mask: Tensor | None = None,
    pool: bool = False,
    statistics: bool = False,
) -> Tensor | None:
    """out = relu(conv(x, weight) * scale + shift), or mask(conv(x, weight) + add).

    Padded by K // 2. Products are summed in fp32, and rounded once, when they are stored; those of
    fp32 are of operands rounded to TF32. NaN stays NaN.

    Args:
        engine: a name that :func:`engines` gave for these arguments.
        x: ``[N, H, W, C_in]`` view in fp16, bf16 or fp32.
        weight: ``[C_out, K, K, C_in]``, contiguous, dtype of ``x``.
        out: ``[N, H', W', C_out]`` view, dtype of ``x``. Nothing outside it is written.
        scale, shift: ``[C_out]``, fp32, or None.
        stride: 1, or 2 where K is 3.
        relu: apply it; only with ``scale``.
        add: as ``out``, of its first channels, or None; may be ``out``. Only without ``scale``.
        mask: as ``out``, activations of its last channels, or None. Only without ``scale``.
        pool: return partial sums of the output, ``[N, T, C_out]`` in fp32; only with ``scale``.
        statistics: return partial statistics, ``[N * T, 3, C_out]`` in fp32; only without.
    """
    launch = plan(
        named(engine), x, weight, out, scale=scale, shift=shift, stride=stride, relu=relu, add=add,
        mask=mask, on=capability(x.device),
    )  # fmt: skip
    n, c_out = out.shape[0], out.shape[3]
    shape = (n, launch.tiles, c_out) if pool else (n, launch.tiles, 3, c_out)
    partials = fields.new_high(x, *shape) if pool or statistics else None
    address = None if partials is None else fields.pointer("partials", partials)
    _extension.CUDA.call(
        "conv_sm80",
        x.device,
        pool_partials=address if pool else None,
        statistics=address if statistics else None,
        **launch.fields,
    )
    return partials.flatten(0, 1) if partials is not None and statistics else partials
