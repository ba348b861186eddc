"""Depthwise layers of the ``cuda`` backend: one kernel, or one pass after the other.

The kernel is :mod:`.depthwise_conv`'s. The passes are the depthwise one into memory, and a 1x1
whose engine :mod:`._cuda_conv` chooses for itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _optional, selfcheck, tuning
from .._dtypes import accumulator
from ..compat import zip
from . import _cuda_conv, _extension, _predict_depthwise, reference
from . import depthwise_conv as fused
from ._engines import judge, problem, tf32, tolerance
from .depthwise_conv import SEPARATE


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    taps: Tensor,
    spatial: Callable[[], Tensor],
    stride: int = 1,
    relu: bool = True,
    pool: bool = False,
) -> Tensor | None:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    tensors = (x, taps, weight, scale, shift, out)
    return _chosen(tensors, stride=stride, relu=relu, pool=pool, spatial=spatial)


def depthwise_conv_statistics(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    taps: Tensor,
    spatial: Callable[[], Tensor],
    stride: int = 1,
) -> Tensor:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    tensors = (x, taps, weight, None, None, out)
    partials = _chosen(tensors, stride=stride, relu=False, pool=False, spatial=spatial)
    assert partials is not None
    return partials


def _chosen(
    tensors: tuple[Any, ...],
    *,
    stride: int,
    relu: bool,
    pool: bool,
    spatial: Callable[[], Tensor],
) -> Tensor | None:
    """Run a layer on the fastest engine that is right, which :mod:`vovnet_fast.tuning` finds."""
    x, taps, weight, scale, _, out = tensors
    own = fused.engines(x, taps, weight, out, stride=stride) if out.numel() else []
    options: dict[str, Any] = dict(stride=stride, relu=relu, pool=pool, spatial=spatial)
    if not own:
        return run_engine(SEPARATE, *tensors, **options)

    def run(engine: str) -> None:
        run_engine(engine, *tensors, **options)

    words = [*(["pool"] if pool else []), *(["statistics"] if scale is None else [])]
    key = problem("depthwise conv", x, weight.shape, stride, *words, "in CUDA C++")
    prepare = functools.partial(trial, *tensors, stride=stride, relu=relu, pool=pool)
    found: list[str] | tuning.Candidates = [SEPARATE, *own]
    if _optional.why_not("triton") is None:  # With which the predictions come.
        found = _predict_depthwise.candidates(
            x, weight, out, own, stride=stride, tf32=tf32(x),
            kind="statistics" if scale is None else "forward",
        )  # fmt: skip
    engine = tuning.choose(x.device, key, found, SEPARATE, run, prepare=prepare)
    return run_engine(engine, *tensors, **options)


def run_engine(
    engine: str,
    x: Tensor,
    taps: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
    spatial: Callable[[], Tensor],
) -> Tensor | None:
    """Run a layer on one engine; without ``scale`` it returns partial statistics.

    All of them leave the same result, up to rounding; they divide the pixels into other parts.
    """
    if engine != SEPARATE:
        return fused.run(
            engine, x, taps, weight, out, scale=scale, shift=shift, stride=stride,
            relu=relu, pool=pool, statistics=scale is None,
        )  # fmt: skip
    between = spatial()
    _extension.CUDA.depthwise(x, taps, between, stride=stride)
    if scale is None or shift is None:
        return _cuda_conv.conv_statistics(between, weight, out)
    return _cuda_conv.conv(between, weight, scale, shift, out, relu=relu, pool=pool)


def trial(
    x: Tensor,
    taps: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
) -> tuning.Trial:
    """Holds engines against the reference in fp32, as :func:`._engines.conv_trial` does."""
    images = selfcheck.few_images(x, out)
    source, target = selfcheck.Slot.like(x, images), selfcheck.Slot.like(out, images)
    random = torch.Generator(x.device).manual_seed(0)
    high, c_in = accumulator(x.dtype), x.shape[3]
    source.randomise(random)
    taps = torch.empty_like(taps).normal_(0, 1 / 3, generator=random)
    weight = torch.empty_like(weight).normal_(0, c_in**-0.5, generator=random)
    if scale is not None and shift is not None:
        scale, shift = torch.randn(2, len(scale), generator=random, dtype=high, device=x.device)
    between = torch.empty(*target.view.shape[:3], c_in, dtype=x.dtype, device=x.device)
    expected = torch.empty(target.view.shape, dtype=high, device=x.device)

    # What is between the two is rounded once, by whatever engine.
    made = between.to(high)
    reference.depthwise(source.view.to(high), taps.to(high), made, stride=stride)
    between.copy_(made)
    operands = (between.to(high), weight.to(high))
    exact: Tensor | None
    if scale is None or shift is None:
        exact = reference.conv_statistics(*operands, expected)
    else:
        exact = reference.conv(*operands, scale, shift, expected, relu=relu, pool=pool)

    def run(engine: str) -> list[tuple[Tensor, Tensor]]:
        with tuning.static_choices():  # Of the 1x1's engine, which has a trial of its own.
            partials = run_engine(
                engine, source.view, taps, weight, scale, shift, target.view, stride=stride,
                relu=relu, pool=pool, spatial=lambda: torch.empty_like(between),
            )  # fmt: skip
        pairs = [(target.view, expected)]
        if partials is None or exact is None:
            return pairs
        if scale is not None:
            return [*pairs, (partials.sum(1), exact.sum(1))]
        # Rows of statistics have different magnitudes.
        return [*pairs, *zip(reference.batch_norm_merge(partials), exact[0], strict=True)]

    return judge(target, run, tolerance(x))
