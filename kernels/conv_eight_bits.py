"""Convolution and ReLU in int8 and fp8, from a slot into a slot, a feature, or both."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import conv_eight_bits_pointer, conv_eight_bits_tma, cost, device
from ._common import Launch, assert_nhwc, assert_packed, collapse_rows
from .conv import output_size
from .conv_config import ConvConfig
from .conv_eight_bits_config import EightBits, offset

_FORMS = {"pointer": conv_eight_bits_pointer, "tma": conv_eight_bits_tma}

_PRODUCTS = {torch.uint8: torch.int8, torch.int16: torch.float16}
"""What tensor cores multiply, where it is no activation's own dtype."""


def product(dtype: torch.dtype) -> torch.dtype:
    """In which dtype activations of a dtype are multiplied, and their weights are given.

    The integers of a wide stem are exact in fp16, as are sums of their products in fp32.
    """
    return _PRODUCTS.get(dtype, dtype)


def _collapsed(
    x: Tensor, weight: Tensor, epilogue: EightBits, stride: int
) -> tuple[Tensor, EightBits]:
    """A 1x1 convolution sees an image as one row, where the layout of all views allows it."""
    if weight.shape[1] != 1 or stride != 1:
        return x, epilogue
    x, *views = collapse_rows(x, *epilogue.views())
    return x, epilogue.with_views(views)


def layer(x: Tensor, weight: Tensor, epilogue: EightBits, *, stride: int = 1) -> cost.Layer:
    """What predictions need of arguments of :func:`conv`."""
    x, epilogue = _collapsed(x, weight, epilogue, stride)
    c_out, kernel, _, c_in = weight.shape
    batch, height, width, _ = epilogue.target.shape
    tma = conv_eight_bits_tma.legal(x, weight, epilogue, stride=stride)
    dtype = product(x.dtype)
    found = cost.Layer(batch, height, width, c_in, c_out, kernel, stride, dtype, tma=tma)
    if dtype.itemsize > 1:  # Images of a wide stem: its epilogue takes as many registers.
        return dataclasses.replace(found, kind="statistics")
    # A feature has four bytes, in place of activations three more than they.
    if epilogue.feature is None:
        return found
    if epilogue.out is None:
        return dataclasses.replace(found, masked=3 * c_out)
    return dataclasses.replace(found, added=4 * c_out)


def choices(
    x: Tensor, weight: Tensor, epilogue: EightBits, *, stride: int = 1
) -> tuple[list[ConvConfig], ConvConfig]:
    """The configurations that can take these arguments of :func:`conv`, and the static choice."""
    return cost.choices(layer(x, weight, epilogue, stride=stride), device.of(x.device))


def pool_tiles(
    x: Tensor, weight: Tensor, epilogue: EightBits, *, stride: int = 1, config: ConvConfig
) -> int:
    """Number of pool partials an image, for arguments of :func:`conv`."""
    x, epilogue = _collapsed(x, weight, epilogue, stride)
    return _FORMS[config.form].tiles(config, epilogue.target)


def plan(
    x: Tensor,
    weight: Tensor,
    epilogue: EightBits,
    *,
    stride: int = 1,
    config: ConvConfig | None = None,
) -> Launch:
    """Decide the launch of :func:`conv` without running it. Nothing may be empty."""
    c_out, kernel, _, c_in = weight.shape
    assert (kernel, stride) in {(3, 1), (3, 2), (1, 1)}, f"no kernel {kernel} with stride {stride}"
    assert_nhwc("x", x, None, None, None, c_in)
    assert_packed("weight", weight, (c_out, kernel, kernel, c_in), product(x.dtype))
    size = x.shape[0], *output_size(x.shape[1], x.shape[2], kernel, stride), c_out
    for name, view in (("out", epilogue.out), ("feature", epilogue.feature)):
        if view is not None:
            assert_nhwc(name, view, *size)
    integers = epilogue.form == "int8"
    if epilogue.out is not None:
        assert (epilogue.out.dtype == torch.uint8) == integers, f"out is {epilogue.out.dtype}"
    assert integers == (not x.is_floating_point()), f"bias is {epilogue.bias.dtype}, x {x.dtype}"
    assert_packed("bias", epilogue.bias, (c_out,), epilogue.bias.dtype)
    assert_packed("multiplier", epilogue.multiplier, (c_out,), torch.float32)
    assert (epilogue.weight_sums is not None) == offset(x.dtype, epilogue.levels), "sums of weights"
    if epilogue.weight_sums is not None:
        assert_packed("weight_sums", epilogue.weight_sums, (c_out,), torch.int32)
    assert_packed("unit", epilogue.unit, (c_out,), torch.float32)
    if config is None:
        _, config = choices(x, weight, epilogue, stride=stride)
    x, epilogue = _collapsed(x, weight, epilogue, stride)
    form = _FORMS[config.form]
    if epilogue.pool_partials is not None:
        sums = (x.shape[0], form.tiles(config, epilogue.target), c_out)
        assert_packed("pool_partials", epilogue.pool_partials, sums, epilogue.bias.dtype)
    return form.plan(x, weight, epilogue, stride=stride, config=config)


def conv(
    x: Tensor,
    weight: Tensor,
    epilogue: EightBits,
    *,
    stride: int = 1,
    config: ConvConfig | None = None,
) -> None:
    """What :func:`vovnet_fast.arithmetic.int8.conv` computes, bit for bit, and :func:`.fp8.conv`,
    whose sums are in fp32 here.

    Args:
        x: ``[N, H, W, C_in]`` view, usually a slot of a concat buffer: uint8 or e4m3; images int8
            or int16, in fp8 e4m3 or fp32.
        weight: ``[C_out, K, K, C_in]``, contiguous, K = 1 or 3, of the dtype that :func:`product`
            has for ``x``.
        epilogue: bias and what follows, with ``[N, H', W', C_out]`` views to write to. Nothing
            outside them is written. ``pool_partials`` are ``[N, T, C_out]`` with T from
            :func:`pool_tiles`; every element is written.
        stride: 1 or 2.
        config: how to tile; None takes :func:`.cost.static_choice`.
    """
    if epilogue.target.numel() == 0:
        return
    plan(x, weight, epilogue, stride=stride, config=config).run(x.device)
