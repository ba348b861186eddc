"""Effective Squeeze-Excitation in int8 and fp8: gates from sums over the pixels, and one pass that
applies them and adds the identity. See :mod:`.ese` for that of floats.

In int8 every number is an integer: of the mean 13 bits, of the gate at most 15, so that a gated sum
is below 2**24.
"""

from __future__ import annotations

import ctypes

import torch
import triton.language as tl
from torch import Tensor

from ..arithmetic.int8 import TABLE
from ..arithmetic.layers import QuantizedGate, QuantizedSum
from ._any_size import launched, strides
from ._common import (
    Launch,
    assert_nhwc,
    assert_packed,
    cdiv,
    channel_block,
    collapse_rows,
    needs_int64,
)
from ._device_functions import batch_offset, pixel_offsets, program_tile
from ._eight_bits import common_vector, nearest, rounded, soft
from ._sum_rows import sum_rows
from .ese import FC_INPUTS, FC_OUTPUTS, assert_gate, gate

_POOL_CHANNELS = 32
_POOL_TILES = 64
_APPLY_ELEMENTS = 8192
_FEATURE_ELEMENTS = 4096  # Their offsets take registers of their own.


def float32(value: float) -> float:
    """The nearest number of fp32."""
    return ctypes.c_float(value).value


@launched
def mean_eight_bits_kernel(
    sums_ptr, mean_ptr, tiles, channels, factor,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One program: means of BLOCK_C channels of one image, integers in int8."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums_ptr += batch_offset(n * tiles, channels)
    mean = sum_rows(sums_ptr, tiles, c, channels, BLOCK_T, BLOCK_C).to(tl.float32)
    mean = nearest(mean * factor) if INT8 else mean / factor
    mean = mean.to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + batch_offset(n, channels) + c, mean, mask=c < channels)


@launched
def gates_eight_bits_kernel(
    mean_ptr, weight_ptr, bias_ptr, multiplier_ptr, table_ptr, out_ptr, channels, most,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, INT8: tl.constexpr, TABLE_SIZE: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_OUT gates of one image; with TABLE_SIZE looked up by their logits."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    n = tl.program_id(0)
    oc = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mean_ptr += batch_offset(n, channels)
    products = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=ACC)
    for first in tl.range(0, channels, BLOCK_IN):
        c = first + tl.arange(0, BLOCK_IN)
        mask = (oc < channels)[:, None] & (c < channels)[None, :]
        weight = tl.load(weight_ptr + oc[:, None] * channels + c[None, :], mask=mask, other=0.0)
        products += weight.to(ACC) * tl.load(mean_ptr + c, mask=c < channels, other=0.0)[None, :]
    exist = oc < channels
    acc = tl.sum(products, axis=1) + tl.load(bias_ptr + oc, mask=exist, other=0.0)
    logit = acc.to(tl.float32) * tl.load(multiplier_ptr + oc, mask=exist, other=0.0)
    if INT8:
        high = TABLE_SIZE - 1 if TABLE_SIZE > 0 else most
        found = nearest(tl.minimum(tl.maximum(logit, 0.0), high)).to(tl.int32)
        if TABLE_SIZE > 0:
            found = tl.load(table_ptr + found)
    else:
        found = gate(logit, KIND) * most
    tl.store(out_ptr + batch_offset(n, channels) + oc, found, mask=exist)


