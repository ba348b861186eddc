"""Convolution and its input gradient, from a slot into a slot."""

from __future__ import annotations

import torch
from torch import Tensor

from . import conv_pointer, conv_tma, cost, device
from ._common import (
    Launch,
    accumulator,
    assert_nhwc,
    assert_packed,
    assert_same,
    collapse_rows,
)
from .conv_config import ConvConfig, Epilogue, Kind

_GEOMETRIES = {(3, 1), (3, 2), (1, 1), (1, 2)}
_FORMS = {"pointer": conv_pointer, "tma": conv_tma}


def output_size(height: int, width: int, kernel: int, stride: int) -> tuple[int, int]:
    """Height and width of the output with a padding of kernel // 2."""
    pad = 2 * (kernel // 2) - kernel
    return (height + pad) // stride + 1, (width + pad) // stride + 1


def _collapse(weight: Tensor, stride: int, *views: Tensor) -> tuple[Tensor, ...]:
    """A 1x1 convolution sees an image as one row, where the layout of all views allows it."""
    return collapse_rows(*views) if weight.shape[1] == 1 and stride == 1 else views


def _layer(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    *,
    stride: int,
    tf32: bool,
    kind: Kind | None = None,
    transposed: bool = False,
) -> cost.Layer:
    x, out, *others = _collapse(weight, stride, x, out, *epilogue.views())
    c_out, kernel, _, c_in = weight.shape
    batch, height, width, _ = out.shape
    return cost.Layer(
        batch,
        height,
        width,
        c_in,
        c_out,
        kernel,
        stride,
        x.dtype,
        tf32,
        kind or epilogue.kind,
        conv_tma.legal(x, weight, out, *others, stride=stride, tf32=tf32),
        transposed and stride == 2,
        *(0 if view is None else view.shape[3] for view in (epilogue.add, epilogue.mask)),
    )


def layer(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    tf32: bool = False,
    statistics: bool = False,
) -> cost.Layer:
    """What predictions need of arguments of :func:`conv`; with ``statistics``, leaving them."""
    kind: Kind = "statistics" if statistics else "forward"
    return _layer(x, weight, out, Epilogue(), stride=stride, tf32=tf32, kind=kind)


def input_grad_layer(
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
    tf32: bool = False,
) -> cost.Layer:
    """:func:`layer` for :func:`input_grad`."""
    epilogue = Epilogue(add=add, mask=mask)
    return _layer(g, packed, out, epilogue, stride=stride, tf32=tf32, transposed=True)


def choices(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    tf32: bool = False,
    statistics: bool = False,
) -> tuple[list[ConvConfig], ConvConfig]:
    """The configurations that can take these arguments of :func:`conv`, and the static choice.

    With ``statistics``, those that can leave them.
    """
    found = layer(x, weight, out, stride=stride, tf32=tf32, statistics=statistics)
    return cost.choices(found, device.of(x.device))


def input_grad_choices(
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
    tf32: bool = False,
) -> tuple[list[ConvConfig], ConvConfig]:
    """:func:`choices` for :func:`input_grad`."""
    found = input_grad_layer(g, packed, out, stride=stride, add=add, mask=mask, tf32=tf32)
    return cost.choices(found, device.of(g.device))


def pool_tiles(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    tf32: bool = False,
    statistics: bool = False,
    config: ConvConfig | None = None,
) -> int:
    """Number of pool partials, or of ``statistics``, an image, for arguments of :func:`conv`."""
    if config is None:
        _, config = choices(x, weight, out, stride=stride, tf32=tf32, statistics=statistics)
    x, out = _collapse(weight, stride, x, out)
    return _FORMS[config.form].tiles(config, out)


def plan(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    pool_partials: Tensor | None = None,
    statistics: Tensor | None = None,
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
    if scale is None or shift is None:
        assert (scale, shift, relu) == (None, None, False), "scale, shift, ReLU come together"
    else:
        for name, vector in (("scale", scale), ("shift", shift)):
            assert_packed(name, vector, (c_out,), accumulator(x.dtype))
    epilogue = Epilogue(scale, shift, relu, pool_partials, statistics=statistics)
    if config is None:
        shape = _layer(x, weight, out, epilogue, stride=stride, tf32=tf32)
        config = cost.static_choice(shape, device.of(x.device))
    x, out = _collapse(weight, stride, x, out)
    form = _FORMS[config.form]
    tiles = form.tiles(config, out)
    if pool_partials is not None:
        sums = (x.shape[0], tiles, c_out)
        assert_packed("pool_partials", pool_partials, sums, accumulator(x.dtype))
    if statistics is not None:
        parts = (x.shape[0], tiles, 3, c_out)
        assert_packed("statistics", statistics, parts, accumulator(x.dtype))
    return form.plan(x, weight, out, epilogue, stride=stride, tf32=tf32, config=config)


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    pool_partials: Tensor | None = None,
    statistics: Tensor | None = None,
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
        shift: as ``scale``. Both may be None, for a raw convolution without ReLU.
        out: ``[N, H', W', C_out]`` view, dtype of ``x``; see :func:`output_size`.
            Nothing outside it is written.
        stride: 1 or 2.
        relu: apply it; NaN stays NaN.
        pool_partials: ``[N, T, C_out]``, dtype of sums, contiguous, with T from
            :func:`pool_tiles`: receives sums of the output over the pixels of each
            tile, taken before the output is rounded to its dtype. Summed over T and
            divided by H'W' they are the global average pool. Every element is written.
        statistics: ``[N, T, 3, C_out]``, dtype of sums, contiguous, with T from
            :func:`pool_tiles`: receives of each tile the number of its pixels, the sum
            of the output as it is stored, and the sum of squared deviations from the
            tile's own mean, which loses nothing where the mean is large. Every element
            is written.
        tf32: fp32 operands may be rounded to TF32.
        config: how to tile; None takes :func:`.cost.static_choice`.
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
        statistics=statistics,
        tf32=tf32,
        config=config,
    ).run(x.device)


def plan_input_grad(
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
    tf32: bool = False,
    config: ConvConfig | None = None,
) -> Launch:
    """Decide the launch of :func:`input_grad` without running it. Nothing may be empty."""
    c_in, kernel, _, c_out = packed.shape
    assert (kernel, stride) in _GEOMETRIES, f"no kernel {kernel} with stride {stride}"
    assert not tf32 or g.dtype == torch.float32, f"TF32 is for fp32, got {g.dtype}"
    n, height, width, _ = out.shape
    assert_nhwc("out", out, None, None, None, c_in)
    assert_nhwc("g", g, n, *output_size(height, width, kernel, stride), c_out)
    assert_same("out", out, g)
    assert_packed("packed", packed, (c_in, kernel, kernel, c_out), g.dtype)
    for name, view in (("add", add), ("mask", mask)):
        if view is not None:
            assert_nhwc(name, view, n, height, width)
            assert_same(name, view, g)
            assert view.shape[3] <= c_in, f"{name} has {view.shape[3]} channels, out has {c_in}"
    epilogue = Epilogue(add=add, mask=mask)
    if config is None:
        shape = _layer(g, packed, out, epilogue, stride=stride, tf32=tf32, transposed=True)
        config = cost.static_choice(shape, device.of(g.device))
    g, out, *others = _collapse(packed, stride, g, out, *epilogue.views())
    epilogue = epilogue.with_views(others)
    if stride == 2:
        assert config.form == "pointer", f"{config.name} has no stride of 2"
        return conv_pointer.plan(
            g, packed, out, epilogue, stride=2, transposed=True, tf32=tf32, config=config
        )
    # Flipped and transposed weights make it a convolution.
    return _FORMS[config.form].plan(g, packed, out, epilogue, stride=1, tf32=tf32, config=config)


def input_grad(
    g: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    add: Tensor | None = None,
    mask: Tensor | None = None,
    tf32: bool = False,
    config: ConvConfig | None = None,
) -> None:
    """Gradient of a convolution's input: out = mask > 0 ? conv^T(g, weight) + add : 0.

    Products are summed in fp32 (fp64 for fp64), ``add`` is added to that sum, and the
    result is rounded once.

    Args:
        g: ``[N, H', W', C_out]`` view in fp16, bf16 or fp32 (fp64 in the interpreter):
            the gradient of the convolution's output, usually a slot.
        packed: ``[C_in, K, K, C_out]`` weights from :func:`.pack.transposed`, contiguous,
            dtype of ``g``.
        out: ``[N, H, W, C_in]`` view, dtype of ``g``. Nothing outside it is written.
        stride: 1 or 2.
        add: ``[N, H, W, A]`` view for the first A channels of ``out``, A <= C_in, dtype
            of ``g``, or None. It may be ``out`` itself, but overlap it in no other way.
        mask: ``[N, H, W, M]`` view for the last M channels, M <= C_in, dtype of ``g``,
            or None: what a ReLU put out. Where it is not positive the gradient becomes
            0; at NaN it passes.
        tf32: fp32 operands may be rounded to TF32.
        config: how to tile; None takes :func:`.cost.static_choice`.
    """
    if out.numel() == 0:
        return
    plan_input_grad(
        g, packed, out, stride=stride, add=add, mask=mask, tf32=tf32, config=config
    ).run(g.device)
