"""What is on offer for a layer, and running it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import installed
from .plans import Plans, Refused, plans_for
from .problems import describe

PLANS = 3
"""How many of the plans that cuDNN ranks are offered: to compile one takes up to seconds."""


def engines(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    tf32: bool = False,
    levels: int = 0,
) -> list[str]:
    """Names of the plans on offer for these arguments of :func:`run`, best first.

    Empty where the frontend is missing, where cuDNN refuses, and for a problem that is new
    while a CUDA graph is being captured.
    """
    options: dict[str, Any] = dict(stride=stride, relu=relu, tf32=tf32, levels=levels)
    plans = _find(x, weight, scale, shift, out, **options)
    return [] if isinstance(plans, str) else plans.names[:PLANS]


def why_none(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    tf32: bool = False,
    levels: int = 0,
) -> str | None:
    """The reason why :func:`engines` is empty for these arguments, or None where it is not."""
    options: dict[str, Any] = dict(stride=stride, relu=relu, tf32=tf32, levels=levels)
    plans = _find(x, weight, scale, shift, out, **options)
    return plans if isinstance(plans, str) else None


def _find(x: Tensor, *others: Tensor, **options: Any) -> Plans | str:
    """The plans for some arguments of :func:`engines`, or the reason why there are none."""
    reason = installed.why_not(x.device)
    if reason is not None:
        return reason
    try:
        return plans_for(describe(x, *others, **options))
    except Refused as refused:
        return str(refused)


def run(
    engine: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    tf32: bool = False,
    levels: int = 0,
) -> None:
    """out = relu(conv(x, weight) * scale + shift), padded by K // 2, on one of :func:`engines`.

    Products are summed in fp32, and rounded once, when they are stored. NaN stays NaN.

    With ``levels`` in eight bits: out = round(clamp((conv(x, weight) + shift) * scale, 0, levels)),
    to the nearest, of ties the even one. Products of int8 are summed as integers: what is stored is
    what :func:`vovnet_fast.arithmetic.int8.conv` stores where no sum, with its bias, reaches 2**24.

    Args:
        engine: a name that :func:`engines` gave, for these arguments or, where cuDNN ranks
            the same plan, for similar ones.
        x: ``[N, H, W, C_in]`` view in fp16, bf16, or fp32 with ``tf32``; uint8 or e4m3.
        weight: ``[C_out, K, K, C_in]``, contiguous, dtype of ``x``, int8 where that is uint8.
        scale, shift: ``[C_out]``, fp32.
        out: ``[N, H', W', C_out]`` view, dtype of ``x``. Nothing outside it is written.
        stride: of the convolution.
        relu: apply it.
        tf32: fp32 operands may be rounded to TF32.
        levels: the largest activation of eight bits, in uint8 at most 127.

    Raises:
        Refused: there is no such plan.
    """
    options: dict[str, Any] = dict(stride=stride, relu=relu, tf32=tf32, levels=levels)
    plans = plans_for(describe(x, weight, scale, shift, out, **options))
    if isinstance(plans, str):
        raise Refused(plans)
    if engine not in plans.names:
        raise Refused(f"cuDNN does not offer {engine} for these arguments")
    plans.run(engine, x, weight, scale, shift, out)
