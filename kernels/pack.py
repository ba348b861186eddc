"""Weights of a convolution, packed for its input gradient."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ._any_size import launched, vector
from ._common import INT32_LIMIT, Launch, cdiv, soft_bf16, triton_accumulator
from ._device_functions import narrow

_BLOCK = 32  # A tile of a tap: small ones, because a layer has few weights and many taps.


@launched
def transpose_kernel(
    weight_ptr, scale_ptr, out_ptr, out_vectors, in_vectors, taps,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK by BLOCK channels of one tap."""
    c_out = out_vectors * VECTOR
    c_in = in_vectors * VECTOR
    tap = tl.program_id(0)
    oc = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ic = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    offsets = (oc[:, None] * taps + tap) * c_in + ic[None, :]
    w = tl.load(weight_ptr + offsets, mask=(oc < c_out)[:, None] & (ic < c_in)[None, :], other=0.0)
    w = w.to(ACC)
    if SCALE:
        w *= tl.load(scale_ptr + oc, mask=oc < c_out, other=0.0).to(ACC)[:, None]
    w = narrow(w, out_ptr.dtype.element_ty, SOFT_BF16).trans()
    offsets = (ic[:, None] * taps + taps - 1 - tap) * c_out + oc[None, :]
    tl.store(out_ptr + offsets, w, mask=(ic < c_in)[:, None] & (oc < c_out)[None, :])


def plan_transposed(weight: Tensor, scale: Tensor | None, out: Tensor) -> Launch:
    """Decide the launch of :func:`transposed` without running it. Nothing may be empty."""
    c_out, kernel, _, c_in = weight.shape
    assert weight.shape[2] == kernel, f"the kernel is not square: {tuple(weight.shape)}"
    assert weight.is_contiguous(), f"weight must be contiguous, got strides {weight.stride()}"
    assert weight.numel() < INT32_LIMIT, f"too many weights: {tuple(weight.shape)}"
    shape = (c_in, kernel, kernel, c_out)
    assert tuple(out.shape) == shape, f"out must have shape {shape}, got {tuple(out.shape)}"
    assert out.is_contiguous(), f"out must be contiguous, got strides {out.stride()}"
    if scale is not None:
        assert tuple(scale.shape) == (c_out,), f"scale must be [{c_out}], got {list(scale.shape)}"
        assert scale.is_contiguous(), f"scale must be contiguous, got strides {scale.stride()}"
    size = vector(weight, out)
    return Launch(
        transpose_kernel,
        grid=(kernel * kernel, cdiv(c_out, _BLOCK), cdiv(c_in, _BLOCK)),
        args=dict(
            weight_ptr=weight,
            scale_ptr=scale,
            out_ptr=out,
            out_vectors=c_out // size,
            in_vectors=c_in // size,
            taps=kernel * kernel,
        ),
        constants=dict(
            VECTOR=size,
            BLOCK=_BLOCK,
            SCALE=scale is not None,
            ACC=triton_accumulator(out.dtype),
            SOFT_BF16=soft_bf16(out.dtype),
        ),
    )


def transposed(weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """out[i, h, w, o] = weight[o, K-1-h, K-1-w, i] * scale[o], rounded once.

    A convolution of the output's gradient with these weights is the input's gradient.

    Args:
        weight: ``[C_out, K, K, C_in]``, any floating dtype, contiguous.
        scale: ``[C_out]``, fp32 or fp64, or None for one. The product is computed in
            fp32 (fp64 where ``out`` is fp64).
        out: ``[C_in, K, K, C_out]``, dtype of the activations, contiguous.
    """
    if out.numel() == 0:
        return
    plan_transposed(weight, scale, out).run(out.device)
