"""Convolution by bulk copies (TMA) and warpgroup MMA, for sm_90 and newer; stride 1.

Accumulators are channel-major,

    acc[block, pixels] = sum over (tap, channel chunk) of w[block, chunk] @ x[pixels, chunk]^T

because both operands then reach the tensor cores from shared memory as the copies
left them. The pixel-major product takes its first operand, the reshaped input tile,
through registers, with a wait in the middle of every step.

A copy fetches the rectangle of pixels of one tap. What lies outside the image arrives
as zeros and is never stored, so the padding costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import (
    Launch,
    batch_offset,
    interpreted,
    narrow,
    processors,
    scale_shift_relu,
    soft_bf16,
    triton_accumulator,
)
from .conv_config import ConvConfig

ALIGNMENT = 16
"""Bytes that addresses and strides of bulk copies are multiples of."""


@triton.jit
def _multiply_add(acc, x, w_desc, first, k, PRECISION: tl.constexpr, SOFT_BF16: tl.constexpr):
    """acc + weights[first:, k:] @ x for one block of output channels: ``[BLOCK, pixels]``."""
    w = w_desc.load([first, k])
    if SOFT_BF16:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, x, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _finish(
    acc, scale_ptr, shift_ptr, out_desc, pool_ptr, n, h, w, height, width, first,
    C_OUT: tl.constexpr, BLOCK: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    RELU: tl.constexpr, POOL: tl.constexpr, SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """Scale, shift, ReLU, store the tile, and its sums over the pixels."""
    oc = first + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + oc, mask=oc < C_OUT, other=0.0)
    shift = tl.load(shift_ptr + oc, mask=oc < C_OUT, other=0.0)
    y = scale_shift_relu(acc, scale[:, None], shift[:, None], RELU)
    if POOL:
        # Pixels outside the image hold relu(shift), not zero.
        pixel = tl.arange(0, TILE_H * TILE_W)
        inside = (h + pixel // TILE_W < height) & (w + pixel % TILE_W < width)
        sums = tl.sum(tl.where(inside[None, :], y, 0.0), axis=1)
        tl.store(pool_ptr + oc, sums, mask=oc < C_OUT)
    y = narrow(y, out_desc.dtype, SOFT_BF16)
    out_desc.store([n, h, w, first], y.trans().reshape(1, TILE_H, TILE_W, BLOCK))


@triton.jit
def _tile(
    index, x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1, scale_ptr, shift_ptr, pool_ptr,
    height, width,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
    BLOCK_K: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """Compute tile ``index``: a rectangle of pixels by BLOCK_0 + BLOCK_1 output channels."""
    BLOCK: tl.constexpr = BLOCK_0 + BLOCK_1
    # Tiles that share pixels are neighbours: the second one finds them in L2.
    groups: tl.constexpr = (C_OUT + BLOCK - 1) // BLOCK
    first = (index % groups) * BLOCK
    rectangle = index // groups
    across = tl.cdiv(width, TILE_W)
    down = tl.cdiv(height, TILE_H)
    n = rectangle // (across * down)
    h = (rectangle // across) % down * TILE_H
    w = rectangle % across * TILE_W

    CHUNKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    acc_0 = tl.zeros((BLOCK_0, TILE_H * TILE_W), dtype=ACC)
    if BLOCK_1 > 0:
        acc_1 = tl.zeros((BLOCK_1, TILE_H * TILE_W), dtype=ACC)
    # One flat loop over taps and chunks: nested loops would drain the pipeline at every tap.
    for step in tl.range(0, KERNEL * KERNEL * CHUNKS):
        tap = step // CHUNKS
        c = (step % CHUNKS) * BLOCK_K
        corner_h = h + tap // KERNEL - KERNEL // 2
        corner_w = w + tap % KERNEL - KERNEL // 2
        x = x_desc.load([n, corner_h, corner_w, c]).reshape(TILE_H * TILE_W, BLOCK_K).trans()
        acc_0 = _multiply_add(acc_0, x, w_desc_0, first, tap * C_IN + c, PRECISION, SOFT_BF16)
        if BLOCK_1 > 0:
            acc_1 = _multiply_add(
                acc_1, x, w_desc_1, first + BLOCK_0, tap * C_IN + c, PRECISION, SOFT_BF16
            )

    if POOL:
        pool_ptr += batch_offset(rectangle, C_OUT)
    _finish(
        acc_0, scale_ptr, shift_ptr, out_desc_0, pool_ptr, n, h, w, height, width, first,
        C_OUT, BLOCK_0, TILE_H, TILE_W, RELU, POOL, SOFT_BF16,
    )  # fmt: skip
    if BLOCK_1 > 0:
        _finish(
            acc_1, scale_ptr, shift_ptr, out_desc_1, pool_ptr, n, h, w, height, width,
            first + BLOCK_0, C_OUT, BLOCK_1, TILE_H, TILE_W, RELU, POOL, SOFT_BF16,
        )  # fmt: skip


@triton.jit(do_not_specialize=["height", "width", "tiles"])
def conv_tma_kernel(
    x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1, scale_ptr, shift_ptr, pool_ptr,
    height, width, tiles,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
    BLOCK_K: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, SOFT_BF16: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """One program a tile, or fewer programs that each loop over tiles if PERSISTENT."""
    if PERSISTENT:
        # Flattened, the loads of the next tile start under the epilogue of this one.
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                index, x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1,
                scale_ptr, shift_ptr, pool_ptr, height, width,
                C_IN, C_OUT, KERNEL, TILE_H, TILE_W, BLOCK_0, BLOCK_1, BLOCK_K,
                RELU, POOL, PRECISION, ACC, SOFT_BF16,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1,
            scale_ptr, shift_ptr, pool_ptr, height, width,
            C_IN, C_OUT, KERNEL, TILE_H, TILE_W, BLOCK_0, BLOCK_1, BLOCK_K,
            RELU, POOL, PRECISION, ACC, SOFT_BF16,
        )  # fmt: skip


def tiles(config: ConvConfig, out: Tensor) -> int:
    """Tiles of one image of ``out``, ``[N, H, W, C]``, for one group of output channels."""
    _, height, width, _ = out.shape
    return triton.cdiv(height, config.tile_h) * triton.cdiv(width, config.tile_w)


def legal(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1, tf32: bool = False) -> bool:
    """Whether the kernel can take these arguments of :func:`.conv.conv`.

    Bulk copies want addresses and strides that are multiples of 16 bytes and do not
    step over pixels. There is no fp32 warpgroup MMA other than TF32.
    """
    if stride != 1 or (x.dtype.itemsize > 2 and not tf32 and not interpreted()):
        return False
    views = (x, out, weight.flatten(1))
    return all(
        view.data_ptr() % ALIGNMENT == 0
        and all(step * view.dtype.itemsize % ALIGNMENT == 0 for step in view.stride()[:-1])
        for view in views
    )


def plan(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool_partials: Tensor | None,
    tf32: bool,
    config: ConvConfig,
) -> Launch:
    """Decide the launch. Arguments as in :func:`.conv.conv`."""
    assert legal(x, weight, out, stride=stride, tf32=tf32), (
        f"{config.name} cannot take x with strides {x.stride()}, out with strides "
        f"{out.stride()}, {x.dtype}, stride {stride}"
    )
    c_out, kernel, _, c_in = weight.shape
    # [C_out, taps * C_in]: a block needs no reshape, which would bring it through registers.
    # The last chunk of a tap may run into the next tap; there x is zero.
    weight = weight.flatten(1)
    blocks = config.block_out + (0,) * (2 - len(config.block_out))
    pixels = [1, config.tile_h, config.tile_w]

    def describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, block, round_f32_to_tf32=tf32)

    num_tiles = out.shape[0] * tiles(config, out) * triton.cdiv(c_out, sum(blocks))
    return Launch(
        conv_tma_kernel,
        grid=(min(num_tiles, processors(x.device)) if config.persistent else num_tiles,),
        args=dict(
            x_desc=describe(x, [*pixels, config.block_k]),
            w_desc_0=describe(weight, [blocks[0], config.block_k]),
            w_desc_1=describe(weight, [blocks[1], config.block_k]) if blocks[1] else None,
            out_desc_0=TensorDescriptor.from_tensor(out, [*pixels, blocks[0]]),
            out_desc_1=(
                TensorDescriptor.from_tensor(out, [*pixels, blocks[1]]) if blocks[1] else None
            ),
            scale_ptr=scale,
            shift_ptr=shift,
            pool_ptr=pool_partials,
            height=out.shape[1],
            width=out.shape[2],
            tiles=num_tiles,
        ),
        constants=dict(
            C_IN=c_in,
            C_OUT=c_out,
            KERNEL=kernel,
            TILE_H=config.tile_h,
            TILE_W=config.tile_w,
            BLOCK_0=blocks[0],
            BLOCK_1=blocks[1],
            BLOCK_K=config.block_k,
            RELU=relu,
            POOL=pool_partials is not None,
            PRECISION="tf32" if tf32 else "ieee",
            ACC=triton_accumulator(x.dtype),
            SOFT_BF16=soft_bf16(x.dtype),
            PERSISTENT=config.persistent,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
