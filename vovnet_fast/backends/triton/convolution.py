"""Convolutions, and those that leave statistics of the batch: on which engine, and on one."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..._dtypes import accumulator
from .. import _aten, conv_sm90, cudnn_graph
from .._engines import ATEN, aten, conv_trial, problem, statistics_trial, tf32
from .choosing import choose, form, load_kernels


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = True,
    pool: bool = False,
) -> Tensor | None:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    if out.numel() == 0:
        return scale.new_zeros(x.shape[0], 1, weight.shape[0]) if pool else None
    engine = choose_engine(x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)
    return run_engine(engine, x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)


def choose_engine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
) -> str:
    """The fastest engine for a layer.

    That is :data:`ATEN`, one of :func:`.cudnn_graph.engines` or :func:`.conv_sm90.engines`, or
    the name of a Triton configuration. Those that are measured must agree with the reference first.
    """
    layer = load_kernels().conv.layer(x, weight, out, stride=stride, tf32=tf32(x))
    graphs: list[str] = []
    if not pool:  # Its graph has no partial sums.
        options: dict[str, Any] = dict(stride=stride, relu=relu, tf32=tf32(x))
        graphs = cudnn_graph.engines(x, weight, scale, shift, out, **options)
    own = conv_sm90.engines(x, weight, out, stride=stride)
    offered = {"cudnn-graph": graphs, "conv-sm90": own}
    words = (
        "pool" if pool else "",
        form(layer, x),
        *(f"and {n}" for n, o in offered.items() if o),
    )
    key = problem("conv", x, weight.shape, stride, *words)

    def run(engine: str) -> None:
        run_engine(engine, x, weight, scale, shift, out, stride=stride, relu=relu, pool=pool)

    prepare = functools.partial(
        conv_trial, run_engine, x, weight, out, stride=stride, relu=relu, pool=pool
    )
    return choose(x, layer, key, [*aten(x, out), *graphs, *own], run, prepare)


def run_engine(
    engine: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    relu: bool,
    pool: bool,
) -> Tensor | None:
    """Run :func:`conv` on one engine. All of them leave the same result, up to rounding."""
    kernels, n, c_out = load_kernels(), x.shape[0], weight.shape[0]
    if engine == ATEN:
        z = _aten.conv(x, weight, stride=stride)
        tiles = kernels.epilogue.pool_tiles(out)
        partials = scale.new_empty(n, tiles, c_out) if pool else None
        kernels.epilogue.epilogue(z, scale, shift, out, relu=relu, pool_partials=partials)
        return partials
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x))
    if engine.startswith(cudnn_graph.NAME):
        assert not pool, f"{engine} has no pool partials"
        cudnn_graph.run(engine, x, weight, scale, shift, out, relu=relu, **options)
        return None
    if engine.startswith(conv_sm90.NAME):
        return conv_sm90.run(engine, x, weight, scale, shift, out, relu=relu, pool=pool)
    found, _ = kernels.conv.choices(x, weight, out, **options)
    options["config"] = next(config for config in found if config.name == engine)
    partials = None
    if pool:
        tiles = kernels.conv.pool_tiles(x, weight, out, **options)
        partials = scale.new_empty(n, tiles, c_out)
    kernels.conv.conv(x, weight, scale, shift, out, relu=relu, pool_partials=partials, **options)
    return partials


def conv_statistics(x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1) -> Tensor:
    """See :mod:`vovnet_fast.backends`. The engine is chosen by :mod:`vovnet_fast.tuning`."""
    if out.numel() == 0:
        return x.new_zeros(1, 3, weight.shape[0], dtype=accumulator(x.dtype))
    engine = choose_statistics_engine(x, weight, out, stride=stride)
    return run_statistics_engine(engine, x, weight, out, stride=stride)


def choose_statistics_engine(x: Tensor, weight: Tensor, out: Tensor, *, stride: int) -> str:
    """The fastest engine for :func:`conv_statistics`: :data:`ATEN`, or a Triton configuration."""
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x), statistics=True)
    layer = load_kernels().conv.layer(x, weight, out, **options)
    key = problem("conv", x, weight.shape, stride, "statistics", form(layer, x))

    def run(engine: str) -> None:
        run_statistics_engine(engine, x, weight, out, stride=stride)

    prepare = functools.partial(
        statistics_trial, run_statistics_engine, x, weight, out, stride=stride
    )
    return choose(x, layer, key, aten(x, out), run, prepare)


def run_statistics_engine(
    engine: str, x: Tensor, weight: Tensor, out: Tensor, *, stride: int
) -> Tensor:
    """Run :func:`conv_statistics` on one engine; they divide the pixels into other parts."""
    kernels, n, c_out = load_kernels(), x.shape[0], weight.shape[0]
    high = accumulator(x.dtype)
    if engine == ATEN:
        z = _aten.conv(x, weight, stride=stride)
        tiles = kernels.epilogue.pool_tiles(out)
        partials = x.new_empty(n, tiles, 3, c_out, dtype=high)
        kernels.epilogue.epilogue(z, None, None, out, relu=False, statistics=partials)
        return partials.flatten(0, 1)
    options: dict[str, Any] = dict(stride=stride, tf32=tf32(x))
    found, _ = kernels.conv.choices(x, weight, out, statistics=True, **options)
    options["config"] = next(config for config in found if config.name == engine)
    tiles = kernels.conv.pool_tiles(x, weight, out, **options)
    partials = x.new_empty(n, tiles, 3, c_out, dtype=high)
    kernels.conv.conv(x, weight, None, None, out, relu=False, statistics=partials, **options)
    return partials.flatten(0, 1)
