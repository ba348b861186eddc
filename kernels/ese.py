"""Effective Squeeze-Excitation: gates from pool partials, then one pass that applies them.

CenterMask (arXiv:1911.06667), section 3.2. The global average pool has been taken
by the convolution that made the features, as partial sums; see :mod:`.conv`.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    Launch,
    accumulator,
    assert_nhwc,
    assert_packed,
    assert_same,
    batch_offset,
    channel_block,
    collapse_rows,
    narrow,
    needs_int64,
    pixel_offsets,
    program_tile,
    relu,
    soft_bf16,
    strides,
    triton_accumulator,
)

GateKind = Literal["hard_sigmoid", "sigmoid"]

_POOL_CHANNELS = 32
_POOL_TILES = 64
_FC_OUTPUTS = 16
_FC_INPUTS = 128
_APPLY_ELEMENTS = 4096


@triton.jit(do_not_specialize=["tiles", "num_pixels"])
def finish_pool_kernel(
    pool_ptr, mean_ptr, tiles, num_pixels,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: the means of BLOCK_C channels of one image, always summed in one order."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pool_ptr += batch_offset(n * tiles, C)
    sums = tl.zeros((BLOCK_T, BLOCK_C), dtype=mean_ptr.dtype.element_ty)
    for first in tl.range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = (t < tiles)[:, None] & (c < C)[None, :]
        sums += tl.load(pool_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(mean_ptr + batch_offset(n, C) + c, tl.sum(sums, axis=0) / num_pixels, mask=c < C)


@triton.jit
def gate(z, KIND: tl.constexpr):
    """The gate's nonlinearity: relu6(z + 3) / 6, or the logistic function. NaN for NaN."""
    if KIND == "hard_sigmoid":
        return tl.minimum(relu(z + 3.0), 6.0, propagate_nan=tl.PropagateNan.ALL) / 6.0
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def fc_gate_kernel(
    mean_ptr, weight_ptr, bias_ptr, out_ptr,
    C: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_OUT gates of one image."""
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(0)
    oc = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mean_ptr += batch_offset(n, C)
    products = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=ACC)
    for first in tl.range(0, C, BLOCK_IN):
        c = first + tl.arange(0, BLOCK_IN)
        mask = (oc < C)[:, None] & (c < C)[None, :]
        weight = tl.load(weight_ptr + oc[:, None] * C + c[None, :], mask=mask, other=0.0)
        products += weight.to(ACC) * tl.load(mean_ptr + c, mask=c < C, other=0.0)[None, :]
    bias = tl.load(bias_ptr + oc, mask=oc < C, other=0.0).to(ACC)
    tl.store(
        out_ptr + batch_offset(n, C) + oc,
        gate(tl.sum(products, axis=1) + bias, KIND),
        mask=oc < C,
    )


@triton.jit(do_not_specialize=["height", "width", "tiles"])
def apply_kernel(
    z_ptr, gates_ptr, identity_ptr, out_ptr, height, width, tiles,
    z_stride_n, z_stride_h, z_stride_w,
    identity_stride_n, identity_stride_h, identity_stride_w,
    out_stride_n, out_stride_h, out_stride_w,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GATED: tl.constexpr,
    IDENTITY: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of an image by BLOCK_C channels."""
    n, tile, first = program_tile(tiles, C, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    h = pixel // width
    w = pixel % width
    mask = (pixel < height * width)[:, None] & (c < C)[None, :]

    z_offsets = pixel_offsets(h, w, z_stride_h, z_stride_w, WIDE)[:, None] + c[None, :]
    z_ptr += batch_offset(n, z_stride_n)
    y = tl.load(z_ptr + z_offsets, mask=mask, other=0.0).to(ACC)
    if GATED:
        y *= tl.load(gates_ptr + batch_offset(n, C) + c, mask=c < C, other=0.0)[None, :]
    if IDENTITY:
        identity_ptr += batch_offset(n, identity_stride_n)
        offsets = pixel_offsets(h, w, identity_stride_h, identity_stride_w, WIDE)
        y += tl.load(identity_ptr + offsets[:, None] + c[None, :], mask=mask, other=0.0).to(ACC)
    out_ptr += batch_offset(n, out_stride_n)
    out_offsets = pixel_offsets(h, w, out_stride_h, out_stride_w, WIDE)[:, None] + c[None, :]
    tl.store(out_ptr + out_offsets, narrow(y, out_ptr.dtype.element_ty, SOFT_BF16), mask=mask)


def plan_gates(
    pool_partials: Tensor,
    num_pixels: int,
    fc_weight: Tensor,
    fc_bias: Tensor,
    gate_kind: GateKind,
    mean: Tensor,
    out: Tensor,
) -> tuple[Launch, Launch]:
    """Decide the two launches of :func:`gates`. ``mean`` is scratch like ``out``."""
    n, tiles, c = pool_partials.shape
    assert num_pixels > 0, "the mean over no pixels is undefined"
    assert gate_kind in ("hard_sigmoid", "sigmoid"), f"unknown gate {gate_kind!r}"
    assert_packed("pool_partials", pool_partials, (n, tiles, c), out.dtype)
    assert_packed("out", out, (n, c), accumulator(out.dtype))
    assert_packed("mean", mean, (n, c), out.dtype)
    assert_packed("fc_weight", fc_weight, (c, c), fc_weight.dtype)
    assert_packed("fc_bias", fc_bias, (c,), fc_bias.dtype)
    pool = Launch(
        finish_pool_kernel,
        grid=(n, triton.cdiv(c, _POOL_CHANNELS)),
        args=dict(pool_ptr=pool_partials, mean_ptr=mean, tiles=tiles, num_pixels=num_pixels),
        constants=dict(C=c, BLOCK_C=_POOL_CHANNELS, BLOCK_T=_POOL_TILES),
    )
    fc = Launch(
        fc_gate_kernel,
        grid=(n, triton.cdiv(c, _FC_OUTPUTS)),
        args=dict(mean_ptr=mean, weight_ptr=fc_weight, bias_ptr=fc_bias, out_ptr=out),
        constants=dict(C=c, BLOCK_OUT=_FC_OUTPUTS, BLOCK_IN=_FC_INPUTS, KIND=gate_kind),
    )
    return pool, fc


def gates(
    pool_partials: Tensor,
    num_pixels: int,
    fc_weight: Tensor,
    fc_bias: Tensor,
    gate_kind: GateKind,
    out: Tensor,
) -> None:
    """out = gate(fc_weight @ mean + fc_bias), the mean being the global average pool.

    Args:
        pool_partials: ``[N, T, C]``, fp32 (fp64 for fp64), contiguous; its sum over T
            is the sum over the pixels.
        num_pixels: pixels of an image, H*W.
        fc_weight: ``[C, C]``, any floating dtype, contiguous, output channels first.
        fc_bias: ``[C]``, any floating dtype.
        gate_kind: ``hard_sigmoid``, relu6(z + 3) / 6, or ``sigmoid``.
        out: ``[N, C]``, dtype of ``pool_partials``, contiguous.
    """
    if out.numel() == 0:
        return
    mean = torch.empty_like(out)
    for launch in plan_gates(pool_partials, num_pixels, fc_weight, fc_bias, gate_kind, mean, out):
        launch.run(out.device)


def plan_apply(z: Tensor, gates: Tensor | None, identity: Tensor | None, out: Tensor) -> Launch:
    """Decide the launch of :func:`apply` without running it. Nothing may be empty."""
    n, _, _, c = z.shape
    assert_nhwc("z", z)
    if gates is not None:
        assert_packed("gates", gates, (n, c), accumulator(z.dtype))
    views = [z, out] if identity is None else [z, out, identity]
    for name, view in zip(("z", "out", "identity"), views, strict=False):
        assert_nhwc(name, view, *z.shape)
        assert_same(name, view, z)
    z, out, *rest = collapse_rows(*views)
    identity = rest[0] if rest else None
    block_c = channel_block(c)
    block_p = _APPLY_ELEMENTS // block_c
    tiles = triton.cdiv(z.shape[1] * z.shape[2], block_p)
    return Launch(
        apply_kernel,
        grid=(n * tiles * triton.cdiv(c, block_c),),
        args=dict(
            z_ptr=z,
            gates_ptr=gates,
            identity_ptr=identity,
            out_ptr=out,
            height=z.shape[1],
            width=z.shape[2],
            tiles=tiles,
            **strides("z", z),
            **strides("identity", z if identity is None else identity),
            **strides("out", out),
        ),
        constants=dict(
            C=c,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            GATED=gates is not None,
            IDENTITY=identity is not None,
            ACC=triton_accumulator(z.dtype),
            SOFT_BF16=soft_bf16(z.dtype),
            WIDE=needs_int64(z, out, *rest),
        ),
    )


def apply(z: Tensor, gates: Tensor | None, identity: Tensor | None, out: Tensor) -> None:
    """out = z * gates + identity, computed in fp32 (fp64 for fp64), rounded once.

    Args:
        z: ``[N, H, W, C]`` view, the features of the 1x1 convolution.
        gates: ``[N, C]`` from :func:`gates`, fp32 (fp64 for fp64), contiguous, or None
            for a block without eSE.
        identity: as ``z``, the block's input, or None for no identity add.
        out: as ``z``, usually slot 0 of the next block; may be ``z`` or ``identity``.
    """
    if out.numel() == 0:
        return
    plan_apply(z, gates, identity, out).run(z.device)
