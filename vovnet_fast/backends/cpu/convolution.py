"""Convolutions of the ``cpu`` backend: the extension's own (csrc/cpu/conv*), or oneDNN's.

The extension's engines read slots and write slots, epilogue and pool partials included, and so do
gradients of inputs, but for those of strided convolutions, which are oneDNN's:

==========  ==================  =================================================
``amx``     bf16                products by the matrix unit of Intel's processors
``dpbf16``  bf16                products of pairs, by AVX512-BF16
``fma``     fp32 and fp16       AVX2, AVX-512 or NEON, products and sums in fp32
``aten``    any                 oneDNN through ATen, then one pass into the slot
==========  ==================  =================================================

All but the last multiply a packed weight. On small maps training steps multiply weights as they are
where that is faster (:mod:`.unpacked`).

3x3 layers of frozen networks are Winograd's where that is faster (:mod:`.winograd`).

:data:`PREFERRED` is an order by dtype. The matrix unit is far ahead of the others. Between those
the first call measures, unless deterministic algorithms are asked for: ``dpbf16`` makes twice as
many products as ``fma`` on some processors, and no more on others. Engines differ in the last
bits; none depends on the number of threads.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _pages as pages
from ...tuning import processor
from .. import _aten, _extension, _steps
from .._extension.fields import DTYPES, packed, pointer, view
from . import packing, unpacked, winograd

ATEN = "aten"

PREFERRED: dict[torch.dtype, tuple[str, ...]] = {
    torch.bfloat16: ("amx", "dpbf16", "fma"),
    torch.float16: ("fma",),
    torch.float32: ("fma",),
}
"""Engines by dtype, likely the best first; where none runs, and for other dtypes, :data:`ATEN`."""


_TRIAL_FORMS, _TRIAL_BYTES = 8, 64 << 20
"""Of the weights that take turns in a trial of one layer: in a network, one is not found in a near
cache."""


def engines() -> tuple[str, ...]:
    """The engines of the extension that run on this processor."""
    return tuple(_extension.load("cpu").conv_engines())


def choose_engine(dtype: torch.dtype) -> str:
    """The engine of activations of a dtype."""
    return choose(dtype, engines(), "convolution", _trial)


def choose(
    dtype: torch.dtype,
    found: Sequence[str],
    what: str,
    trial: Callable[[torch.dtype], Callable[[str], None]],
) -> str:
    """One of the engines that there are, or :data:`ATEN`.

    Args:
        dtype: of activations.
        found: the engines that run here.
        what: they do, in a word.
        trial: makes what runs an engine by name on some layer of a dtype.
    """
    names = tuple(name for name in PREFERRED.get(dtype, ()) if name in found)
    if len(names) < 2 or names[0] == "amx" or torch.are_deterministic_algorithms_enabled():
        return names[0] if names else ATEN
    return _fastest(names, dtype, _extension.load("cpu").isa(), what, trial)


@functools.cache
def _fastest(
    names: tuple[str, ...],
    dtype: torch.dtype,
    isa: str,
    what: str,
    trial: Callable[[torch.dtype], Callable[[str], None]],
) -> str:
    """Measured once in a process at most: networks keep weights as one of them takes them."""
    problem = f"{what} in {dtype}, {isa}"
    return processor.choose(problem, names, names[0], functools.partial(trial, dtype))


@torch.inference_mode(False)
def layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """An input, a weight and an output to time engines with: one of V-39's, 3x3."""
    pixels, channels = 56, 128
    x, out = (torch.ones(1, pixels, pixels, channels, dtype=dtype) for _ in range(2))
    return x, torch.ones(channels, 3, 3, channels, dtype=dtype), out


def _trial(dtype: torch.dtype) -> Callable[[str], None]:
    x, weight, out = layer(dtype)
    tiles: dict[str, Tensor] = {}

    def run(engine: str) -> None:
        if engine not in tiles:
            tiles[engine] = packing.pack(engine, weight)
        _launch(engine, x, tiles[engine], out, 3)

    return run


