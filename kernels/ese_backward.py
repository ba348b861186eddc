"""Backward of :mod:`.ese`.

With y the features and out = y * gates + identity::

    dgates = sum over pixels of dout * y                           gate_sums
    d = dgates * gate'(fc @ mean + bias)                           gates_backward
    dfc, dbias, dpixel = d^T @ mean, sum of d, d @ fc / pixels
    dz = dout * gates + dpixel where y > 0, else 0                 apply_backward
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._any_size import launched, strides, vector
from ._common import (
    INT32_LIMIT,
    REDUCTION_PROGRAMS,
    Launch,
    accumulator,
    assert_nhwc,
    assert_packed,
    assert_same,
    cdiv,
    collapse_rows,
    needs_int64,
    pixelwise,
    sweep,
    triton_accumulator,
)
from ._device_functions import batch_offset, narrow, pixel_offsets, program_tile, relu_gradient
from .ese import APPLY_ELEMENTS, FC_INPUTS, FC_OUTPUTS, GateKind, assert_gate, plan_pool

_SUM_ELEMENTS = 4096
_APPLY_BACKWARD_WARPS = 8
_GRAD_OUTPUTS = 32
_GRAD_INPUTS = 32


@launched
def gate_sums_kernel(
    dout_ptr, y_ptr, partials_ptr, height, width, tiles, vectors, steps,
    dout_stride_n, dout_stride_h, dout_stride_w, y_stride_n, y_stride_h, y_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the sums of BLOCK_C channels over ``steps`` times BLOCK_P pixels of an image."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    dout_ptr += batch_offset(n, dout_stride_n, VECTOR)
    y_ptr += batch_offset(n, y_stride_n, VECTOR)
    products = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    for step in tl.range(0, steps):
        pixel = (tile * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        h = pixel // width
        w = pixel % width
        mask = (pixel < height * width)[:, None] & (c < channels)[None, :]
        dout_offsets = (
            pixel_offsets(h, w, dout_stride_h, dout_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        )
        y_offsets = pixel_offsets(h, w, y_stride_h, y_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
        dout = tl.load(dout_ptr + dout_offsets, mask=mask, other=0.0).to(ACC)
        products += dout * tl.load(y_ptr + y_offsets, mask=mask, other=0.0).to(ACC)
    offset = batch_offset(n * tiles + tile, channels)
    tl.store(partials_ptr + offset + c, tl.sum(products, axis=0), mask=c < channels)


@triton.jit
def gate_backward(dgates, gates, KIND: tl.constexpr):
    """Gradient of what :func:`.ese.gate` takes, from that of the gates and the gates themselves."""
    if KIND == "hard_sigmoid":
        return tl.where((gates <= 0.0) | (gates >= 1.0), 0.0, dgates / 6.0)
    return dgates * (gates * (1.0 - gates))


@launched
def fc_input_grad_kernel(
    dgates_ptr, gates_ptr, weight_ptr, out_ptr, num_pixels, vectors,
    VECTOR: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_IN channels of one image's pixels."""
    channels = vectors * VECTOR
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    dgates_ptr += batch_offset(n, channels)
    gates_ptr += batch_offset(n, channels)
    products = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=ACC)
    for first in tl.range(0, channels, BLOCK_OUT):
        oc = first + tl.arange(0, BLOCK_OUT)
        dgates = tl.load(dgates_ptr + oc, mask=oc < channels, other=0.0)
        d = gate_backward(dgates, tl.load(gates_ptr + oc, mask=oc < channels, other=0.0), KIND)
        mask = (oc < channels)[:, None] & (c < channels)[None, :]
        weight = tl.load(weight_ptr + oc[:, None] * channels + c[None, :], mask=mask, other=0.0)
        products += weight.to(ACC) * d[:, None]
    sums = tl.sum(products, axis=0) / num_pixels
    tl.store(out_ptr + batch_offset(n, channels) + c, sums, mask=c < channels)


