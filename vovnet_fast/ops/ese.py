"""Effective Squeeze-Excitation and identity add."""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from .. import backends
from ..specs import Gate
from . import _checks
from ._checks import nchw, nhwc


def run(
    backend: ModuleType,
    z: Tensor,
    partials: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    kind: Gate,
    identity: Tensor | None,
    out: Tensor,
) -> None:
    """out = z * gate(fc(mean(z))) + identity on ``[N, H, W, C]`` views.

    ``partials`` are those that the convolution left when it made ``z``.
    """
    num_pixels = z.shape[1] * z.shape[2]
    gates = backend.gates(partials, num_pixels, fc_weight, fc_bias, kind)
    backend.apply_gates(z, gates, identity, out)


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
    """x * gate(fc(global_average_pool(x))) + identity.

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
        NotImplementedError: a gradient would be needed.
        BackendError: the backend that was asked for cannot run.
    """
    _checks.activations("ese", "x", x)
    check("ese", fc_weight, fc_bias, kind, x.shape[1], x)
    if identity is not None and (identity.shape != x.shape or identity.dtype != x.dtype):
        raise ValueError(
            f"ese: identity must be like x, {list(x.shape)} {x.dtype}, "
            f"got {list(identity.shape)} {identity.dtype}"
        )
    if min(x.shape[2:]) == 0:
        raise ValueError(f"ese: the mean over no pixels is undefined, got {list(x.shape)}")
    extra = () if identity is None else (identity,)
    _checks.no_gradient("ese", x, fc_weight, fc_bias, *extra)
    out: Tensor = torch.ops.vovnet_fast.ese(x, fc_weight, fc_bias, kind, identity)
    return out


@torch.library.custom_op("vovnet_fast::ese", mutates_args=())
def _ese(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, kind: str, identity: Tensor | None
) -> Tensor:
    view = nhwc(x)
    out = view.new_empty(view.shape)
    # Standing alone there is no convolution to leave partial sums: one a pixel row.
    partials = view.sum(2, dtype=_checks.accumulator(x.dtype))
    backend = backends.get(x.device)
    added = None if identity is None else nhwc(identity)
    run(backend, view, partials, fc_weight, fc_bias, cast(Gate, kind), added, out)
    return nchw(out)


@_ese.register_fake
def _(x, fc_weight, fc_bias, kind, identity):
    n, c, h, w = x.shape
    return nchw(x.new_empty(n, h, w, c))
