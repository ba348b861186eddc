"""Weight gradient by bulk copies (TMA) and warpgroup MMA, for sm_90 and newer; stride 1.

The product of :mod:`.conv_weight_grad_pointer`, with other tiles. A step covers a run of
pixels of one row: both operands then reach the tensor cores from shared memory as the
copies left them. Of a rectangle of pixels, which must be reshaped, the first operand
would go through registers. Columns keep to one tap, and an accumulator has 64 or 128 of
them; up to three such share the gradient tile, and two blocks of output channels share
the input tiles.

What lies outside the image arrives as zeros. Right of the last column of pixels it is
the gradient that is zero: a value of the input that is not finite makes NaN of all taps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._any_size import carry, launched, strides, vector
from ._common import Launch, cdiv, interpreted, needs_int64, soft_bf16, triton_accumulator
from ._device_functions import batch_offset
from ._triton import TensorDescriptor
from .conv_tma import ALIGNMENT
from .conv_weight_grad_config import WeightGradConfig, column_groups
from .conv_weight_grad_finish import sum_channels


@triton.jit
def _input(
    x_desc, chunk, n, h, w, chunks,
    KERNEL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr,
    SOFT_BF16: tl.constexpr,
):  # fmt: skip
    """The input tile of a chunk of columns: ``[COLUMNS, BLOCK_P]``.

    Past the last tap its row is outside the image, or its columns are never stored.
    """
    tap = chunk // chunks
    h += tap // KERNEL - KERNEL // 2
    w += tap % KERNEL - KERNEL // 2
    x = x_desc.load([n, h, w, (chunk % chunks) * COLUMNS]).reshape(BLOCK_P, COLUMNS)
    if SOFT_BF16:
        x = x.to(tl.float32)
    return x.trans()


@triton.jit
def _gradient(g_desc, n, h, w, first, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
              SOFT_BF16: tl.constexpr):  # fmt: skip
    """The gradient tile of a block of output channels: ``[BLOCK_P, BLOCK]``."""
    g = g_desc.load([n, h, w, first]).reshape(BLOCK_P, BLOCK)
    if SOFT_BF16:
        g = g.to(tl.float32)
    return g


@triton.jit
def _store(
    acc, products_ptr, chunk, first, c_in, c_out,
    KERNEL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(c_in, COLUMNS)
    tap = chunk // chunks
    channel = (chunk % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    oc = first + tl.arange(0, BLOCK)
    rows = products_ptr + ((tap * c_in + channel) * c_out)[:, None]
    mask = (channel < c_in)[:, None] & (oc < c_out)[None, :] & (tap < KERNEL * KERNEL)
    tl.store(rows + oc[None, :], acc, mask=mask)


@launched
def conv_weight_grad_tma_kernel(
    x_desc, g_desc_0, g_desc_1, g_ptr, products_ptr, sums_ptr, batch, height, width, each,
    in_vectors, out_vectors, g_stride_n, g_stride_h, g_stride_w,
    VECTOR: tl.constexpr, KERNEL: tl.constexpr, COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_P: tl.constexpr,
    ACC: tl.constexpr, SOFT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS chunks of COLUMNS columns by BLOCK_0 + BLOCK_1 channels of a split.

    The programs past the last column sum the gradient instead, for the shift.
    """
    c_in = in_vectors * VECTOR
    c_out = out_vectors * VECTOR
    chunks = tl.cdiv(c_in, COLUMNS)
    first = tl.program_id(1) * (BLOCK_0 + BLOCK_1)
    split = tl.program_id(2)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        sum_channels(
            g_ptr, sums_ptr, split, tl.num_programs(2), first, batch, height, width,
            g_stride_n, g_stride_h, g_stride_w, c_out, VECTOR, BLOCK_0, True, ACC, WIDE,
        )  # fmt: skip
        if BLOCK_1 > 0:
            sum_channels(
                g_ptr, sums_ptr, split, tl.num_programs(2), first + BLOCK_0, batch, height, width,
                g_stride_n, g_stride_h, g_stride_w, c_out, VECTOR, BLOCK_1, True, ACC, WIDE,
            )  # fmt: skip
    else:
        chunk = tl.program_id(0) * GROUPS
        across = tl.cdiv(width, BLOCK_P)
        acc_00 = tl.zeros((COLUMNS, BLOCK_0), dtype=ACC)
        if BLOCK_1 > 0:
            acc_01 = tl.zeros((COLUMNS, BLOCK_1), dtype=ACC)
        if GROUPS > 1:
            acc_10 = tl.zeros((COLUMNS, BLOCK_0), dtype=ACC)
            if BLOCK_1 > 0:
                acc_11 = tl.zeros((COLUMNS, BLOCK_1), dtype=ACC)
        if GROUPS > 2:
            acc_20 = tl.zeros((COLUMNS, BLOCK_0), dtype=ACC)
            if BLOCK_1 > 0:
                acc_21 = tl.zeros((COLUMNS, BLOCK_1), dtype=ACC)
        last = tl.minimum((split + 1) * each, batch * height * across)
        n = split * each // across // height
        h = split * each // across % height
        run = split * each % across
        for _ in tl.range(split * each, last):
            w = run * BLOCK_P
            g_0 = _gradient(g_desc_0, n, h, w, first, BLOCK_P, BLOCK_0, SOFT_BF16)
            if BLOCK_1 > 0:
                g_1 = _gradient(g_desc_1, n, h, w, first + BLOCK_0, BLOCK_P, BLOCK_1, SOFT_BF16)
            x_0 = _input(x_desc, chunk, n, h, w, chunks, KERNEL, COLUMNS, BLOCK_P, SOFT_BF16)
            acc_00 = tl.dot(x_0, g_0, acc_00, out_dtype=ACC)
            if BLOCK_1 > 0:
                acc_01 = tl.dot(x_0, g_1, acc_01, out_dtype=ACC)
            if GROUPS > 1:
                x_1 = _input(
                    x_desc, chunk + 1, n, h, w, chunks, KERNEL, COLUMNS, BLOCK_P, SOFT_BF16
                )
                acc_10 = tl.dot(x_1, g_0, acc_10, out_dtype=ACC)
                if BLOCK_1 > 0:
                    acc_11 = tl.dot(x_1, g_1, acc_11, out_dtype=ACC)
            if GROUPS > 2:
                x_2 = _input(
                    x_desc, chunk + 2, n, h, w, chunks, KERNEL, COLUMNS, BLOCK_P, SOFT_BF16
                )
                acc_20 = tl.dot(x_2, g_0, acc_20, out_dtype=ACC)
                if BLOCK_1 > 0:
                    acc_21 = tl.dot(x_2, g_1, acc_21, out_dtype=ACC)
            h, run = carry(h, run + 1, across)
            n, h = carry(n, h, height)
        products_ptr += batch_offset(split, KERNEL * KERNEL * c_in * c_out)
        _store(acc_00, products_ptr, chunk, first, c_in, c_out, KERNEL, COLUMNS, BLOCK_0)
        if BLOCK_1 > 0:
            other = first + BLOCK_0
            _store(acc_01, products_ptr, chunk, other, c_in, c_out, KERNEL, COLUMNS, BLOCK_1)
        if GROUPS > 1:
            _store(acc_10, products_ptr, chunk + 1, first, c_in, c_out, KERNEL, COLUMNS, BLOCK_0)
            if BLOCK_1 > 0:
                other = first + BLOCK_0
                _store(
                    acc_11, products_ptr, chunk + 1, other, c_in, c_out, KERNEL, COLUMNS, BLOCK_1
                )
        if GROUPS > 2:
            _store(acc_20, products_ptr, chunk + 2, first, c_in, c_out, KERNEL, COLUMNS, BLOCK_0)
            if BLOCK_1 > 0:
                other = first + BLOCK_0
                _store(
                    acc_21, products_ptr, chunk + 2, other, c_in, c_out, KERNEL, COLUMNS, BLOCK_1
                )


