"""Convolutions of few pixels by weights as they are (``csrc/cpu/conv_unpacked.h``).

Where maps are small a layer takes as long as reading its weight. The other engines multiply a
packed form, which a training step makes twice of every weight to use each once, and go over the
weight a third time for its gradient; these read it once in each pass, and write its gradient once,
as the weight lies. Which is faster depends on the layer, its pixels and the processor: it is
measured at the first such layer, and remembered (:mod:`vovnet_fast.tuning.processor`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...tuning import processor
from .. import _extension
from .._extension.fields import DTYPES, packed, pointer, view, weight_strides

NAME = "unpacked"
"""Among the engines."""

MOST_PIXELS = 512
"""N * H' * W' of outputs from which nobody asks: gathered inputs no longer stay in a cache."""

STATIC_PIXELS = 32
"""Up to which these are taken where nothing is measured."""

_TRIAL_BYTES = 16 << 20
"""Of the weights that take turns in a trial: in a network, one is not found in a near cache."""

DTYPES_TAKEN = (torch.float16, torch.bfloat16, torch.float32)


class Layer(NamedTuple):
    """What the time of a layer's pass depends on.

    Attributes:
        what: the pass.
        pixels: N, H', W' of the outputs.
        shape: of the weight, ``[C_out, K, K, C_in]``.
        order: of its numbers: which of them lie side by side.
        weight_dtype: of it.
        stride: 1 or 2.
        dtype: of activations.
    """

    what: str
    pixels: tuple[int, int, int]
    shape: tuple[int, ...]
    order: str
    weight_dtype: torch.dtype
    stride: int
    dtype: torch.dtype

    @property
    def problem(self) -> str:
        """As measurements are remembered by."""
        c_out, kernel, _, c_in = self.shape
        n, height, width = self.pixels
        return (
            f"{self.what} {c_in}>{c_out} {kernel}x{kernel}/{self.stride}, {n * height * width} "
            f"pixels in {self.dtype}, {self.order} of {self.weight_dtype} side by side"
        )


def layer_of(what: str, out: Tensor, weight: Tensor, stride: int, dtype: torch.dtype) -> Layer:
    """The layer with this weight, and outputs of this shape."""
    n, height, width, _ = out.shape
    steps = weight.stride()
    order = "channels" if steps[3] == 1 else "taps" if steps[2] == 1 else "neither"
    return Layer(what, (n, height, width), tuple(weight.shape), order, weight.dtype, stride, dtype)


Trial = Callable[[str, Tensor, Tensor, Tensor], Any]
"""Runs a pass by an engine's name, on inputs, a weight and outputs or their gradients."""


def faster(layer: Layer, engine: str, run: Trial) -> bool:
    """Whether this is faster than an engine that packs.

    Args:
        layer: and its pass.
        engine: by name.
        run: a pass of some such layer.
    """
    n, height, width = layer.pixels
    if n * height * width > MOST_PIXELS or layer.dtype not in DTYPES_TAKEN:
        return False
    if not _extension.load("cpu").conv_unpacked_runs():
        return False
    if torch.are_deterministic_algorithms_enabled():
        return n * height * width <= STATIC_PIXELS
    return _faster(layer, engine, _extension.load("cpu").isa(), torch.get_num_threads(), run)


@functools.cache
def _faster(layer: Layer, engine: str, isa: str, threads: int, run: Trial) -> bool:
    """Measured once in a process at most."""
    n, height, width = layer.pixels
    names = NAME, engine
    static = names[n * height * width > STATIC_PIXELS]
    prepare = functools.partial(_prepare, layer, run)
    return processor.choose(f"{layer.problem}, {engine}, {isa}", names, static, prepare) == NAME


