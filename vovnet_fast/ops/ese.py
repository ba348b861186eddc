"""Effective Squeeze-Excitation and identity add."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import backends
from .._dtypes import accumulator
from ..specs import Gate
from . import _checks, _library
from ._checks import nchw, nhwc


class Gates(NamedTuple):
    """``[N, C]`` gates and the means they come from, in fp32 (fp64 for fp64)."""

    gates: Tensor
    mean: Tensor


def run(
    backend: ModuleType,
    z: Tensor,
    partials: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    kind: Gate,
    identity: Tensor | None,
    out: Tensor,
) -> Gates:
    """out = z * gate(fc(mean(z))) + identity on ``[N, H, W, C]`` views.

    ``partials`` are those that the convolution left when it made ``z``.
    """
    num_pixels = z.shape[1] * z.shape[2]
    gates, mean = backend.gates(partials, num_pixels, fc_weight, fc_bias, kind)
    backend.apply_gates(z, gates, identity, out)
    return Gates(gates, mean)


def gates_backward(
    backend: ModuleType, dout: Tensor, z: Tensor, kept: Gates, fc_weight: Tensor, kind: Gate
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``dout``, the gradient of the gated features, means for the gates.

    Returns:
        the share of every pixel in the gradient of the mean, ``[N, C]``, and the gradients
        of the fully connected layer's weight and bias, all in fp32 (fp64 for fp64).
    """
    num_pixels = z.shape[1] * z.shape[2]
    dgates = backend.gate_sums(dout, z)
    found: tuple[Tensor, Tensor, Tensor] = backend.gates_backward(
        dgates, kept.gates, kept.mean, num_pixels, fc_weight, kind
    )
    return found


_FORWARD = ("gates", "apply_gates")
_BACKWARD = ("gate_sums", "gates_backward", "apply_gates")


def check(op: str, fc_weight: Tensor, fc_bias: Tensor, kind: str, channels: int, x: Tensor) -> None:
    """Refuse parameters that do not fit the activations."""
    _checks.parameter(op, "fc weight", fc_weight, (channels, channels), x)
    _checks.parameter(op, "fc bias", fc_bias, (channels,), x)
    if not fc_weight.is_contiguous():
        raise ValueError(f"{op}: fc weight must be contiguous, got strides {fc_weight.stride()}")
    if kind not in ("hard_sigmoid", "sigmoid"):
        raise ValueError(f"{op}: kind must be hard_sigmoid or sigmoid, got {kind!r}")


def ese(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    kind: Gate = "hard_sigmoid",
    identity: Tensor | None = None,
) -> Tensor:
    """x * gate(fc(global_average_pool(x))) + identity. Differentiable.

    Args:
        x: ``[N, C, H, W]`` in fp16, bf16, fp32 or fp64.
        fc_weight: ``[C, C]``, any floating dtype.
        fc_bias: ``[C]``, any floating dtype.
        kind: of the gate, ``hard_sigmoid`` or ``sigmoid``.
        identity: as ``x``, or None.

    Returns:
        ``[N, C, H, W]``, ``channels_last``. The pool and the gate are computed in
        fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    _checks.activations("ese", "x", x)
    _checks.transforms("ese", x, fc_weight, fc_bias, identity)
    check("ese", fc_weight, fc_bias, kind, x.shape[1], x)
    if identity is not None and (identity.shape != x.shape or identity.dtype != x.dtype):
        raise ValueError(
            f"ese: identity must be like x, {list(x.shape)} {x.dtype}, "
            f"got {list(identity.shape)} {identity.dtype}"
        )
    if min(x.shape[2:]) == 0:
        raise ValueError(f"ese: the mean over no pixels is undefined, got {list(x.shape)}")
    out: Tensor = torch.ops.vovnet_fast.ese(
        x, fc_weight, fc_bias, kind, identity, backends.chosen()
    )[0]
    return out


@_library.op("ese")
@_checks.in_given_dtypes
def _ese(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, kind: str, identity: Tensor | None, choice: str
) -> list[Tensor]:
    view = nhwc(x)
    out = view.new_empty(view.shape)
    # Standing alone there is no convolution to leave partial sums: one a pixel row.
    partials = view.sum(2, dtype=accumulator(x.dtype))
    backend = backends.get(x.device, x.dtype, _FORWARD, choice)
    added = None if identity is None else nhwc(identity)
    kept = run(backend, view, partials, fc_weight, fc_bias, cast(Gate, kind), added, out)
    return [nchw(out), *kept]


@_ese.register_fake
def _(x, fc_weight, fc_bias, kind, identity, choice):
    n, c, h, w = x.shape
    kept = [x.new_empty(n, c, dtype=accumulator(x.dtype)) for _ in Gates._fields]
    return [nchw(x.new_empty(n, h, w, c)), *kept]


@_library.op("ese_backward")
@_checks.in_given_dtypes
def _ese_backward(
    dout: Tensor,
    x: Tensor,
    gates: Tensor,
    mean: Tensor,
    fc_weight: Tensor,
    kind: str,
    choice: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backend, view = backends.get(x.device, x.dtype, _BACKWARD, choice), nhwc(dout)
    share, dweight, dbias = gates_backward(
        backend, view, nhwc(x), Gates(gates, mean), fc_weight, cast(Gate, kind)
    )
    dx = view.new_empty(view.shape)
    # dx = dout * gates + share, the latter being the same for all pixels of an image.
    spread = share.to(dx.dtype)[:, None, None, :].expand(dx.shape)
    backend.apply_gates(view, gates, spread, dx)
    return nchw(dx), dweight, dbias


@_ese_backward.register_fake
def _(dout, x, gates, mean, fc_weight, kind, choice):
    n, c, h, w = x.shape
    dweight, dbias = gates.new_empty(c, c), gates.new_empty(c)
    return nchw(dout.new_empty(n, h, w, c)), dweight, dbias


_checks.backward_op(_ese_backward, "ese")


def _setup_context(ctx, inputs, output):
    x, fc_weight, fc_bias, ctx.kind, identity, ctx.choice = inputs
    ctx.identity, ctx.bias_dtype = identity is not None, fc_bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, fc_weight, *output[1:])


def _backward(ctx, grads):
    [dout, *_] = grads
    if dout is None:
        return None, None, None, None, None, None
    x, fc_weight, *kept = ctx.saved_tensors
    found: Any = _checks.for_each_gradient(
        lambda g: torch.ops.vovnet_fast.ese_backward(g, x, *kept, fc_weight, ctx.kind, ctx.choice),
        dout,
    )
    dx, dweight, dbias = found
    identity = dout if ctx.identity else None
    return dx, dweight.to(fc_weight.dtype), dbias.to(ctx.bias_dtype), None, identity, None


_ese.register_autograd(_backward, _setup_context)
