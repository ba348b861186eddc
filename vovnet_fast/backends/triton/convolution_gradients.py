"""Gradients of convolutions' inputs and weights: on which engine, and on one."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ... import tuning
from ..._dtypes import accumulator
from .. import _aten, conv_sm90
from .._engines import (
    ATEN,
    aten,
    in_place,
    input_grad_trial,
    problem,
    tf32,
    weight_grad_trial,
)
from .choosing import choose, form, load_kernels


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
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    if out.numel() == 0:
        return
    packed = _pack_transposed(weight, scale, g)
    options: dict[str, Any] = dict(stride=stride, add=add, mask=mask)
    engine = choose_input_grad_engine(g, packed, out, **options)
    run_input_grad_engine(engine, g, packed, out, **options)


def _pack_transposed(weight: Tensor, scale: Tensor | None, g: Tensor) -> Tensor:
    """``[C_in, K, K, C_out]`` in the dtype of g: weight * scale, transposed and flipped."""
    c_out, kernel, _, c_in = weight.shape
    packed = g.new_empty(c_in, kernel, kernel, c_out)
    load_kernels().pack.transposed(weight, scale, packed)
    return packed


def choose_input_grad_engine(
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None,
    mask: Tensor | None,
) -> str:
    """The fastest engine for an input gradient.

    That is :data:`ATEN`, one of :func:`.conv_sm90.engines`, or a Triton configuration.

    Where ``add`` is ``out`` itself, every run adds once more: what ``out`` held before
    anything was measured is put back.
    """
    options: dict[str, Any] = dict(stride=stride, add=add, mask=mask)
    found = load_kernels().conv.input_grad_layer(g, packed, out, tf32=tf32(g), **options)
    c_in, kernel, _, c_out = packed.shape
    named = (("add", add), ("mask", mask))
    words = [f"{name} {view.shape[3]}" for name, view in named if view is not None]
    layer = (c_out, kernel, kernel, c_in)
    own = conv_sm90.engines(g, packed, out, add=add, mask=mask) if stride == 1 else []
    words += [f"and {conv_sm90.NAME}"] if own else []
    key = problem("conv input gradient", out, layer, stride, *words, form(found, g))
    before: list[Tensor] = []

    def run(engine: str) -> None:
        run_input_grad_engine(engine, g, packed, out, **options)

    def prepare() -> tuning.Trial:
        if in_place(add, out):
            before.append(out.clone())
        return input_grad_trial(
            run_input_grad_engine,
            lambda weight, g: _pack_transposed(weight, None, g),
            g,
            packed,
            out,
            **options,
        )

    try:
        return choose(g, found, key, [*aten(g, out), *own], run, prepare)
    finally:
        for values in before:
            out.copy_(values)


def run_input_grad_engine(
    engine: str,
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int,
    add: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Run :func:`conv_input_grad` on one engine, with weights that are packed already."""
    kernels = load_kernels()
    if engine == ATEN:
        kernels.accumulate.accumulate(_aten.input_grad(g, packed, out, stride), out, add, mask)
        return
    if engine.startswith(conv_sm90.NAME):
        conv_sm90.run(engine, g, packed, None, None, out, add=add, mask=mask)
        return
    options: dict[str, Any] = dict(stride=stride, add=add, mask=mask, tf32=tf32(g))
    found, _ = kernels.conv.input_grad_choices(g, packed, out, **options)
    config = next(config for config in found if config.name == engine)
    kernels.conv.input_grad(g, packed, out, config=config, **options)


def conv_weight_grad(
    x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    if g.numel() == 0:  # Zeros.
        return load_kernels().conv_weight_grad.weight_grad(x, g, weight, scale, stride=stride)
    engine = choose_weight_grad_engine(x, g, weight, scale, stride=stride)
    return run_weight_grad_engine(engine, x, g, weight, scale, stride=stride)


def choose_weight_grad_engine(
    x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int
) -> str:
    """The fastest engine for a weight gradient: :data:`ATEN`, or a Triton configuration."""
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x))
    layer = load_kernels().conv_weight_grad.layer(x, g, weight.shape[1], **options)
    key = problem("conv weight gradient", x, weight.shape, stride, form(layer, x))

    def run(engine: str) -> None:
        run_weight_grad_engine(engine, x, g, weight, scale, stride=stride)

    prepare = functools.partial(
        weight_grad_trial, run_weight_grad_engine, x, g, weight, stride=stride
    )
    return choose(x, layer, key, aten(x, g), run, prepare)


def run_weight_grad_engine(
    engine: str, x: Tensor, g: Tensor, weight: Tensor, scale: Tensor | None, *, stride: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run :func:`conv_weight_grad` on one engine; all have the same result, up to rounding.

    :data:`ATEN` hands sums over in the dtype of its operands, so that it is given fp32 copies
    of fp16 and bf16 ones: the gradient is to be rounded once, at the end. Where torch allows
    TF32, as it does by default, tensor cores take these copies as they are.
    """
    kernel, size = load_kernels().conv_weight_grad, weight.shape[1]
    if engine == ATEN:
        high = accumulator(x.dtype)
        dw = _aten.weight_grad(x.to(high), g.to(high), weight, stride=stride)
        products = dw.contiguous().unsqueeze(0)
        return kernel.finish(products, kernel.channel_sums(g), weight, scale)
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x))
    found, _ = kernel.choices(x, g, size, **options)
    config = next(config for config in found if config.name == engine)
    return kernel.weight_grad(x, g, weight, scale, config=config, **options)
