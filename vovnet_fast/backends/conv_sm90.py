"""A convolution of our own for Hopper as an engine, in CUDA C++: WGMMA with exactly C_out columns.

Where Triton rounds 80, 96, 112, 160, 192 or 224 output channels up to powers of two, or splits
them, and fetches the pixels of every tap, this one multiplies what there is, and fetches a strip
of pixels once for the three taps of a column, and once for the CTAs of a cluster;
``csrc/cuda/conv_sm90/launch.cu`` has the arithmetic. It reads and writes slots where they lie. One
kernel has all epilogues: scale, shift and ReLU with pool partials, or what is added to a gradient
and masks it.

An engine that is wrong is never chosen (:mod:`vovnet_fast.tuning`); one that hangs would hang. So
it is on offer where all of its kernels have passed trials in a process of their own
(:mod:`.conv_sm90_verdict`), once, before the first convolution on such a GPU. The environment
variable ``VOVNET_FAST_CONV_SM90`` says otherwise: 1 takes it untried, 0 does without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _environment
from ..compat import zip
from . import _extension, conv_sm90_verdict
from ._extension.fields import new_high, pointer
from .conv_sm90_tiles import (
    NAME,
    SPLIT,
    TURNS,
    Config,
    Shape,
    chunk,
    config_of,
    configs,
    splits,
    tiles_of,
)

__all__ = [
    "NAME",
    "SPLIT",
    "TURNS",
    "Config",
    "chunk",
    "config_of",
    "configs",
    "engines",
    "plan",
    "refusal",
    "run",
    "why_not",
]

ENVIRONMENT = "VOVNET_FAST_CONV_SM90"

CAPABILITY = (9, 0)

_ALIGNMENT = 16  # Bytes; of what bulk copies fetch, and of stores.
_PIXEL_LIMIT = 2**30  # Tiles are counted in 32 bits, and any tile has a pixel.
_DTYPES = {torch.float16: 0, torch.bfloat16: 1}  # Codes of csrc/params.h.

# --------------------------------------------------------------------------------------
# What it takes
# --------------------------------------------------------------------------------------


def why_not(device: torch.device, engine: str = NAME, function: str = "conv_sm90") -> str | None:
    """The reason why nothing at all is offered on ``device``, or None.

    Args:
        device: of the tensors.
        engine: whose trials have to have passed.
        function: of the extension, that it calls.
    """
    if _environment.given("CONV_SM90") == "0":
        return f"{ENVIRONMENT} is 0"
    if device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, these are on {device}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is not 9.0 (Hopper)"
    reason = missing(function)
    if reason is not None or _environment.given("CONV_SM90") == "1":
        return reason
    return conv_sm90_verdict.why_not(device, engine)


def missing(function: str = "conv_sm90") -> str | None:
    """What is wrong with the extension."""
    reason = _extension.why_not("cuda")
    if reason is None and not hasattr(_extension.load("cuda"), function):
        return "the extension was built without sm_90a: VOVNET_FAST_CUDA_ARCHS must name 90a"
    return reason


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

    Bulk copies, and stores of whole vectors, want addresses and strides that are multiples of 16
    bytes; a copy does not repeat a pixel (stride 0).
    """
    c_out, kernel, _, c_in = weight.shape
    if x.dtype not in _DTYPES:
        return f"no kernel for {x.dtype}, only for fp16 and bf16"
    if stride != 1 or kernel not in (1, 3):
        return f"no kernel {kernel} with stride {stride}"
    if not configs(c_out):
        return f"no tiles for {c_out} output channels, only for multiples of 8 from 64 on"
    if c_in * x.element_size() % _ALIGNMENT:
        return f"{c_in} input channels are no multiple of {_ALIGNMENT} bytes"
    views = (("x", x), ("weight", weight.flatten(1)), ("out", out), ("add", add), ("mask", mask))
    for name, view in views:
        if view is None:
            continue
        if view.shape[-1] * view.element_size() % _ALIGNMENT:
            return f"{name} has {view.shape[-1]} channels, no multiple of {_ALIGNMENT} bytes"
        if view.data_ptr() % _ALIGNMENT:
            return f"{name} does not start at a multiple of {_ALIGNMENT} bytes"
        steps = [s for s, size in zip(view.stride(), view.shape, strict=True) if size > 1]
        if any(step < 1 or step * view.element_size() % _ALIGNMENT for step in steps[:-1]):
            return f"{name} has strides {view.stride()}: no multiples of {_ALIGNMENT} bytes"
    if out.shape[:3].numel() >= _PIXEL_LIMIT:
        return f"{out.shape[:3].numel()} pixels are counted in 64 bits"
    return None


