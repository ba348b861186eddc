"""What the input gradient of another library's convolution needs before it is in its slot."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ._any_size import launched
from ._common import Launch, assert_nhwc, assert_same, pixelwise
from ._device_functions import batch_offset, narrow, pixel_offsets, program_tile, relu_gradient

_STEP_ELEMENTS = 4096  # What a program holds in registers.


@launched
def accumulate_kernel(
    z_ptr, add_ptr, mask_ptr, out_ptr, height, width, tiles, vectors,
    z_stride_n, z_stride_h, z_stride_w, add_stride_n, add_stride_h, add_stride_w,
    mask_stride_n, mask_stride_h, mask_stride_w, out_stride_n, out_stride_h, out_stride_w,
    added, masked,
    VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ADD: tl.constexpr,
    MASK: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of an image by BLOCK_C channels."""
    channels = vectors * VECTOR
    n, tile, first = program_tile(tiles, channels, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    h = pixel // width
    w = pixel % width
    inside = (pixel < height * width)[:, None]
    within = inside & (c < channels)[None, :]

    z_ptr += batch_offset(n, z_stride_n, VECTOR)
    offsets = pixel_offsets(h, w, z_stride_h, z_stride_w, VECTOR, WIDE)
    y = tl.load(z_ptr + offsets[:, None] + c[None, :], mask=within, other=0.0).to(ACC)
    if ADD:
        add_ptr += batch_offset(n, add_stride_n, VECTOR)
        offsets = pixel_offsets(h, w, add_stride_h, add_stride_w, VECTOR, WIDE)
        pointers = add_ptr + offsets[:, None] + c[None, :]
        y += tl.load(pointers, mask=inside & (c < added * VECTOR)[None, :], other=0.0).to(ACC)
    if MASK:
        channel = c - (channels - masked * VECTOR)
        mask_ptr += batch_offset(n, mask_stride_n, VECTOR)
        offsets = pixel_offsets(h, w, mask_stride_h, mask_stride_w, VECTOR, WIDE)
        pointers = mask_ptr + offsets[:, None] + channel[None, :]
        activation = tl.load(pointers, mask=within & (channel >= 0)[None, :], other=1.0)
        y = relu_gradient(y, activation.to(ACC))
    out_ptr += batch_offset(n, out_stride_n, VECTOR)
    offsets = pixel_offsets(h, w, out_stride_h, out_stride_w, VECTOR, WIDE)
    y = narrow(y, out_ptr.dtype.element_ty, SOFT_BF16)
    tl.store(out_ptr + offsets[:, None] + c[None, :], y, mask=within)


def plan(z: Tensor, out: Tensor, add: Tensor | None = None, mask: Tensor | None = None) -> Launch:
    """Decide the launch of :func:`accumulate` without running it. Nothing may be empty."""
    n, height, width, c = z.shape
    assert_nhwc("z", z)
    assert_nhwc("out", out, *z.shape)
    assert_same("out", out, z)
    for name, view in (("add", add), ("mask", mask)):
        if view is not None:
            assert_nhwc(name, view, n, height, width)
            assert_same(name, view, z)
            assert view.shape[3] <= c, f"{name} has {view.shape[3]} channels, z has {c}"
    return pixelwise(
        accumulate_kernel,
        dict(z=z, out=out, add=add, mask=mask),
        elements=_STEP_ELEMENTS,
        widths=dict(
            added=0 if add is None else add.shape[3], masked=0 if mask is None else mask.shape[3]
        ),
        constants=dict(ADD=add is not None, MASK=mask is not None),
    )


def accumulate(
    z: Tensor, out: Tensor, add: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """out = mask > 0 ? z + add : 0, computed in fp32 (fp64 for fp64), rounded once.

    Args:
        z: ``[N, H, W, C]`` view, the gradient of a convolution's input.
        out: as ``z``, same dtype; may be ``z`` or ``add`` itself.
        add: as in :func:`.conv.input_grad`, for the first channels, or None.
        mask: as there, for the last channels, or None.
    """
    if out.numel() == 0:
        return
    plan(z, out, add, mask).run(z.device)
