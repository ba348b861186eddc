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

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._any_size import launched, next_chunk
from ._common import Launch, cdiv, interpreted, processors, soft_bf16, triton_accumulator
from ._device_functions import (
    batch_offset,
    narrow,
    relu_gradient,
    scale_shift_relu,
    store_statistics,
    tile_statistics,
)
from ._triton import ROUNDS_TO_TF32, TensorDescriptor
from .conv_config import ConvConfig, Epilogue

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
    acc, scale_ptr, shift_ptr, pool_ptr, add_desc, mask_desc, out_desc, statistics_ptr,
    n, h, w, height, width, first, c_out, unmasked,
    BLOCK: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, SCALE: tl.constexpr,
    RELU: tl.constexpr, POOL: tl.constexpr, ADD: tl.constexpr, MASK: tl.constexpr,
    UNMASKED: tl.constexpr, STATISTICS: tl.constexpr, SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """Store the tile after its epilogue; :class:`.conv_config.Epilogue` says what that may be."""
    oc = first + tl.arange(0, BLOCK)
    pixel = tl.arange(0, TILE_H * TILE_W)
    # Pixels outside the image, which are not stored, hold anything.
    inside = (h + pixel // TILE_W < height) & (w + pixel % TILE_W < width)
    y = acc
    if SCALE:
        scale = tl.load(scale_ptr + oc, mask=oc < c_out, other=0.0)
        shift = tl.load(shift_ptr + oc, mask=oc < c_out, other=0.0)
        y = scale_shift_relu(y, scale[:, None], shift[:, None], RELU)
    if POOL:
        sums = tl.sum(tl.where(inside[None, :], y, 0.0), axis=1)
        tl.store(pool_ptr + oc, sums, mask=oc < c_out)
    # Bulk copies bring these tiles: the accumulator's layout would make scattered loads.
    # Channels that the tensors do not have arrive as zeros, and cause no traffic.
    if ADD:
        other = add_desc.load([n, h, w, first])
        y += other.reshape(TILE_H * TILE_W, BLOCK).trans().to(y.dtype)
    if MASK:
        activation = mask_desc.load([n, h, w, first - unmasked])
        activation = activation.reshape(TILE_H * TILE_W, BLOCK).trans().to(y.dtype)
        if UNMASKED:
            activation = tl.where((oc < unmasked)[:, None], 1.0, activation)
        y = relu_gradient(y, activation)
    y = narrow(y, out_desc.dtype, SOFT_BF16)
    out_desc.store([n, h, w, first], y.trans().reshape(1, TILE_H, TILE_W, BLOCK))
    if STATISTICS:
        count = tl.minimum(height - h, TILE_H) * tl.minimum(width - w, TILE_W)
        count, sums, squares = tile_statistics(y.to(acc.dtype), inside, count, 1)
        store_statistics(statistics_ptr, count, sums, squares, oc, c_out)


@triton.jit
def _tile(
    index, x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1,
    scale_ptr, shift_ptr, pool_ptr, add_desc_0, add_desc_1, mask_desc_0, mask_desc_1,
    statistics_ptr, height, width, c_in, c_out, unmasked, KERNEL: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
    BLOCK_K: tl.constexpr, SCALE: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    ADD: tl.constexpr, MASK: tl.constexpr, UNMASKED: tl.constexpr, STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """Compute tile ``index``: a rectangle of pixels by BLOCK_0 + BLOCK_1 output channels."""
    BLOCK: tl.constexpr = BLOCK_0 + BLOCK_1
    # Tiles that share pixels are neighbours: the second one finds them in L2.
    groups = tl.cdiv(c_out, BLOCK)
    first = (index % groups) * BLOCK
    rectangle = index // groups
    across = tl.cdiv(width, TILE_W)
    down = tl.cdiv(height, TILE_H)
    n = rectangle // (across * down)
    h = (rectangle // across) % down * TILE_H
    w = rectangle % across * TILE_W

    acc_0 = tl.zeros((BLOCK_0, TILE_H * TILE_W), dtype=ACC)
    if BLOCK_1 > 0:
        acc_1 = tl.zeros((BLOCK_1, TILE_H * TILE_W), dtype=ACC)
    # One flat loop over taps and chunks: nested loops would drain the pipeline at every tap.
    tap = 0
    c = 0
    for _ in tl.range(0, KERNEL * KERNEL * tl.cdiv(c_in, BLOCK_K)):
        corner_h = h + tap // KERNEL - KERNEL // 2
        corner_w = w + tap % KERNEL - KERNEL // 2
        x = x_desc.load([n, corner_h, corner_w, c]).reshape(TILE_H * TILE_W, BLOCK_K).trans()
        k = tap * c_in + c
        acc_0 = _multiply_add(acc_0, x, w_desc_0, first, k, PRECISION, SOFT_BF16)
        if BLOCK_1 > 0:
            acc_1 = _multiply_add(acc_1, x, w_desc_1, first + BLOCK_0, k, PRECISION, SOFT_BF16)
        tap, c = next_chunk(tap, c, c_in, KERNEL, BLOCK_K)

    if POOL:
        pool_ptr += batch_offset(rectangle, c_out)
    if STATISTICS:
        statistics_ptr += batch_offset(rectangle, 3 * c_out)
    # The smaller accumulator first: while it is finished, the other one stays in registers.
    if BLOCK_1 > 0:
        _finish(
            acc_1, scale_ptr, shift_ptr, pool_ptr, add_desc_1, mask_desc_1, out_desc_1,
            statistics_ptr, n, h, w, height, width, first + BLOCK_0, c_out, unmasked, BLOCK_1,
            TILE_H, TILE_W, SCALE, RELU, POOL, ADD, MASK, UNMASKED, STATISTICS, SOFT_BF16,
        )  # fmt: skip
    _finish(
        acc_0, scale_ptr, shift_ptr, pool_ptr, add_desc_0, mask_desc_0, out_desc_0,
        statistics_ptr, n, h, w, height, width, first, c_out, unmasked, BLOCK_0,
        TILE_H, TILE_W, SCALE, RELU, POOL, ADD, MASK, UNMASKED, STATISTICS, SOFT_BF16,
    )  # fmt: skip


@launched
def conv_tma_kernel(
    x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1,
    scale_ptr, shift_ptr, pool_ptr, add_desc_0, add_desc_1, mask_desc_0, mask_desc_1,
    statistics_ptr, height, width, tiles, c_in, c_out, unmasked, KERNEL: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
    BLOCK_K: tl.constexpr, SCALE: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    ADD: tl.constexpr, MASK: tl.constexpr, UNMASKED: tl.constexpr, STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, SOFT_BF16: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """One program a tile, or fewer programs that each loop over tiles if PERSISTENT."""
    if PERSISTENT:
        # Flattened, the loads of the next tile start under the epilogue of this one.
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                index, x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1,
                scale_ptr, shift_ptr, pool_ptr, add_desc_0, add_desc_1, mask_desc_0, mask_desc_1,
                statistics_ptr, height, width, c_in, c_out, unmasked,
                KERNEL, TILE_H, TILE_W, BLOCK_0, BLOCK_1, BLOCK_K, SCALE, RELU, POOL,
                ADD, MASK, UNMASKED, STATISTICS, PRECISION, ACC, SOFT_BF16,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1,
            scale_ptr, shift_ptr, pool_ptr, add_desc_0, add_desc_1, mask_desc_0, mask_desc_1,
            statistics_ptr, height, width, c_in, c_out, unmasked,
            KERNEL, TILE_H, TILE_W, BLOCK_0, BLOCK_1, BLOCK_K, SCALE, RELU, POOL,
            ADD, MASK, UNMASKED, STATISTICS, PRECISION, ACC, SOFT_BF16,
        )  # fmt: skip


def tiles(config: ConvConfig, out: Tensor) -> int:
    """Tiles of one image of ``out``, ``[N, H, W, C]``, for one group of output channels."""
    _, height, width, _ = out.shape
    return cdiv(height, config.tile_h) * cdiv(width, config.tile_w)


def legal(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *others: Tensor,
    stride: int = 1,
    tf32: bool = False,
) -> bool:
    """Whether the kernel can take these arguments of :func:`.conv.conv`.

    Bulk copies want addresses and strides that are multiples of 16 bytes and do not
    step over pixels. There is no fp32 warpgroup MMA other than TF32, whose operands the
    copies must round.

    Args:
        x, weight, out, stride, tf32: as there.
        others: activations of the epilogue.
    """
    if TensorDescriptor is None:
        return False
    multiplied = x.dtype.itemsize <= 2 or (tf32 and ROUNDS_TO_TF32) or interpreted()
    if stride != 1 or not multiplied:
        return False
    views = (x, out, weight.flatten(1), *others)
    return all(
        view.data_ptr() % ALIGNMENT == 0
        and all(step * view.dtype.itemsize % ALIGNMENT == 0 for step in view.stride()[:-1])
        for view in views
    )


def plan(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    *,
    stride: int,
    tf32: bool,
    config: ConvConfig,
) -> Launch:
    """Decide the launch. Arguments as in :func:`.conv.conv`."""
    assert legal(x, weight, out, *epilogue.views(), stride=stride, tf32=tf32), (
        f"{config.name} cannot take x with strides {x.stride()}, out with strides "
        f"{out.stride()}, {x.dtype}, stride {stride}"
    )
    c_out, kernel, _, c_in = weight.shape
    # [C_out, taps * C_in]: a block needs no reshape, which would bring it through registers.
    # The last chunk of a tap may run into the next tap; there x is zero.
    weight = weight.flatten(1)
    blocks = config.block_out + (0,) * (2 - len(config.block_out))
    pixels = [1, config.tile_h, config.tile_w]
    rounding: dict[str, Any] = {"round_f32_to_tf32": True} if tf32 and ROUNDS_TO_TF32 else {}

    def describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, block, **rounding)

    def describe_tiles(name: str, tensor: Tensor | None) -> dict[str, TensorDescriptor | None]:
        """Of the blocks of output channels of a tile."""
        return {
            f"{name}_desc_{i}": (
                TensorDescriptor.from_tensor(tensor, [*pixels, block])
                if tensor is not None and block
                else None
            )
            for i, block in enumerate(blocks)
        }

    unmasked = 0 if epilogue.mask is None else c_out - epilogue.mask.shape[3]
    num_tiles = out.shape[0] * tiles(config, out) * cdiv(c_out, sum(blocks))
    return Launch(
        conv_tma_kernel,
        grid=(min(num_tiles, processors(x.device)) if config.persistent else num_tiles,),
        args=dict(
            x_desc=describe(x, [*pixels, config.block_k]),
            w_desc_0=describe(weight, [blocks[0], config.block_k]),
            w_desc_1=describe(weight, [blocks[1], config.block_k]) if blocks[1] else None,
            **describe_tiles("out", out),
            **describe_tiles("add", epilogue.add),
            **describe_tiles("mask", epilogue.mask),
            **epilogue.args(),
            height=out.shape[1],
            width=out.shape[2],
            tiles=num_tiles,
            c_in=c_in,
            c_out=c_out,
            unmasked=unmasked,
        ),
        constants=dict(
            KERNEL=kernel,
            TILE_H=config.tile_h,
            TILE_W=config.tile_w,
            BLOCK_0=blocks[0],
            BLOCK_1=blocks[1],
            BLOCK_K=config.block_k,
            **epilogue.constants(),
            UNMASKED=unmasked > 0,
            PRECISION="tf32" if tf32 else "ieee",
            ACC=triton_accumulator(x.dtype),
            SOFT_BF16=soft_bf16(x.dtype),
            PERSISTENT=config.persistent,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