@launched
def fc_weight_grad_kernel(
    dgates_ptr, gates_ptr, mean_ptr, dweight_ptr, dbias_ptr, batch, vectors,
    VECTOR: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_OUT by BLOCK_IN weights, summed over the images one by one."""
    channels = vectors * VECTOR
    ACC: tl.constexpr = dweight_ptr.dtype.element_ty
    oc = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    c = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    dweight = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=ACC)
    dbias = tl.zeros((BLOCK_OUT,), dtype=ACC)
    # Unrolled, so that the loads of several images are in flight at once.
    for n in tl.range(0, batch, loop_unroll_factor=4):
        dgates = tl.load(dgates_ptr + n * channels + oc, mask=oc < channels, other=0.0)
        gates = tl.load(gates_ptr + n * channels + oc, mask=oc < channels, other=0.0)
        d = gate_backward(dgates, gates, KIND)
        mean = tl.load(mean_ptr + n * channels + c, mask=c < channels, other=0.0)
        dweight += d[:, None] * mean[None, :]
        dbias += d
    mask = (oc < channels)[:, None] & (c < channels)[None, :]
    tl.store(dweight_ptr + oc[:, None] * channels + c[None, :], dweight, mask=mask)
    tl.store(dbias_ptr + oc, dbias, mask=oc < tl.where(tl.program_id(1) == 0, channels, 0))


@launched
def apply_backward_kernel(
    dout_ptr, gates_ptr, dpixel_ptr, y_ptr, out_ptr, height, width, tiles, vectors,
    dout_stride_n, dout_stride_h, dout_stride_w, y_stride_n, y_stride_h, y_stride_w,
    out_stride_n, out_stride_h, out_stride_w,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GATED: tl.constexpr,
    ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of an image by BLOCK_C channels."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    h = pixel // width
    w = pixel % width
    mask = (pixel < height * width)[:, None] & (c < channels)[None, :]

    dout_ptr += batch_offset(n, dout_stride_n, VECTOR)
    offsets = pixel_offsets(h, w, dout_stride_h, dout_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    dz = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(ACC)
    y_ptr += batch_offset(n, y_stride_n, VECTOR)
    y_offsets = pixel_offsets(h, w, y_stride_h, y_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    y = tl.load(y_ptr + y_offsets, mask=mask, other=0.0).to(ACC)
    if GATED:
        gates = tl.load(gates_ptr + batch_offset(n, channels) + c, mask=c < channels, other=0.0)
        dpixel = tl.load(dpixel_ptr + batch_offset(n, channels) + c, mask=c < channels, other=0.0)
        dz = dz * gates[None, :] + dpixel[None, :]
    dz = relu_gradient(dz, y)
    out_ptr += batch_offset(n, out_stride_n, VECTOR)
    out_offsets = (
        pixel_offsets(h, w, out_stride_h, out_stride_w, VECTOR, WIDE)[:, None] + c[None, :]
    )
    tl.store(out_ptr + out_offsets, narrow(dz, out_ptr.dtype.element_ty, SOFT_BF16), mask=mask)


def plan_gate_sums(dout: Tensor, y: Tensor, out: Tensor) -> tuple[Launch, Launch]:
    """Decide the two launches of :func:`gate_sums`. Nothing may be empty."""
    n, _, _, c = y.shape
    assert_nhwc("y", y)
    assert_nhwc("dout", dout, *y.shape)
    assert_same("dout", dout, y)
    dout, y = collapse_rows(dout, y)
    block_c, block_p, steps, tiles, programs = sweep(y, _SUM_ELEMENTS, REDUCTION_PROGRAMS)
    size = vector(dout, y)
    partials = out.new_empty(n, tiles, c)
    sums = Launch(
        gate_sums_kernel,
        grid=(programs,),
        args=dict(
            dout_ptr=dout,
            y_ptr=y,
            partials_ptr=partials,
            height=y.shape[1],
            width=y.shape[2],
            tiles=tiles,
            vectors=c // size,
            steps=steps,
            **strides("dout", dout, size),
            **strides("y", y, size),
        ),
        constants=dict(
            VECTOR=size,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            ACC=triton_accumulator(y.dtype),
            WIDE=needs_int64(dout, y),
        ),
    )
    return sums, plan_pool(partials, 1, out)


def gate_sums(dout: Tensor, y: Tensor, out: Tensor) -> None:
    """out = sum over the pixels of dout * y: the gradient of the gates.

    Args:
        dout: ``[N, H, W, C]`` view, gradient of the block's output.
        y: as ``dout``, the features that were gated.
        out: ``[N, C]``, fp32 (fp64 for fp64), contiguous.
    """
    if out.numel() == 0:
        return
    for launch in plan_gate_sums(dout, y, out):
        launch.run(out.device)


def plan_gates_backward(
    dgates: Tensor,
    gates: Tensor,
    mean: Tensor,
    num_pixels: int,
    fc_weight: Tensor,
    gate_kind: GateKind,
    dpixel: Tensor,
    dfc_weight: Tensor,
    dfc_bias: Tensor,
) -> tuple[Launch, Launch]:
    """Decide the two launches of :func:`gates_backward`. C must not be 0."""
    n, c = gates.shape
    high = accumulator(gates.dtype)
    assert num_pixels > 0, "the mean over no pixels is undefined"
    assert n * c < INT32_LIMIT, f"too many gates: {n} x {c}"
    assert_gate(gate_kind)
    for name, tensor in dict(dgates=dgates, gates=gates, mean=mean, dpixel=dpixel).items():
        assert_packed(name, tensor, (n, c), high)
    assert_packed("fc_weight", fc_weight, (c, c), fc_weight.dtype)
    assert_packed("dfc_weight", dfc_weight, (c, c), high)
    assert_packed("dfc_bias", dfc_bias, (c,), high)
    size = vector(fc_weight)
    gate_grads = dict(dgates_ptr=dgates, gates_ptr=gates, vectors=c // size)
    inputs = Launch(
        fc_input_grad_kernel,
        grid=(n, cdiv(c, FC_OUTPUTS)),
        args=dict(gate_grads, weight_ptr=fc_weight, out_ptr=dpixel, num_pixels=num_pixels),
        constants=dict(VECTOR=size, BLOCK_OUT=FC_INPUTS, BLOCK_IN=FC_OUTPUTS, KIND=gate_kind),
    )
    weights = Launch(
        fc_weight_grad_kernel,
        grid=(cdiv(c, _GRAD_OUTPUTS), cdiv(c, _GRAD_INPUTS)),
        args=dict(gate_grads, mean_ptr=mean, dweight_ptr=dfc_weight, dbias_ptr=dfc_bias, batch=n),
        constants=dict(VECTOR=size, BLOCK_OUT=_GRAD_OUTPUTS, BLOCK_IN=_GRAD_INPUTS, KIND=gate_kind),
    )
    return inputs, weights


def gates_backward(
    dgates: Tensor,
    gates: Tensor,
    mean: Tensor,
    num_pixels: int,
    fc_weight: Tensor,
    gate_kind: GateKind,
    dpixel: Tensor,
    dfc_weight: Tensor,
    dfc_bias: Tensor,
) -> None:
    """Backward of :func:`.ese.gates`, down to what each pixel of the features gets.

    Where the hard sigmoid is flat nothing passes, not even NaN, as in torch.

    Args:
        dgates: ``[N, C]`` from :func:`gate_sums`, fp32 (fp64 for fp64), contiguous.
        gates, mean: as ``dgates``, from :func:`.ese.gates`.
        num_pixels: pixels of an image, H*W.
        fc_weight: as in :func:`.ese.gates`.
        gate_kind: as in :func:`.ese.gates`.
        dpixel: as ``dgates``: receives the gradient of the mean divided by the pixels.
        dfc_weight: ``[C, C]``, dtype of ``dgates``, contiguous: receives the gradient of
            ``fc_weight``.
        dfc_bias: ``[C]``, as ``dfc_weight``. Without images both become 0.
    """
    if dfc_bias.numel() == 0:
        return
    inputs, weights = plan_gates_backward(
        dgates, gates, mean, num_pixels, fc_weight, gate_kind, dpixel, dfc_weight, dfc_bias
    )
    if dpixel.numel() > 0:
        inputs.run(dgates.device)
    weights.run(dgates.device)


def plan_apply_backward(
    dout: Tensor, gates: Tensor | None, dpixel: Tensor | None, y: Tensor, out: Tensor
) -> Launch:
    """Decide the launch of :func:`apply_backward`. Nothing may be empty."""
    n, _, _, c = y.shape
    assert (gates is None) == (dpixel is None), "give both of gates and dpixel, or neither"
    if gates is not None and dpixel is not None:
        assert_packed("gates", gates, (n, c), accumulator(y.dtype))
        assert_packed("dpixel", dpixel, (n, c), accumulator(y.dtype))
    for name, view in dict(dout=dout, y=y, out=out).items():
        assert_nhwc(name, view, *y.shape)
        assert_same(name, view, y)
    return pixelwise(
        apply_backward_kernel,
        dict(dout=dout, y=y, out=out),
        elements=APPLY_ELEMENTS,
        args=dict(gates_ptr=gates, dpixel_ptr=dpixel),
        constants=dict(GATED=gates is not None),
        num_warps=_APPLY_BACKWARD_WARPS,
    )


def apply_backward(
    dout: Tensor, gates: Tensor | None, dpixel: Tensor | None, y: Tensor, out: Tensor
) -> None:
    """out = dout * gates + dpixel where not y <= 0, else 0: the gradient before y's ReLU.

    Computed in fp32 (fp64 for fp64), rounded once.

    Args:
        dout: ``[N, H, W, C]`` view, gradient of the block's output.
        gates: ``[N, C]`` from :func:`.ese.gates`, fp32 (fp64 for fp64), contiguous, or None
            for a block without eSE.
        dpixel: as ``gates``, from :func:`gates_backward`; None where ``gates`` is.
        y: as ``dout``, the features, output of a ReLU.
        out: as ``dout``; may be ``dout`` or ``y``.
    """
    if out.numel() == 0:
        return
    plan_apply_backward(dout, gates, dpixel, y, out).run(out.device)
