"""3x3 max pool with stride 2."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .. import backends
from ..specs import Pool
from . import _checks, _library, rooms
from ._checks import nchw, nhwc


def output_size(height: int, width: int, mode: Pool) -> tuple[int, int]:
    """Height and width of the output.

    ``ceil`` rounds up, but the last window starts inside the image, which is
    height // 2; ``padded`` pads every side by one.
    """
    if mode == "ceil":
        return height // 2, width // 2
    return (height - 1) // 2 + 1, (width - 1) // 2 + 1


def needs(*, backward: bool) -> tuple[str, ...]:
    """The functions of a backend that the op uses, with those of its backward pass or without."""
    return ("max_pool", "max_pool_backward") if backward else ("max_pool",)


def max_pool(x: Tensor, mode: Pool = "ceil", *, width: int = 0) -> Tensor:
    """3x3 max pool, stride 2. A NaN in a window makes its output NaN. Differentiable.

    Args:
        x: ``[N, C, H, W]`` in fp16, bf16, fp32 or fp64.
        mode: ``ceil`` or ``padded``, see :func:`vovnet_fast.reference.max_pool`.
        width: channels of the concat buffer of the OSA block that takes the output, which
            is then made inside such a buffer; 0 for memory of its own.

    Returns:
        ``[N, C, H', W']``, ``channels_last``. For the backward pass, one byte an element
        of it is kept.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    _checks.activations("max_pool", "x", x)
    _checks.transforms("max_pool", x)
    if mode not in ("ceil", "padded"):
        raise ValueError(f"max_pool: mode must be ceil or padded, got {mode!r}")
    if mode == "ceil" and min(x.shape[2:]) < 2:
        raise ValueError(f"max_pool: ceil mode needs maps of at least 2x2, got {list(x.shape)}")
    keep, choice = _checks.needs_gradient(x), backends.chosen()
    if _checks.traced(x):
        out: Tensor = torch.ops.vovnet_fast.max_pool(x, mode, keep, choice)[0]
    elif keep:
        out = _MaxPool.apply(x, mode, choice, width)
    else:
        out = _forward(x, mode, False, choice, width)[0]
    return out


def _forward(x: Tensor, mode: Pool, keep: bool, choice: str, width: int = 0) -> list[Tensor]:
    """The output, and with ``keep`` the position of the maximum in each window."""
    view = nhwc(x)
    n, c = x.shape[:2]
    size = output_size(x.shape[2], x.shape[3], mode)
    out = rooms.new(view, n, *size, c, max(width, c))
    argmax = view.new_empty(out.shape, dtype=torch.uint8) if keep else None
    backend = backends.get(x.device, x.dtype, needs(backward=keep), choice)
    backend.max_pool(view, out, mode, argmax)
    return [nchw(out)] if argmax is None else [nchw(out), argmax]


@_library.op("max_pool")
def _max_pool(x: Tensor, mode: str, keep: bool, choice: str) -> list[Tensor]:
    return _forward(x, cast(Pool, mode), keep, choice)


@_max_pool.register_fake
def _(x, mode, keep, choice):
    size = output_size(x.shape[2], x.shape[3], mode)
    out = x.new_empty(x.shape[0], *size, x.shape[1])
    return [nchw(out), torch.empty_like(out, dtype=torch.uint8)] if keep else [nchw(out)]


@_library.op("max_pool_backward")
def _max_pool_backward(
    dout: Tensor, argmax: Tensor, height: int, width: int, mode: str, choice: str
) -> Tensor:
    view = nhwc(dout)
    out = view.new_empty(dout.shape[0], height, width, dout.shape[1])
    backend = backends.get(dout.device, dout.dtype, needs(backward=True), choice)
    backend.max_pool_backward(view, argmax, out, cast(Pool, mode))
    return nchw(out)


@_max_pool_backward.register_fake
def _(dout, argmax, height, width, mode, choice):
    return nchw(dout.new_empty(dout.shape[0], height, width, dout.shape[1]))


_checks.backward_op(_max_pool_backward, "max_pool")


def _gradient(ctx, dout):
    if dout is None:
        return None
    [argmax] = ctx.saved_tensors
    arguments = (dout, argmax, *ctx.size, ctx.mode, ctx.choice)
    return _checks.call(_max_pool_backward, ctx.choice, *arguments)


def _setup_context(ctx, inputs, output):
    x, ctx.mode, _, ctx.choice = inputs
    ctx.size = x.shape[2:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _op_backward(ctx, grads):
    return _gradient(ctx, grads[0]), None, None, None


_max_pool.register_autograd(_op_backward, _setup_context)


class _MaxPool(torch.autograd.Function):
    """The same outside of torch.compile, where the output can be given room."""

    @staticmethod
    def forward(ctx, x, mode, choice, width):
        out, argmax = _forward(x, mode, True, choice, width)
        ctx.mode, ctx.choice, ctx.size = mode, choice, x.shape[2:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(argmax)
        return rooms.owned(out)

    @staticmethod
    def backward(ctx, dout):
        [found] = _checks.for_each_gradient(lambda g: [_gradient(ctx, g)], dout)
        return found, None, None, None
