"""What the kernels share: small functions that they call."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_tile(tiles, channels, BLOCK_C: tl.constexpr):
    """(image, tile, first channel) of this program, of ``tiles`` an image.

    Programs that differ in channels only are neighbours: what they share of the
    input is then found in L2.
    """
    groups = tl.cdiv(channels, BLOCK_C)
    image_tile = tl.program_id(0) // groups
    first = (tl.program_id(0) % groups) * BLOCK_C
    return image_tile // tiles, image_tile % tiles, first


@triton.jit
def inside_image(h, w, height, width):
    """Whether pixels lie inside the image."""
    return (h >= 0) & (h < height) & (w >= 0) & (w < width)


@triton.jit
def relu(y):
    """max(y, 0), NaN for NaN."""
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_shift_relu(y, scale, shift, RELU: tl.constexpr):
    """The epilogue of every convolution: relu(y * scale + shift)."""
    y = y * scale + shift
    if RELU:
        y = relu(y)
    return y


@triton.jit
def relu_gradient(g, y):
    """Gradient g where the ReLU that put out y let it pass, which it does at NaN; else 0."""
    return tl.where(y <= 0, 0.0, g)


@triton.jit
def pixel_offsets(h, w, stride_h, stride_w, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of pixels inside their image, in elements; in 64 bits if WIDE."""
    if WIDE:
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    return (h * stride_h + w * stride_w) * VECTOR


@triton.jit
def batch_offset(n, stride_n, VECTOR: tl.constexpr = 1):
    """Offset of image n in elements, always in 64 bits."""
    return n.to(tl.int64) * stride_n * VECTOR


@triton.jit
def narrow(y, dtype: tl.constexpr, SOFT_BF16: tl.constexpr):
    """Round to nearest even in ``dtype``."""
    if SOFT_BF16:
        bits = y.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = tl.where(y == y, rounded, bits).to(tl.float32, bitcast=True)
    return y.to(dtype)


@triton.jit
def tile_statistics(y, inside, count, AXIS: tl.constexpr):
    """(count, sums, sums of squared deviations from the tile's own mean) over the pixels.

    ``y`` is a tile with its pixels along AXIS, of which ``count`` are ``inside``.
    """
    count = count.to(y.dtype)
    inside = tl.expand_dims(inside, 1 - AXIS)
    sums = tl.sum(tl.where(inside, y, 0.0), axis=AXIS)
    mean = sums / tl.maximum(count, 1.0)
    deviations = tl.where(inside, y - tl.expand_dims(mean, AXIS), 0.0)
    return count, sums, tl.sum(deviations * deviations, axis=AXIS)


@triton.jit
def store_statistics(ptr, count, sums, squares, c, channels):
    """Store channels c of the rows (count, sum, squared deviations) of a part, [3, channels]."""
    tl.store(ptr + c, tl.zeros_like(sums) + count, mask=c < channels)
    tl.store(ptr + channels + c, sums, mask=c < channels)
    tl.store(ptr + 2 * channels + c, squares, mask=c < channels)
