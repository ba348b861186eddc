"""Convolution in int8 and fp8 by bulk copies (TMA) and warpgroup MMA, for sm_90; stride 1.

Tiles, accumulators and copies are those of :mod:`.conv_tma`. Of 255 levels nothing comes this way:
what is outside the image would have to be -128.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import fp8
from ._any_size import launched, next_chunk
from ._common import Launch, cdiv, processors
from ._device_functions import batch_offset
from ._eight_bits import biased, multiply_add, rounded, signed
from ._triton import TensorDescriptor
from .conv_config import ConvConfig
from .conv_eight_bits_config import EightBits
from .conv_tma import legal as legal_views
from .conv_tma import tiles

__all__ = ["legal", "plan", "tiles"]


@triton.jit
def _finish(
    acc, bias_ptr, multiplier_ptr, unit_ptr, pool_ptr, out_desc, feature_desc,
    n, h, w, height, width, first, c_out, levels,
    BLOCK: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, OUT: tl.constexpr,
    FEATURE: tl.constexpr, POOL: tl.constexpr, INT8: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Store the tile as activations, as a feature, or as both, and sums of the activations."""
    oc = first + tl.arange(0, BLOCK)
    exist = oc < c_out
    acc = biased(acc, tl.load(bias_ptr + oc, mask=exist, other=0.0)[:, None], INT8)
    if FEATURE:
        unit = tl.load(unit_ptr + oc, mask=exist, other=0.0)
        y = tl.maximum(acc * unit[:, None], 0.0)
        feature_desc.store([n, h, w, first], y.trans().reshape(1, TILE_H, TILE_W, BLOCK))
    if OUT:
        multiplier = tl.load(multiplier_ptr + oc, mask=exist, other=0.0)
        y = rounded(acc * multiplier[:, None], 0.0, levels, out_desc.dtype, INT8, SOFT)
        out_desc.store([n, h, w, first], y.trans().reshape(1, TILE_H, TILE_W, BLOCK))
        if POOL:
            pixel = tl.arange(0, TILE_H * TILE_W)
            inside = (h + pixel // TILE_W < height) & (w + pixel % TILE_W < width)
            kept = tl.where(inside[None, :], y.to(pool_ptr.dtype.element_ty), 0)
            tl.store(pool_ptr + oc, tl.sum(kept, axis=1), mask=exist)


@triton.jit
def _tile(
    index, x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1, feature_desc_0, feature_desc_1,
    bias_ptr, multiplier_ptr, unit_ptr, pool_ptr, height, width, c_in, c_out, levels,
    KERNEL: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr, BLOCK_K: tl.constexpr, OUT: tl.constexpr, FEATURE: tl.constexpr,
    POOL: tl.constexpr, INT8: tl.constexpr, FP8: tl.constexpr, ACC: tl.constexpr,
    SOFT: tl.constexpr,
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
    tap = 0
    c = 0
    for _ in tl.range(0, KERNEL * KERNEL * tl.cdiv(c_in, BLOCK_K)):
        corner_h = h + tap // KERNEL - KERNEL // 2
        corner_w = w + tap % KERNEL - KERNEL // 2
        x = x_desc.load([n, corner_h, corner_w, c]).reshape(TILE_H * TILE_W, BLOCK_K).trans()
        k = tap * c_in + c
        acc_0 = multiply_add(acc_0, w_desc_0.load([first, k]), x, FP8, BLOCK_K)
        if BLOCK_1 > 0:
            acc_1 = multiply_add(acc_1, w_desc_1.load([first + BLOCK_0, k]), x, FP8, BLOCK_K)
        tap, c = next_chunk(tap, c, c_in, KERNEL, BLOCK_K)

    levels = levels.to(tl.float32)
    if POOL:
        pool_ptr += batch_offset(rectangle, c_out)
    # The smaller accumulator first: while it is finished, the other one stays in registers.
    if BLOCK_1 > 0:
        _finish(
            acc_1, bias_ptr, multiplier_ptr, unit_ptr, pool_ptr, out_desc_1, feature_desc_1,
            n, h, w, height, width, first + BLOCK_0, c_out, levels,
            BLOCK_1, TILE_H, TILE_W, OUT, FEATURE, POOL, INT8, SOFT,
        )  # fmt: skip
    _finish(
        acc_0, bias_ptr, multiplier_ptr, unit_ptr, pool_ptr, out_desc_0, feature_desc_0,
        n, h, w, height, width, first, c_out, levels,
        BLOCK_0, TILE_H, TILE_W, OUT, FEATURE, POOL, INT8, SOFT,
    )  # fmt: skip


@launched
def conv_eight_bits_tma_kernel(
    x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1, feature_desc_0, feature_desc_1,
    bias_ptr, multiplier_ptr, unit_ptr, pool_ptr, height, width, tiles, c_in, c_out, levels,
    KERNEL: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr, BLOCK_K: tl.constexpr, OUT: tl.constexpr, FEATURE: tl.constexpr,
    POOL: tl.constexpr, INT8: tl.constexpr, FP8: tl.constexpr, ACC: tl.constexpr,
    SOFT: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """One program a tile, or fewer programs that each loop over tiles if PERSISTENT."""
    if PERSISTENT:
        # Flattened, the loads of the next tile start under the epilogue of this one.
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                index, x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1, feature_desc_0,
                feature_desc_1, bias_ptr, multiplier_ptr, unit_ptr, pool_ptr, height, width, c_in,
                c_out, levels, KERNEL, TILE_H, TILE_W, BLOCK_0, BLOCK_1, BLOCK_K, OUT, FEATURE,
                POOL, INT8, FP8, ACC, SOFT,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x_desc, w_desc_0, w_desc_1, out_desc_0, out_desc_1, feature_desc_0,
            feature_desc_1, bias_ptr, multiplier_ptr, unit_ptr, pool_ptr, height, width, c_in,
            c_out, levels, KERNEL, TILE_H, TILE_W, BLOCK_0, BLOCK_1, BLOCK_K, OUT, FEATURE,
            POOL, INT8, FP8, ACC, SOFT,
        )  # fmt: skip


def legal(x: Tensor, weight: Tensor, epilogue: EightBits, *, stride: int = 1) -> bool:
    """Whether the kernel can take these arguments of :func:`.conv_eight_bits.conv`."""
    if weight.dtype.itemsize > 1 or epilogue.weight_sums is not None:
        return False
    return legal_views(x, weight, *epilogue.views(), stride=stride)


def plan(
    x: Tensor, weight: Tensor, epilogue: EightBits, *, stride: int, config: ConvConfig
) -> Launch:
    """Decide the launch. Arguments as in :func:`.conv_eight_bits.plan`."""
    assert legal(x, weight, epilogue, stride=stride), (
        f"{config.name} cannot take x with strides {x.stride()}, {x.dtype}, stride {stride}"
    )
    target = epilogue.target
    c_out, kernel, _, c_in = weight.shape
    # [C_out, taps * C_in]: a block needs no reshape, which would bring it through registers.
    # The last chunk of a tap may run into the next tap; there x is zero.
    weight = weight.flatten(1)
    blocks = config.block_out + (0,) * (2 - len(config.block_out))
    pixels = [1, config.tile_h, config.tile_w]

    def describe(name: str, tensor: Tensor | None, *before: int) -> dict[str, TensorDescriptor]:
        """Of the blocks of output channels of a tile."""
        found = {}
        for i, block in enumerate(blocks):
            given = tensor is not None and block > 0
            shape = [block, config.block_k] if name == "w" else [*before, block]
            found[f"{name}_desc_{i}"] = (
                TensorDescriptor.from_tensor(tensor, shape) if given else None
            )
        return found

    arguments = epilogue.args()
    del arguments["sums_ptr"]
    constants = epilogue.constants()
    del constants["OFFSET"]
    num_tiles = target.shape[0] * tiles(config, target) * cdiv(c_out, sum(blocks))
    return Launch(
        conv_eight_bits_tma_kernel,
        grid=(min(num_tiles, processors(x.device)) if config.persistent else num_tiles,),
        args=dict(
            x_desc=TensorDescriptor.from_tensor(signed(x), [*pixels, config.block_k]),
            **describe("w", weight),
            **describe("out", epilogue.out, *pixels),
            **describe("feature", epilogue.feature, *pixels),
            **arguments,
            height=target.shape[1],
            width=target.shape[2],
            tiles=num_tiles,
            c_in=c_in,
            c_out=c_out,
        ),
        constants=dict(
            KERNEL=kernel,
            TILE_H=config.tile_h,
            TILE_W=config.tile_w,
            BLOCK_0=blocks[0],
            BLOCK_1=blocks[1],
            BLOCK_K=config.block_k,
            **constants,
            FP8=weight.dtype == fp8.ACTIVATION,
            ACC=tl.float32 if weight.dtype == fp8.ACTIVATION else tl.int32,
            PERSISTENT=config.persistent,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