@torch.inference_mode(False)
def _prepare(layer: Layer, run: Trial) -> Callable[[str], None]:
    n, height, width = layer.pixels
    c_out, kernel, _, c_in = layer.shape
    x = torch.ones(n, height * layer.stride, width * layer.stride, c_in, dtype=layer.dtype)
    out = torch.ones(n, height, width, c_out, dtype=layer.dtype)
    size = c_out * kernel * kernel * c_in
    number = max(1, min(16, _TRIAL_BYTES // (size * layer.weight_dtype.itemsize)))
    weights = torch.ones(number, size, dtype=layer.weight_dtype)
    if layer.order == "taps":
        weights = weights.view(number, c_out, c_in, kernel, kernel).permute(0, 1, 3, 4, 2)
    else:
        weights = weights.view(number, *layer.shape)
    turns: Counter[str] = Counter()

    def call(engine: str) -> None:
        turns[engine] += 1
        run(engine, x, weights[turns[engine] % number], out)

    return call


# --------------------------------------------------------------------------------------
# Passes
# --------------------------------------------------------------------------------------


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool = False,
) -> Tensor | None:
    """``out = relu(x * weight * scale + shift)``; without a scale, what is summed.

    Args:
        x: ``[N, H, W, C_in]`` view, in fp16, bf16 or fp32.
        weight: ``[C_out, K, K, C_in]``, any floating dtype, any strides.
        scale: ``[C_out]`` fp32.
        shift: ``[C_out]`` fp32.
        out: ``[N, H', W', C_out]`` view, written.
        stride: 1 or 2.
        relu: only with a scale.
        pool: whether sums over pixels are wanted.

    Returns:
        them, ``[N, 1, C_out]`` fp32, or None.
    """
    n, height, width, c_in = x.shape
    _, out_height, out_width, c_out = out.shape
    partials = out.new_empty(n, 1, c_out, dtype=torch.float32) if pool else None
    _extension.load("cpu").conv_unpacked(
        torch.get_num_threads(),
        x=view("x", x, out, n, height, width, c_in),
        out=view("out", out, x, n, out_height, out_width, c_out),
        add=None,
        mask=None,
        weight=(pointer("weight", weight), DTYPES[weight.dtype]),
        scale=_vector("scale", scale, c_out),
        shift=_vector("shift", shift, c_out),
        pool_partials=None if partials is None else pointer("pool_partials", partials),
        n=n,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        add_c=0,
        mask_c=0,
        stride=stride,
        relu=int(relu),
        dtype=DTYPES[x.dtype],
        **weight_strides(weight),
    )
    return partials


def input_grad(
    g: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """The gradient of :func:`conv`'s input, as ``conv_input_grad`` of a backend has it."""
    n, height, width, _ = out.shape
    _, out_height, out_width, c_out = g.shape
    if scale is not None:
        scale = scale.to(torch.float32).contiguous()  # Held here.
    add_c, mask_c = (0 if each is None else each.shape[3] for each in (add, mask))
    _extension.load("cpu").conv_unpacked_input_grad(
        torch.get_num_threads(),
        g=view("g", g, out, n, out_height, out_width, c_out),
        out=view("out", out, g, n, height, width, weight.shape[3]),
        add=view("add", add, g, n, height, width, add_c),
        mask=view("mask", mask, g, n, height, width, mask_c),
        weight=(pointer("weight", weight), DTYPES[weight.dtype]),
        scale=_vector("scale", scale, c_out),
        n=n,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        add_c=add_c,
        mask_c=mask_c,
        stride=stride,
        dtype=DTYPES[out.dtype],
        **weight_strides(weight),
    )


def can_hold_gradient(weight: Tensor) -> bool:
    """Whether a gradient can lie as the weight does: densely, no two numbers in one place."""
    return torch.empty_like(weight, device="meta").stride() == weight.stride()


def weight_grad(
    x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of weight, scale and shift, as ``conv_weight_grad`` of a backend has them.

    That of the weight lies as the weight does: see :func:`can_hold_gradient`.
    """
    n, height, width, _ = x.shape
    _, out_height, out_width, c_out = g.shape
    dweight = torch.empty_like(weight, dtype=torch.float32)
    dshift = dweight.new_empty(c_out)
    dscale = None if scale is None else torch.empty_like(dshift)
    _extension.load("cpu").conv_unpacked_weight_grad(
        torch.get_num_threads(),
        x=view("x", x, x, n, height, width, weight.shape[3]),
        g=view("g", g, x, n, out_height, out_width, c_out),
        weight=(pointer("weight", weight), DTYPES[weight.dtype]),
        scale=_vector("scale", scale, c_out),
        dweight=pointer("dweight", dweight),
        dscale=None if dscale is None else pointer("dscale", dscale),
        dshift=pointer("dshift", dshift),
        n=n,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        stride=stride,
        dtype=DTYPES[x.dtype],
        **weight_strides(weight),
    )
    return dweight, dscale, dshift


def _vector(name: str, vector: Tensor | None, size: int) -> int | None:
    return None if vector is None else packed(name, vector, torch.float32, size)
