"""Convolution with scale, shift and ReLU, from a slot into a slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import conv_pointer, conv_tma
from ._common import (
    Launch,
    accumulator,
    assert_nhwc,
    assert_packed,
    assert_same,
    capability,
    collapse_rows,
    processors,
)
from .conv_config import ConvConfig, candidates, default_config

_GEOMETRIES = {(3, 1), (3, 2), (1, 1), (1, 2)}
_FORMS = {"pointer": conv_pointer, "tma": conv_tma}


def output_size(height: int, width: int, kernel: int, stride: int) -> tuple[int, int]:
    """Height and width of the output with a padding of kernel // 2."""
    pad = 2 * (kernel // 2) - kernel
    return (height + pad) // stride + 1, (width + pad) // stride + 1


def _collapse(x: Tensor, out: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution sees an image as one row, where the layout allows it."""
    if kernel == 1 and stride == 1:
        x, out = collapse_rows(x, out)
    return x, out


def choices(
    x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1, tf32: bool = False
) -> tuple[list[ConvConfig], ConvConfig]:
    """The configurations that can take these arguments of :func:`conv`, and the static choice."""
    x, out = _collapse(x, out, weight.shape[1], stride)
    c_out, kernel, _, c_in = weight.shape
    layer: dict[str, Any] = dict(
        kernel=kernel,
        dtype=x.dtype,
        tf32=tf32,
        tma=conv_tma.legal(x, weight, out, stride=stride, tf32=tf32),
    )
    size = (out.shape[1], out.shape[2])
    found = candidates(capability(x.device), c_in, c_out, size=size, **layer)
    static = default_config(
        capability(x.device),
        c_in,
        c_out,
        processors=processors(x.device),
        batch=out.shape[0],
        size=size,
        **layer,
    )
    return found, static


def pool_tiles(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    tf32: bool = False,
    config: ConvConfig | None = None,
) -> int:
    """Number of pool partials an image, for these arguments of :func:`conv`."""
    config = config or choices(x, weight, out, stride=stride, tf32=tf32)[1]
    x, out = _collapse(x, out, weight.shape[1], stride)
    return _FORMS[config.form].tiles(config, out)


def plan(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    pool_partials: Tensor | None = None,
    tf32: bool = False,
    config: ConvConfig | None = None,
) -> Launch:
    """Decide the launch of :func:`conv` without running it. Nothing may be empty."""
    c_out, kernel, _, c_in = weight.shape
    assert (kernel, stride) in _GEOMETRIES, f"no kernel {kernel} with stride {stride}"
    assert not tf32 or x.dtype == torch.float32, f"TF32 is for fp32, got {x.dtype}"
    assert_nhwc("x", x, None, None, None, c_in)
    height, width = output_size(x.shape[1], x.shape[2], kernel, stride)
    assert_nhwc("out", out, x.shape[0], height, width, c_out)
    assert_same("out", out, x)
    assert_packed("weight", weight, (c_out, kernel, kernel, c_in), x.dtype)
    for name, vector in (("scale", scale), ("shift", shift)):
        assert_packed(name, vector, (c_out,), accumulator(x.dtype))
    config = config or choices(x, weight, out, stride=stride, tf32=tf32)[1]
    x, out = _collapse(x, out, kernel, stride)
    form = _FORMS[config.form]
    if pool_partials is not None:
        shape = (x.shape[0], form.tiles(config, out), c_out)
        assert_packed("pool_partials", pool_partials, shape, accumulator(x.dtype))
    return form.plan(
        x,
        weight,
        scale,
        shift,
        out,
        stride=stride,
        relu=relu,
        pool_partials=pool_partials,
        tf32=tf32,
        config=config,
    )


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    pool_partials: Tensor | None = None,
    tf32: bool = False,
    config: ConvConfig | None = None,
) -> None:
    """out = relu(conv(x, weight) * scale + shift), padded by kernel // 2.

    Products are summed in fp32 (fp64 for fp64), and rounded once, when they are stored.

    Args:
        x: ``[N, H, W, C_in]`` view in fp16, bf16 or fp32 (fp64 in the interpreter);
            usually a slot of a concat buffer.
        weight: ``[C_out, K, K, C_in]``, contiguous, K = 1 or 3, dtype of ``x``.
        scale: ``[C_out]``, fp32 (fp64 for fp64).
        shift: as ``scale``.
        out: ``[N, H', W', C_out]`` view, dtype of ``x``; see :func:`output_size`.
            Nothing outside it is written.
        stride: 1 or 2.
        relu: apply it; NaN stays NaN.
        pool_partials: ``[N, T, C_out]``, dtype of ``scale``, contiguous, with T from
            :func:`pool_tiles`: receives sums of the output over the pixels of each
            tile, taken before the output is rounded to its dtype. Summed over T and
            divided by H'W' they are the global average pool. Every element is written.
        tf32: fp32 operands may be rounded to TF32.
        config: how to tile; None takes :func:`.conv_config.default_config`.
    """
    if out.numel() == 0:
        return
    plan(
        x,
        weight,
        scale,
        shift,
        out,
        stride=stride,
        relu=relu,
        pool_partials=pool_partials,
        tf32=tf32,
        config=config,
    ).run(x.device)