def engines(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[str]:
    """Names of what is on offer for these arguments of :func:`run`, as :func:`configs` has them.

    Those whose CTAs share a tile come last, where the map is too small for the GPU.
    """
    if why_not(x.device) is not None:
        return []
    if refusal(x, weight, out, stride=stride, add=add, mask=mask) is not None:
        return []
    c_out, kernel, _, c_in = weight.shape
    n, height, width, _ = out.shape
    size = (1, height * width) if kernel == 1 else (height, width)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    # With pool partials or not, the same are on offer.
    shape = Shape(n, *size, c_in, c_out, kernel, pool=True)
    found = (*configs(c_out, kernel), *splits(shape, processors))
    return [config.name for config in found]


# --------------------------------------------------------------------------------------
# Launches
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One call of the extension.

    Attributes:
        fields: of the struct, ``csrc/cuda/conv_sm90/params.h``, but for ``pool_partials``.
        tiles: of an image, or parts of those, each with a partial sum.
    """

    fields: dict[str, Any]
    tiles: int


def _view(name: str, view: Tensor | None) -> tuple[int, ...] | None:
    return None if view is None else (pointer(name, view), *view.stride()[:3])


def _vector(name: str, vector: Tensor | None, c_out: int) -> int | None:
    if vector is None:
        return None
    found = (tuple(vector.shape), vector.dtype, vector.is_contiguous())
    assert found == ((c_out,), torch.float32, True), (
        f"{name} must be a contiguous fp32 tensor of shape ({c_out},), got {vector.dtype}, "
        f"{tuple(vector.shape)}, strides {vector.stride()}"
    )
    return pointer(name, vector)


def plan(
    config: Config,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    relu: bool = True,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> Launch:
    """Decide the launch of :func:`run`. Nothing may be empty.

    A 1x1 convolution sees an image as one row, where the layout allows it.
    """
    n, height, width, c_out = out.shape
    kernel, c_in = weight.shape[1], weight.shape[3]
    assert x.shape == (n, height, width, c_in), f"x is {tuple(x.shape)}, out {tuple(out.shape)}"
    assert weight.is_contiguous(), f"weight must be contiguous, got strides {weight.stride()}"
    assert weight.dtype == x.dtype == out.dtype, (
        f"x, weight and out must have one dtype, got {x.dtype}, {weight.dtype}, {out.dtype}"
    )
    beside = {"add": add, "mask": mask}
    channels = {name: 0 if view is None else view.shape[3] for name, view in beside.items()}
    views = [x, out]
    for name, view in beside.items():
        if view is None:
            continue
        assert view.shape[:3] == out.shape[:3], f"{name} is {tuple(view.shape)}"
        assert channels[name] <= c_out, f"{name} has {channels[name]} of {c_out} channels"
        assert view.dtype == x.dtype, f"{name} must be {x.dtype}, got {view.dtype}"
        views.append(view)
    raster = all(view.stride(1) == width * view.stride(2) for view in views)
    if kernel == 1 and (raster or height == 1):
        height, width = 1, height * width
    tile = config.tile(height, width, kernel)
    fields = dict(
        x=_view("x", x), out=_view("out", out), add=_view("add", add), mask=_view("mask", mask),
        weight=pointer("weight", weight),
        scale=_vector("scale", scale, c_out), shift=_vector("shift", shift, c_out),
        n=n, height=height, width=width, c_in=c_in, c_out=c_out, add_c=channels["add"],
        mask_c=channels["mask"], kernel=kernel,
        tile_h=tile[0], tile_w=tile[1], block_out=config.block_out,
        cluster_pixels=config.cluster[0], cluster_channels=config.cluster[1], parts=config.parts,
        turns=int(config.turns), relu=int(relu and scale is not None), dtype=_DTYPES[x.dtype],
    )  # fmt: skip
    return Launch(fields, tiles_of(height, width, tile) * config.parts)


def run(
    engine: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    relu: bool = True,
    pool: bool = False,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor | None:
    """out = relu(conv(x, weight) * scale + shift), padded by K // 2, on one of :func:`engines`.

    Without scale and shift it is the gradient of an input, out = mask(conv(x, weight) + add).
    Products are summed in fp32, and rounded once, when they are stored. NaN stays NaN.

    Args:
        engine: a name that :func:`engines` gave for these arguments.
        x: ``[N, H, W, C_in]`` view in fp16 or bf16.
        weight: ``[C_out, K, K, C_in]``, contiguous, dtype of ``x``.
        scale, shift: ``[C_out]``, fp32, or None.
        out: ``[N, H, W, C_out]`` view, dtype of ``x``. Nothing outside it is written.
        relu: apply it; only with ``scale``.
        pool: return partial sums of the output, ``[N, T, C_out]`` in fp32; only with ``scale``.
        add: as ``out``, of its first channels, or None; may be ``out``. Only without ``scale``.
        mask: as ``out``, activations of its last channels, or None. Only without ``scale``.
    """
    config = config_of(engine, weight.shape[0], weight.shape[1])
    assert config is not None, f"no engine {engine} for {weight.shape[0]} output channels"
    return run_config(
        config, x, weight, scale, shift, out, relu=relu, pool=pool, add=add, mask=mask
    )


def run_config(
    config: Config,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    relu: bool = True,
    pool: bool = False,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor | None:
    """:func:`run` with tiles that need not be on offer for these arguments."""
    launch = plan(config, x, weight, scale, shift, out, relu=relu, add=add, mask=mask)
    shape = (x.shape[0], launch.tiles, weight.shape[0])
    partials = new_high(x, *shape) if pool else None
    address = None if partials is None else pointer("pool_partials", partials)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _extension.load("cuda").conv_sm90(stream, **launch.fields, pool_partials=address)
    return partials
