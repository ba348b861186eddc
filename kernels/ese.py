"""Effective Squeeze-Excitation: gates from pool partials, then one pass that applies them.

CenterMask (arXiv:1911.06667), section 3.2. The global average pool has been taken
by the convolution that made the features, as partial sums; see :mod:`.conv`.
:mod:`.ese_backward` has the gradients.
"""

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from ._any_size import launched, vector
from ._common import Launch, accumulator, assert_nhwc, assert_packed, assert_same, cdiv, pixelwise
from ._device_functions import batch_offset, narrow, pixel_offsets, program_tile, relu
from ._sum_rows import sum_rows

GateKind = Literal["hard_sigmoid", "sigmoid"]

FC_OUTPUTS = 16
FC_INPUTS = 128
APPLY_ELEMENTS = 4096

_POOL_CHANNELS = 32
_POOL_TILES = 64


@launched
def finish_pool_kernel(
    pool_ptr, mean_ptr, tiles, num_pixels, vectors,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: the means of BLOCK_C channels of one image, always summed in one order."""
    channels = vectors * VECTOR
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pool_ptr += batch_offset(n * tiles, channels)
    sums = sum_rows(pool_ptr, tiles, c, channels, BLOCK_T, BLOCK_C)
    tl.store(mean_ptr + batch_offset(n, channels) + c, sums / num_pixels, mask=c < channels)


@triton.jit
def gate(z, KIND: tl.constexpr):
    """The gate's nonlinearity: relu6(z + 3) / 6, or the logistic function. NaN for NaN."""
    if KIND == "hard_sigmoid":
        return tl.minimum(relu(z + 3.0), 6.0, propagate_nan=tl.PropagateNan.ALL) / 6.0
    return 1.0 / (1.0 + tl.exp(-z))


@launched
def fc_gate_kernel(
    mean_ptr, weight_ptr, bias_ptr, out_ptr, vectors,
    VECTOR: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_OUT gates of one image."""
    channels = vectors * VECTOR
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(0)
    oc = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mean_ptr += batch_offset(n, channels)
    products = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=ACC)
    for first in tl.range(0, channels, BLOCK_IN):
        c = first + tl.arange(0, BLOCK_IN)
        mask = (oc < channels)[:, None] & (c < channels)[None, :]
        weight = tl.load(weight_ptr + oc[:, None] * channels + c[None, :], mask=mask, other=0.0)
        products += weight.to(ACC) * tl.load(mean_ptr + c, mask=c < channels, other=0.0)[None, :]
    bias = tl.load(bias_ptr + oc, mask=oc < channels, other=0.0).to(ACC)
    tl.store(
        out_ptr + batch_offset(n, channels) + oc,
        gate(tl.sum(products, axis=1) + bias, KIND),
        mask=oc < channels,
    )


@launched
def apply_kernel(
    z_ptr, gates_ptr, identity_ptr, out_ptr, height, width, tiles, vectors,
    z_stride_n, z_stride_h, z_stride_w,
    identity_stride_n, identity_stride_h, identity_stride_w,
    out_stride_n, out_stride_h, out_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GATED: tl.constexpr,
    IDENTITY: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of an image by BLOCK_C channels."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    h = pixel // width
    w = pixel % width
    mask = (pixel < height * width)[:, None] & (c < channels)[None, :]

    z_offsets = pixel_offsets(h, w, z_stride_h, z_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    z_ptr += batch_offset(n, z_stride_n, VECTOR)
    y = tl.load(z_ptr + z_offsets, mask=mask, other=0.0).to(ACC)
    if GATED:
        gates_ptr += batch_offset(n, channels)
        y *= tl.load(gates_ptr + c, mask=c < channels, other=0.0)[None, :]
    if IDENTITY:
        identity_ptr += batch_offset(n, identity_stride_n, VECTOR)
        offsets = pixel_offsets(h, w, identity_stride_h, identity_stride_w, VECTOR, WIDE)
        y += tl.load(identity_ptr + offsets[:, None] + c[None, :], mask=mask, other=0.0).to(ACC)
    out_ptr += batch_offset(n, out_stride_n, VECTOR)
    out_offsets = (
        pixel_offsets(h, w, out_stride_h, out_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    )
    tl.store(out_ptr + out_offsets, narrow(y, out_ptr.dtype.element_ty, SOFT_BF16), mask=mask)


def assert_gate(kind: str) -> None:
    """Assert a nonlinearity that :func:`gate` knows."""
    assert kind in ("hard_sigmoid", "sigmoid"), f"unknown gate {kind!r}"


def plan_pool(partials: Tensor, divisor: int, out: Tensor) -> Launch:
    """Decide the launch that makes ``out``, [N, C], the sum over T of [N, T, C] / divisor."""
    n, tiles, c = partials.shape
    assert_packed("partials", partials, (n, tiles, c), out.dtype)
    assert_packed("out", out, (n, c), accumulator(out.dtype))
    size = vector(out)
    return Launch(
        finish_pool_kernel,
        grid=(n, cdiv(c, _POOL_CHANNELS)),
        args=dict(
            pool_ptr=partials, mean_ptr=out, tiles=tiles, num_pixels=divisor, vectors=c // size
        ),
        constants=dict(VECTOR=size, BLOCK_C=_POOL_CHANNELS, BLOCK_T=_POOL_TILES),
    )


def plan_gates(
    pool_partials: Tensor,
    num_pixels: int,
    fc_weight: Tensor,
    fc_bias: Tensor,
    gate_kind: GateKind,
    mean: Tensor,
    out: Tensor,
) -> tuple[Launch, Launch]:
    """Decide the two launches of :func:`gates`. Nothing may be empty."""
    n, c = out.shape
    assert num_pixels > 0, "the mean over no pixels is undefined"
    assert_gate(gate_kind)
    assert_packed("out", out, (n, c), mean.dtype)
    assert_packed("fc_weight", fc_weight, (c, c), fc_weight.dtype)
    assert_packed("fc_bias", fc_bias, (c,), fc_bias.dtype)
    pool = plan_pool(pool_partials, num_pixels, mean)
    size = vector(fc_weight)
    fc = Launch(
        fc_gate_kernel,
        grid=(n, cdiv(c, FC_OUTPUTS)),
        args=dict(
            mean_ptr=mean,
            weight_ptr=fc_weight,
            bias_ptr=fc_bias,
            out_ptr=out,
            vectors=c // size,
        ),
        constants=dict(VECTOR=size, BLOCK_OUT=FC_OUTPUTS, BLOCK_IN=FC_INPUTS, KIND=gate_kind),
    )
    return pool, fc


def gates(
    pool_partials: Tensor,
    num_pixels: int,
    fc_weight: Tensor,
    fc_bias: Tensor,
    gate_kind: GateKind,
    mean: Tensor,
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
        mean: ``[N, C]``, dtype of ``pool_partials``, contiguous: receives the mean, which
            :func:`.ese_backward.gates_backward` takes.
        out: as ``mean``: receives the gates.
    """
    if out.numel() == 0:
        return
    for launch in plan_gates(pool_partials, num_pixels, fc_weight, fc_bias, gate_kind, mean, out):
        launch.run(out.device)


def plan_apply(z: Tensor, gates: Tensor | None, identity: Tensor | None, out: Tensor) -> Launch:
    """Decide the launch of :func:`apply` without running it. Nothing may be empty."""
    n, _, _, c = z.shape
    assert_nhwc("z", z)
    if gates is not None:
        assert_packed("gates", gates, (n, c), accumulator(z.dtype))
    views = [z, out] if identity is None else [z, out, identity]
    for name, view in zip(("z", "out", "identity"), views):
        assert_nhwc(name, view, *z.shape)
        assert_same(name, view, z)
    return pixelwise(
        apply_kernel,
        dict(z=z, out=out, identity=identity),
        elements=APPLY_ELEMENTS,
        args=dict(gates_ptr=gates),
        constants=dict(GATED=gates is not None, IDENTITY=identity is not None),
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