@torch.inference_mode(False)
def _winograd_trial(layer: winograd.Layer) -> Callable[[str], None]:
    height = 1 << (layer.pixels.bit_length() - 1) // 2
    sizes = 1, height, layer.pixels // height
    x = torch.ones(*sizes, layer.c_in, dtype=layer.dtype)
    weight = torch.ones(layer.c_out, 3, 3, layer.c_in, dtype=layer.dtype)
    out = torch.empty(*sizes, layer.c_out, dtype=layer.dtype)
    ones = torch.ones(layer.c_out)
    address = pointer("scale", ones)
    forms: dict[str, list[Tensor]] = {}
    turns: Counter[str] = Counter()

    def run(engine: str) -> None:
        if engine not in forms:
            form = packing.pack(engine, weight)
            number = max(1, min(_TRIAL_FORMS, _TRIAL_BYTES // form.numel()))
            forms[engine] = [pages.kept(form) for _ in range(number)]
        turns[engine] += 1
        form = forms[engine][turns[engine] % len(forms[engine])]
        _launch(engine, x, form, out, 3, scale=address, shift=address)

    return run


def unpacked_trial(engine: str, x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Run a layer of :mod:`.unpacked`'s trials."""
    stride = x.shape[1] // out.shape[1]
    if engine == unpacked.NAME:
        unpacked.conv(x, weight, None, None, out, stride=stride, relu=False)
        return
    form = packing.pack(engine, weight, dtype=x.dtype, lent=True)
    _launch(engine, x, form, out, weight.shape[1], stride=stride)


def _unpacked_grad_trial(engine: str, x: Tensor, weight: Tensor, g: Tensor) -> None:
    stride = x.shape[1] // g.shape[1]
    if engine == unpacked.NAME:
        return unpacked.input_grad(g, weight, None, x, stride=stride)
    return _packed_input_grad(engine, g, weight, None, x, stride)


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    pool: bool = False,
) -> Tensor | None:
    """See :mod:`vovnet_fast.backends`."""
    engine = choose_engine(x.dtype)
    if out.numel() == 0 or engine == ATEN:
        options: dict[str, Any] = dict(stride=stride, relu=relu, pool=pool)
        weight = weight.to(x.dtype).contiguous()
        return _extension.CPU.conv(x, weight, scale, shift, out, **options)
    if _steps.training():
        layer = unpacked.layer_of("convolution of", out, weight, stride, x.dtype)
        if unpacked.faster(layer, engine, unpacked_trial):
            return unpacked.conv(x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)
    elif not pool:
        engine = winograd.choose(x, weight, stride, _winograd_trial, engine)
    return run_engine(engine, x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)


def conv_statistics(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> Tensor:
    """See :mod:`vovnet_fast.backends`."""
    engine = choose_engine(x.dtype)
    if out.numel() == 0 or engine == ATEN:
        weight = weight.to(x.dtype).contiguous()
        return _extension.CPU.conv_statistics(x, weight, out, stride=stride)
    layer = unpacked.layer_of("convolution of", out, weight, stride, x.dtype)
    if unpacked.faster(layer, engine, unpacked_trial):
        unpacked.conv(x, weight, None, None, out, stride=stride, relu=False)
    else:
        form = packing.pack(engine, weight, dtype=x.dtype, lent=weight.requires_grad)
        _launch(engine, x, form, out, weight.shape[1], stride=stride)
    n, tiles, c_out = out.shape[0], _extension.CPU.tiles(out), out.shape[3]
    partials = out.new_empty(n, tiles, 3, c_out, dtype=torch.float32)
    _extension.CPU.epilogue(out, None, None, out, relu=False, statistics=partials)
    return partials.flatten(0, 1)


def conv_input_grad(
    g: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """See :mod:`vovnet_fast.backends`."""
    engine = choose_engine(out.dtype)
    if out.numel() == 0 or engine == ATEN:
        options: dict[str, Any] = dict(stride=stride, add=add, mask=mask)
        return _extension.CPU.conv_input_grad(g, weight, scale, out, **options)
    layer = unpacked.layer_of("input gradient of", g, weight, stride, out.dtype)
    if unpacked.faster(layer, engine, _unpacked_grad_trial):
        return unpacked.input_grad(g, weight, scale, out, stride=stride, add=add, mask=mask)
    return _packed_input_grad(engine, g, weight, scale, out, stride, add, mask)


def _packed_input_grad(
    engine: str,
    g: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    stride: int,
    add: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """:func:`conv_input_grad` of a weight that is packed first."""
    if stride != 1:  # oneDNN's, which takes a weight that was not transposed.
        form = g.new_empty(weight.shape)
        _extension.CPU.pack(weight, scale, form)
        return _extension.CPU.accumulate(_aten.input_grad_of(g, form, out, stride), out, add, mask)
    tiles = packing.pack(engine, weight, scale, dtype=out.dtype, transposed=True, lent=True)
    return _launch(engine, g, tiles, out, weight.shape[1], add=add, mask=mask)


def run_engine(
    engine: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
    taps: Tensor | None = None,
) -> Tensor | None:
    """Run :func:`conv` on one of the extension's engines. ``out`` has elements.

    ``taps``: of a depthwise convolution that comes before a 1x1, and has its stride; without
    ``pool``.
    """
    n, out_height, out_width, c_out = out.shape
    partials = None
    if pool:
        sizes = out_height, out_width, x.shape[3], c_out, weight.shape[1], stride
        partials = scale.new_empty(n, _extension.load("cpu").conv_parts(engine, *sizes), c_out)
    tiles = packing.tiles_of(engine, weight, x.dtype)  # Held here: it may be kept by nobody else.
    _launch(
        engine, x, tiles, out, weight.shape[1], stride=stride, relu=relu,
        taps=packed("taps", taps, x.dtype, 3, 3, x.shape[3]),
        scale=packed("scale", scale, torch.float32, c_out),
        shift=packed("shift", shift, torch.float32, c_out),
        pool_partials=None if partials is None else pointer("pool_partials", partials),
    )  # fmt: skip
    return partials


def _launch(
    engine: str,
    x: Tensor,
    tiles: Tensor,
    out: Tensor,
    kernel: int,
    *,
    stride: int = 1,
    relu: bool = False,
    add: Tensor | None = None,
    mask: Tensor | None = None,
    **given: int | None,
) -> None:
    """Call an engine. ``given`` are addresses: of taps, scale, shift and partials."""
    n, height, width, c_in = x.shape
    _, out_height, out_width, c_out = out.shape
    add_c, mask_c = (0 if each is None else each.shape[3] for each in (add, mask))
    cpu = _extension.load("cpu")
    side = winograd.SIDES.get(engine)
    function, by = (cpu.conv, engine) if side is None else (cpu.conv_winograd, side)
    function(
        torch.get_num_threads(),
        by,
        x=view("x", x, out, n, height, width, c_in),
        out=view("out", out, x, n, out_height, out_width, c_out),
        add=view("add", add, x, n, out_height, out_width, add_c),
        mask=view("mask", mask, x, n, out_height, out_width, mask_c),
        tiles=pointer("tiles", tiles),
        n=n,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        c_in=c_in,
        c_out=c_out,
        add_c=add_c,
        mask_c=mask_c,
        kernel=kernel,
        stride=stride,
        relu=int(relu),
        dtype=DTYPES[x.dtype],
        **{"taps": None, "scale": None, "shift": None, "pool_partials": None, **given},
    )


def stand_in(weight: Tensor, stride: int) -> Tensor:
    """What :func:`conv` takes in place of a weight that will not change, and need not be kept.

    It is of the weight's shape and dtype on the meta device, with no memory but that of its packed
    form, for the engine that is in use now. Where weights are not packed, or which form is faster
    depends on the images, it is a copy.

    Args:
        weight: ``[C_out, K, K, C_in]``.
        stride: 1 or 2.
    """
    engine = choose_engine(weight.dtype)
    if weight.numel() == 0 or engine == ATEN:
        return weight.clone()
    if not winograd.engines(weight, stride, weight.dtype, engine):
        return packing.stand_in(engine, weight)
    copy = pages.kept(weight.contiguous())
    winograd.lasting([copy])
    return copy