@launched
def apply_eight_bits_kernel(
    z_ptr, gates_ptr, identity_ptr, out_ptr, feature_ptr, height, width, tiles, vectors, levels,
    gate_factor, identity_factor, rescale, unit,
    z_stride_n, z_stride_h, z_stride_w,
    identity_stride_n, identity_stride_h, identity_stride_w,
    out_stride_n, out_stride_h, out_stride_w,
    feature_stride_n, feature_stride_h, feature_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GATED: tl.constexpr,
    IDENTITY: tl.constexpr, OUT: tl.constexpr, FEATURE: tl.constexpr, INT8: tl.constexpr,
    LOW: tl.constexpr, ACC: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of an image by BLOCK_C channels."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    h = pixel // width
    w = pixel % width
    mask = (pixel < height * width)[:, None] & (c < channels)[None, :]
    z_ptr += batch_offset(n, z_stride_n, VECTOR)
    offsets = pixel_offsets(h, w, z_stride_h, z_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    acc = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(ACC)
    if GATED:
        gates_ptr += batch_offset(n, channels)
        acc *= tl.load(gates_ptr + c, mask=c < channels, other=0.0)[None, :]
    else:
        acc *= gate_factor
    if IDENTITY:
        identity_ptr += batch_offset(n, identity_stride_n, VECTOR)
        offsets = pixel_offsets(h, w, identity_stride_h, identity_stride_w, VECTOR, WIDE)
        x = tl.load(identity_ptr + offsets[:, None] + c[None, :], mask=mask, other=0.0)
        acc += x.to(ACC) * identity_factor
    y = acc.to(tl.float32)
    if OUT:
        high = levels.to(tl.float32)
        low = high * LOW  # Nothing is negative in int8.
        q = rounded(y * rescale, low, high, out_ptr.dtype.element_ty, INT8, SOFT)
        out_ptr += batch_offset(n, out_stride_n, VECTOR)
        offsets = pixel_offsets(h, w, out_stride_h, out_stride_w, VECTOR, WIDE)
        tl.store(out_ptr + offsets[:, None] + c[None, :], q, mask=mask)
    if FEATURE:
        feature_ptr += batch_offset(n, feature_stride_n, VECTOR)
        offsets = pixel_offsets(h, w, feature_stride_h, feature_stride_w, VECTOR, WIDE)
        tl.store(feature_ptr + offsets[:, None] + c[None, :], y * unit, mask=mask)


def plan_gates(
    sums: Tensor, num_pixels: int, layer: QuantizedGate, mean: Tensor, out: Tensor
) -> tuple[Launch, Launch]:
    """Decide the two launches of :func:`gates`. Nothing may be empty."""
    n, tiles, c = sums.shape
    integers = sums.dtype == torch.int32
    assert_gate(layer.kind)
    assert_packed("sums", sums, (n, tiles, c), sums.dtype)
    for name, tensor in (("mean", mean), ("out", out)):
        assert_packed(name, tensor, (n, c), sums.dtype)
    assert_packed("weight", layer.weight, (c, c), torch.int16 if integers else torch.float32)
    assert_packed("bias", layer.bias, (c,), sums.dtype)
    assert_packed("multiplier", layer.multiplier, (c,), torch.float32)
    if layer.table is not None:
        assert_packed("table", layer.table, (TABLE,), torch.int32)
    finish = Launch(
        mean_eight_bits_kernel,
        grid=(n, cdiv(c, _POOL_CHANNELS)),
        args=dict(
            sums_ptr=sums,
            mean_ptr=mean,
            tiles=tiles,
            channels=c,
            factor=float32(layer.mean_scale / num_pixels) if integers else float(num_pixels),
        ),
        constants=dict(BLOCK_C=_POOL_CHANNELS, BLOCK_T=_POOL_TILES, INT8=integers),
    )
    fc = Launch(
        gates_eight_bits_kernel,
        grid=(n, cdiv(c, FC_OUTPUTS)),
        args=dict(
            mean_ptr=mean,
            weight_ptr=layer.weight,
            bias_ptr=layer.bias,
            multiplier_ptr=layer.multiplier,
            table_ptr=layer.table,
            out_ptr=out,
            channels=c,
            most=float(layer.most),
        ),
        constants=dict(
            BLOCK_OUT=FC_OUTPUTS,
            BLOCK_IN=FC_INPUTS,
            INT8=integers,
            TABLE_SIZE=0 if layer.table is None else TABLE,
            KIND=layer.kind,
        ),
    )
    return finish, fc


def gates(sums: Tensor, num_pixels: int, layer: QuantizedGate, mean: Tensor, out: Tensor) -> None:
    """What :func:`vovnet_fast.arithmetic.int8.gates` computes, and :func:`.fp8.gates` in fp32.

    Args:
        sums: ``[N, T, C]``, int32, in fp8 fp32, contiguous: partial sums over the pixels.
        num_pixels: pixels of an image, H*W.
        layer: weights.
        mean: ``[N, C]``, dtype of ``sums``, contiguous: receives the means.
        out: as ``mean``: receives the gates.
    """
    if out.numel() == 0:
        return
    for launch in plan_gates(sums, num_pixels, layer, mean, out):
        launch.run(out.device)


def plan_apply(
    z: Tensor,
    gates: Tensor | None,
    identity: Tensor | None,
    layer: QuantizedSum,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None = None,
) -> Launch:
    """Decide the launch of :func:`apply` without running it. Nothing may be empty."""
    integers = z.dtype == torch.uint8
    views = {"z": z, "identity": identity, "out": out, "feature": feature}
    present = {name: view for name, view in views.items() if view is not None}
    for name, view in present.items():
        assert_nhwc(name, view, *z.shape)
        wanted = torch.float32 if name == "feature" else z.dtype
        assert view.dtype == wanted, f"{name} must be {wanted}, got {view.dtype}"
    if gates is not None:
        kind = torch.int32 if integers else torch.float32
        assert_packed("gates", gates, (z.shape[0], z.shape[3]), kind)
    given = dict(zip(present, collapse_rows(*present.values())))
    z = given["z"]
    n, height, width, c = z.shape
    size, block_c = common_vector(*given.values()), channel_block(c)
    block_p = (_APPLY_ELEMENTS if feature is None else _FEATURE_ELEMENTS) // block_c
    tiles = cdiv(height * width, block_p)
    all_strides = [strides(name, given.get(name, z), size) for name in views]
    number = int if integers else float
    return Launch(
        apply_eight_bits_kernel,
        grid=(n * tiles * cdiv(c, block_c),),
        args=dict(
            **{f"{name}_ptr": given.get(name) for name in views},
            gates_ptr=gates,
            height=height,
            width=width,
            tiles=tiles,
            vectors=c // size,
            levels=levels,
            gate_factor=0 if gates is not None else number(layer.gate),
            identity_factor=number(layer.identity),
            rescale=2.0**-layer.shift,
            unit=float32(layer.scale * 2.0**-layer.shift),
            **{key: value for found in all_strides for key, value in found.items()},
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            GATED=gates is not None,
            IDENTITY=identity is not None,
            OUT=out is not None,
            FEATURE=feature is not None,
            INT8=integers,
            LOW=0.0 if integers else -1.0,
            ACC=tl.int32 if integers else tl.float32,
            SOFT=soft("int8" if integers else "fp8"),
            WIDE=needs_int64(*given.values()),
        ),
    )


def apply(
    z: Tensor,
    gates: Tensor | None,
    identity: Tensor | None,
    layer: QuantizedSum,
    out: Tensor | None,
    *,
    levels: int,
    feature: Tensor | None = None,
) -> None:
    """What :func:`vovnet_fast.arithmetic.int8.apply_gates` computes, and :func:`.fp8.apply_gates`.

    Args:
        z: ``[N, H, W, C]`` view of uint8, or e4m3.
        gates: ``[N, C]`` of :func:`gates`, or None for ``layer.gate`` throughout.
        identity: as ``z``, or None.
        layer: factors.
        out: as ``z``, usually slot 0 of the next block, or None.
        levels: the largest activation.
        feature: ``[N, H, W, C]`` fp32 view for the same before its rounding, or None.
    """
    if z.numel() == 0:
        return
    plan_apply(z, gates, identity, layer, out, levels=levels, feature=feature).run(z.device)