def steps(config: WeightGradConfig, g: Tensor) -> int:
    """Steps that cover the pixels of all images of ``g``, ``[N, H, W, C]``."""
    return g.shape[0] * g.shape[1] * cdiv(g.shape[2], config.pixels)


def legal(x: Tensor, g: Tensor, *, stride: int) -> bool:
    """Whether the kernel can take these arguments of :func:`.conv_weight_grad.weight_grad`.

    Bulk copies want addresses and strides that are positive multiples of 16 bytes and do
    not step over pixels. There is no warpgroup MMA of wider types that takes its operands
    pixels first.
    """
    if TensorDescriptor is None or stride != 1 or (x.dtype.itemsize > 2 and not interpreted()):
        return False
    return all(
        view.data_ptr() % ALIGNMENT == 0
        and all(
            step > 0 and step * view.dtype.itemsize % ALIGNMENT == 0 for step in view.stride()[:-1]
        )
        for view in (x, g)
    )


def plan(
    x: Tensor,
    g: Tensor,
    products: Tensor,
    sums: Tensor,
    *,
    kernel: int,
    stride: int,
    each: int,
    tf32: bool,
    config: WeightGradConfig,
) -> Launch:
    """Decide the launch. Arguments as in :func:`.conv_weight_grad.plan`."""
    assert legal(x, g, stride=stride), (
        f"{config.name} cannot take x with strides {x.stride()}, g with strides {g.stride()}, "
        f"{x.dtype}, stride {stride}"
    )
    c_in, c_out = x.shape[3], g.shape[3]
    blocks = config.block_out + (0,) * (2 - len(config.block_out))
    size = vector(x, g)

    def describe(tensor: Tensor, channels: int) -> TensorDescriptor | None:
        shape = [1, 1, config.pixels, channels]
        return TensorDescriptor.from_tensor(tensor, shape) if channels else None

    return Launch(
        conv_weight_grad_tma_kernel,
        grid=(
            column_groups(config, c_in, kernel) + 1,
            cdiv(c_out, sum(blocks)),
            products.shape[0],
        ),
        args=dict(
            x_desc=describe(x, config.columns),
            g_desc_0=describe(g, blocks[0]),
            g_desc_1=describe(g, blocks[1]),
            g_ptr=g,
            products_ptr=products,
            sums_ptr=sums,
            batch=g.shape[0],
            height=g.shape[1],
            width=g.shape[2],
            each=each,
            in_vectors=c_in // size,
            out_vectors=c_out // size,
            **strides("g", g, size),
        ),
        constants=dict(
            VECTOR=size,
            KERNEL=kernel,
            COLUMNS=config.columns,
            GROUPS=config.groups,
            BLOCK_0=blocks[0],
            BLOCK_1=blocks[1],
            BLOCK_P=config.pixels,
            ACC=triton_accumulator(x.dtype),
            SOFT_BF16=soft_bf16(x.dtype),
            WIDE=needs_int64(g),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
